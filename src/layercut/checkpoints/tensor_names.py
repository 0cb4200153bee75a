"""Whether the tensors in the files' headers are exactly those of the configured model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from layercut.checkpoints.config_edit import get_section, section_path
from layercut.checkpoints.families import LEFTOVER_TABLES, MTP_COUNTS
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.layout import Layout, stored_layers
from layercut.checkpoints.safetensors_file import DTYPES, TABLES, StoredTensor
from layercut.checkpoints.weight_names import Conversion, build_whole_model
from layercut.errors import ModelError

TIED = "tie_word_embeddings"
MAX_NAMED = 3
"""Tensors that an error message lists."""


def check_weights(
    config: Any, model: Any, stored: Mapping[str, StoredTensor], layout: Layout
) -> None:
    """Let transformers match the headers with the model: what it would fill or ignore is refused.

    Raises:
        ModelError: layers or tensors are missing or surplus, or have another shape.
    """
    n_stored = stored_layers(layout, stored)
    if n_stored != set(range(layout.n_layers)):
        raise ModelError(
            f"config.json says num_hidden_layers = {layout.n_layers}, the weights hold "
            f"{len(n_stored)} layers under {layout.stored}, where transformers' "
            f"{type(model).__name__} reads them. Use the configuration that belongs to these "
            "weights."
        )
    info = find_loading_info(model, stored)
    if missing := sorted(info["missing_keys"]):
        own: Any = model.config
        if getattr(config, TIED, False) and not getattr(own, TIED, False):
            raise ModelError(
                f"the weights lack {some(missing)}: config.json sets {TIED} at its top, not for "
                f"its text decoder, which {type(model).__name__} reads alone. Set it in "
                "text_config too."
            )
        raise ModelError(
            f"the weights lack {some(missing)}, which transformers would fill with random numbers. "
            "Use the whole checkpoint of the causal language model."
        )
    if surplus := find_surplus(config, model, info["unexpected_keys"], stored):
        raise ModelError(
            f"the weights hold {some(surplus)}, which the configured model does not have. "
            "Use the configuration that belongs to these weights."
        )
    for name, shape, wanted in info["mismatched_keys"]:
        file = f"{stored[name].path.name}: " if name in stored else ""
        raise ModelError(
            f"{file}{name} has shape {list(shape)}, config.json makes it {list(wanted)}. "
            "Use the configuration that belongs to these weights."
        )


def find_surplus(
    config: Any, model: Any, unexpected: Iterable[str], stored: Iterable[str]
) -> list[str]:
    """Stored tensors that no part of the checkpoint's model is made of, sorted.

    A causal language model may be one part of several: what it passes over is right where the
    model of all parts reads it, as a vision tower.

    Args:
        config: the checkpoint's configuration.
        model: the causal language model of it.
        unexpected: names, in the model's spelling, that transformers found no place for.
        stored: the stored tensors' names.
    """
    left = {str(name) for name in unexpected if not is_ignored(str(name), config)}
    whole = build_whole_model(config, model) if left else None
    if whole is None:
        return sorted(left)
    own, all_parts = Conversion(model), Conversion(whole)
    spelled = {own.convert(name): name for name in stored}
    return sorted(
        name
        for name in left
        if not (all_parts.reads(spelled.get(name, name)) or all_parts.passes_over(name))
    )


def find_loading_info(model: Any, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What transformers would miss, ignore or not fit, from the headers alone.

    Raises:
        ModelError: it cannot put the stored pieces together.
    """
    dtypes = DTYPES | TABLES
    headers = {  # what is in none of these types is a left-over mask, whatever is made of it
        name: torch.empty(tensor.shape, dtype=dtypes.get(tensor.dtype, torch.uint8), device="meta")
        for name, tensor in stored.items()
    }
    with guard(
        "the weights' names and shapes do not fit config.json: transformers cannot put them "
        "together, as where experts of a layer are missing",
        ModelError,
        "Use the configuration that belongs to these weights.",
    ):
        try:
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=headers,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except NotImplementedError as error:  # a tensor on meta was to be computed with
            raise ModelError(
                f"the stored tensors of '{model.config.model_type}' become the model's in a way "
                "that can only be followed with their content, which layercut does not do. Choose "
                "another model."
            ) from error
    loaded: dict[str, Any] = info
    return loaded


def is_ignored(name: str, config: Any) -> bool:
    """Whether the configured model rightly makes nothing of a tensor.

    It is a table that is computed today, or belongs to the multi-token prediction layers behind
    the decoder's.
    """
    if LEFTOVER_TABLES.fullmatch(name):
        return True
    text = get_section(config, section_path(config))
    count = next((getattr(text, key) for key in MTP_COUNTS if getattr(text, key, None)), 0)
    match = re.search(r"\.(\d+)\.", name)
    return match is not None and 0 <= int(match.group(1)) - text.num_hidden_layers < count


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
