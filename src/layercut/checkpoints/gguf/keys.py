"""The keys of a GGUF file that describe its model; each is read, harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from layercut.errors import ModelError

ORIGINAL = "Use the original checkpoint."
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_length_out": (0,),
    "embedding_scale": (1.0,),
    "expert_count": (0,),
    "expert_feed_forward_length": (0,),
    "expert_gating_func": (1,),  # softmax
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_shared_count": (0,),
    "expert_shared_feed_forward_length": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (1.0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "residual_scale": (1.0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.finetuned": (False, True),  # says where the scaling comes from
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),  # the only one there ever was
}
"""Values by which a key that nothing reads leaves the model as it is in llama.cpp."""


class Keys:
    """The keys below one architecture's name.

    Args:
        path: the file, for messages.
        values: every key of the file and its value.
        tensors: the names of the file's tensors.
    """

    def __init__(self, path: Path, values: Mapping[str, Any], tensors: Collection[str]) -> None:
        self.path = path
        self.tensors = tensors
        self.architecture = str(values["general.architecture"])
        prefix = f"{self.architecture}."
        self._values = {
            key.removeprefix(prefix): value
            for key, value in values.items()
            if key.startswith(prefix)
        }
        self._read: set[str] = set()

    def count(self, name: str, default: int | None = None) -> int:
        """A natural number, the same for all layers.

        Raises:
            ModelError: it is missing and has no default, differs by layer or is none.
        """
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._wrong(name, value, "a count")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number, as it was written before it became a float32.

        Raises:
            ModelError: it is missing and has no default, differs by layer or is none.
        """
        value = self._take(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, value, "a number")
        return float(str(np.float32(value)))

    def word(self, name: str, default: str) -> str:
        """A text.

        Raises:
            ModelError: it is none.
        """
        value = self._take(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        return value

    def per_layer(self, name: str) -> Any:
        """A value that may be a list with an entry for each layer, or ``None`` if it is missing."""
        self._read.add(name)
        return self._values.get(name)

    def refuse(self, name: str, why: str) -> ModelError:
        """What to raise for a key whose value cannot be carried over."""
        return ModelError(
            f"{self.path} sets {self.architecture}.{name} = {self._values.get(name)}: {why}. "
            f"{ORIGINAL}"
        )

    def check_all_read(self) -> None:
        """Refuse keys that nothing read, unless their value changes nothing.

        Raises:
            ModelError: naming the key.
        """
        for name, value in self._values.items():
            if name not in self._read and not _is_neutral(value, NEUTRAL.get(name, ())):
                raise self.refuse(
                    name, f"transformers' model for '{self.architecture}' cannot express it"
                )

    def _take(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._values.get(name, default)
        if value is None:
            raise ModelError(
                f"{self.path} lacks the key {self.architecture}.{name}, which its model needs. "
                f"{ORIGINAL}"
            )
        if isinstance(value, list):
            if not value or any(entry != value[0] for entry in value):
                raise self.refuse(name, "layers that differ in it cannot be expressed")
            return value[0]
        return value

    def _wrong(self, name: str, value: Any, meant: str) -> ModelError:
        return ModelError(
            f"{self.path} sets {self.architecture}.{name} = {value!r} where {meant} is meant. "
            f"{ORIGINAL}"
        )


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_neutral(entry, neutral) for entry in value)
    return any(
        value == np.float32(one) if isinstance(one, float) else value == one for one in neutral
    )
