"""Which parameter a stored tensor feeds: transformers' own conversion, followed by names alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from layercut.checkpoints.hf_calls import guard
from layercut.errors import ModelError

NUMBER = re.compile(r"\.(\d+)\.")


class Conversion:
    """How transformers names a checkpoint's tensors in one model.

    Attributes:
        parameters: every name of the model's state dict.
    """

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self._state = model.state_dict()
        self.parameters = frozenset(self._state)
        self._prefix = model.base_model_prefix
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        self._ignored = re.compile("|".join(f"({pattern})" for pattern in ignored) or r"(?!)")

    def convert(self, name: str) -> str:
        """The parameter that a stored tensor feeds, or the name under which it finds none."""
        return self._follow(name)[0]

    def reads(self, name: str) -> bool:
        """Whether a stored tensor feeds a parameter."""
        return self.convert(name) in self.parameters

    def copies(self, name: str) -> bool:
        """Whether a stored tensor is a parameter under another name, and not only a part of one."""
        new, converter = self._follow(name)
        return converter is None and new in self.parameters

    def passes_over(self, name: str) -> bool:
        """Whether the model's class says that it makes nothing of such a tensor."""
        return self._ignored.search(self.convert(name)) is not None

    def _follow(self, name: str) -> tuple[str, str | None]:
        """The new name, and the pattern of the converter that puts it together with others."""
        new = rename_source_key(name, self._renamings, self._converters, self._prefix, self._state)
        if new[0] not in self.parameters and name in self.parameters:
            new = rename_source_key(name, [], [], self._prefix, self._state)
        return str(new[0]), new[1]


def find_stored_prefix(conversion: Conversion, layers: str, names: Iterable[str]) -> str:
    """The prefix under which the files hold the decoder's layers; ``layers`` if none feeds them.

    Args:
        conversion: of the model that is loaded.
        layers: prefix of the layers in its state dict.
        names: the stored tensors' names, perhaps of quantised ones.

    Raises:
        ModelError: two lists of layers in the files feed the same decoder.
    """
    inside = re.compile(rf"{re.escape(layers)}\.(\d+)\.")
    votes: Counter[str] = Counter()
    n_names = 0
    kinds = {re.sub(r"\d+", "0", name): name for name in names}
    for name in kinds.values():
        for stored in dict.fromkeys((name, f"{split_name(name)[0]}.weight")):
            target = conversion.convert(stored)
            if target in conversion.parameters and (match := inside.match(target)):
                number, n_names = match.group(1), n_names + 1
                votes.update(
                    stored[: place.start()]
                    for place in NUMBER.finditer(stored)
                    if place.group(1) == number
                )
                break
    if not votes:
        return layers
    best = max(votes, key=lambda prefix: (votes[prefix], -len(prefix)))
    others = [prefix for prefix in sorted(votes) if not prefix.startswith(best)]
    if votes[best] < n_names and others:
        raise ModelError(
            f"the weights hold two lists of layers, {best} and {others[0]}, and transformers loads "
            "both into the same decoder. Remove the one that does not belong to this model."
        )
    return best


def split_name(name: str) -> tuple[str, str]:
    """``a.q_proj.weight.absmax`` → (``a.q_proj``, ``weight.absmax``)."""
    module, separator, rest = name.partition(".weight.")
    if separator:
        return module, f"weight.{rest}"
    module, _, part = name.rpartition(".")
    return module, part


def build_whole_model(config: Any, model: Any) -> Any | None:
    """The model of all parts of a checkpoint, where a causal language model has only some.

    Args:
        config: the checkpoint's configuration.
        model: the causal language model that transformers makes of it.

    Returns:
        A model without memory for its weights; ``None`` if ``model`` is the whole, or if
        transformers cannot build any other.
    """
    if type(model.config) is type(config):
        return None
    for name in (*(config.architectures or ()), *_list_classes(config)):
        class_ = getattr(transformers, name, None)
        if getattr(class_, "config_class", None) is not type(config):
            continue
        what, remedy = f"{name} cannot be built", "Restore the original configuration."
        with suppress(ModelError), guard(what, ModelError, remedy), torch.device("meta"):
            return class_._from_config(config)  # type: ignore[union-attr]
    return None


def _list_classes(config: Any) -> list[str]:
    """Classes that transformers knows for a model of several kinds of input."""
    tables = (
        transformers.AutoModelForMultimodalLM,
        transformers.AutoModelForImageTextToText,
    )
    found = [table._model_mapping.get(type(config), None) for table in tables]
    return [class_.__name__ for class_ in found if class_ is not None]
