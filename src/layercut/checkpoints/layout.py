"""Where a checkpoint keeps its decoder layers: in memory, on disk, and which of them must stay."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicCache

from layercut.checkpoints.config_edit import get_section, section_path
from layercut.checkpoints.families import (
    FROM_PREVIOUS,
    KV_PRODUCERS,
    LENDING,
    MTP_COUNTS,
    MTP_PART,
    SHARED_RESULTS,
    FamilyRules,
    Pin,
    find_rules,
)
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.weight_names import Conversion, find_stored_prefix
from layercut.errors import ModelError

LAST_TO_COUNT = (
    "transformers reads the length of what it has cached from a layer with keys and values"
)


@dataclass(frozen=True, slots=True)
class Layout:
    """One checkpoint's layers.

    Attributes:
        model_type: of the text decoder.
        rules: its family's row.
        n_layers: decoder layers of the checkpoint.
        layers: module path of the layer list, the prefix of its tensors in the state dict.
        stored: that prefix on disk, which may differ.
        pinned: layer that cannot be dropped → why.
        n_mtp: layers for multi-token prediction that are stored behind the decoder's.
        carries_mtp: whether such layers are stored under a name of their own.
        index_scaled: whether queries must be rescaled when a layer's number changes.
        unscorable: why no layer runs alone, or an empty string.
        keep_one_of: layers of which at least one must stay; empty where any may go.
    """

    model_type: str
    rules: FamilyRules
    n_layers: int
    layers: str
    stored: str
    pinned: Mapping[int, str] = field(default_factory=dict)
    n_mtp: int = 0
    carries_mtp: bool = False
    index_scaled: bool = False
    unscorable: str = ""
    keep_one_of: frozenset[int] = frozenset()

    def layer_list(self, model: nn.Module) -> nn.ModuleList:
        """The decoder layers of a model with this layout."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def check_dropped(self, dropped: Collection[int]) -> None:
        """Refuse to drop what the family pins, or the last layer of a kind that must stay.

        Raises:
            ModelError: a layer is pinned, or none is left of those of which one must stay.
        """
        for layer in sorted(set(dropped) & self.pinned.keys()):
            raise ModelError(
                f"layer {layer} cannot be dropped: {self.pinned[layer]}. Choose another layer."
            )
        if self.keep_one_of and self.keep_one_of <= set(dropped):
            layers = ", ".join(map(str, sorted(self.keep_one_of)))
            raise ModelError(
                f"layers {layers} cannot be dropped together: {LAST_TO_COUNT}, and no other layer "
                "has any. Keep at least one of them."
            )

    def new_name(self, name: str, new_index: Mapping[int, int]) -> str | None:
        """A tensor's name in the pruned state dict; ``None`` if its layer is dropped."""
        return _rename(name, self.layers, new_index)

    def new_stored_name(self, name: str, new_index: Mapping[int, int]) -> str | None:
        """A tensor's name in the pruned checkpoint; ``None`` if its layer is dropped."""
        return _rename(name, self.stored, new_index)

    def stored_number(self, name: str) -> int | None:
        """The number of the layer that a tensor on disk belongs to, if it belongs to one."""
        match = re.match(rf"{re.escape(self.stored)}\.(\d+)\.", name)
        return int(match.group(1)) if match else None

    def slice_dimension(self, name: str) -> int | None:
        """The dimension along which a shared tensor holds one block per layer, if it does."""
        dimensions = [d for suffix, d in self.rules.sliced.items() if name.endswith(suffix)]
        return dimensions[0] if dimensions else None


def find_layout(config: Any, model: nn.Module, names: Collection[str]) -> Layout:
    """The layout of a checkpoint.

    Args:
        config: its configuration.
        model: the model that it describes, perhaps without memory.
        names: the stored tensors' names.

    Raises:
        ModelError: the layers cannot be told from the model's other parts.
    """
    text = get_section(config, section_path(config))
    rules = find_rules(text.model_type)
    layers = _layer_path(model, text.num_hidden_layers)
    _check_inputs(model.get_submodule(layers), text.model_type)
    conversion = Conversion(model)
    stored = find_stored_prefix(conversion, layers, names)
    n_mtp = next((getattr(text, key) for key in MTP_COUNTS if getattr(text, key, None)), 0)
    behind = {i for i in _numbers(names, stored) if i >= text.num_hidden_layers}
    # Some classes pass over the prediction layers of one published size, whatever the count.
    if behind and all(conversion.passes_over(f"{stored}.{i}.norm.weight") for i in behind):
        n_mtp = len(behind)
    expected = set(range(text.num_hidden_layers, text.num_hidden_layers + n_mtp))
    flag = rules.index_scaled[0] if rules.index_scaled else ""
    pinned = _lenders(text) | {i: pin.why for pin in rules.pinned for i in _pinned(pin, text)}
    counting = _layers_that_count(text)
    if len(counting) == 1 < text.num_hidden_layers:
        pinned |= dict.fromkeys(counting, f"{LAST_TO_COUNT}, and no other layer has any")
    return Layout(
        model_type=text.model_type,
        rules=rules,
        n_layers=text.num_hidden_layers,
        layers=layers,
        stored=stored,
        pinned=pinned,
        n_mtp=n_mtp if behind == expected else 0,
        carries_mtp=any(MTP_PART.search(name) for name in names),
        index_scaled=bool(getattr(text, flag, False)),
        unscorable=rules.unscorable or (SHARED_RESULTS if _lenders(text) else ""),
        keep_one_of=counting if 1 < len(counting) < text.num_hidden_layers else frozenset(),
    )


def stored_layers(layout: Layout, names: Iterable[str]) -> set[int]:
    """Numbers of the decoder layers that have tensors on disk."""
    behind = range(layout.n_layers, layout.n_layers + layout.n_mtp)
    return _numbers(names, layout.stored) - set(behind)


def _check_inputs(layers: Any, model_type: str) -> None:
    """Refuse layers that read more of the one before than the stream."""
    for layer in layers:
        for name in inspect.signature(layer.forward).parameters:
            if FROM_PREVIOUS.fullmatch(name):
                raise ModelError(
                    f"the layers of '{model_type}' also read {name}, which the layer before passes "
                    "on, so that none can be dropped exactly. Choose another model."
                )


def _rename(name: str, prefix: str, new_index: Mapping[int, int]) -> str | None:
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    if match is None:
        return name
    index = new_index.get(int(match.group(1)))
    return None if index is None else f"{prefix}.{index}.{name[match.end() :]}"


def _numbers(names: Iterable[str], prefix: str) -> set[int]:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    return {int(match.group(1)) for name in names if (match := pattern.match(name))}


def _layer_path(model: Any, n_layers: int) -> str:
    """The list of ``n_layers`` modules whose class transformers keeps in one piece.

    Encoders of other modalities may be as deep; the decoder is the one beside the embedding.
    """
    whole = set(model._no_split_modules or ())
    embedding = model.get_input_embeddings()
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and not re.search(r"\.\d+(\.|$)", path)
    }
    # Some families name only parts of their layers there.
    named = [p for p, m in lists.items() if any(type(layer).__name__ in whole for layer in m)]
    paths = named or list(lists)
    beside = [
        path
        for path in paths
        if any(m is embedding for m in model.get_submodule(path.rpartition(".")[0]).modules())
    ]
    if len(beside or paths) != 1:
        raise ModelError(
            f"the decoder layers of {type(model).__name__} cannot be told from its other parts: "
            f"{', '.join(paths) or 'no list of modules has the right length'}. Choose a model "
            "with one stack of decoder layers."
        )
    path = str((beside or paths)[0])
    if not decoder_path(model, path):
        raise ModelError(
            f"no part of {type(model).__name__} turns token ids into the states that its head "
            "reads. Choose another model."
        )
    return path


def decoder_path(model: nn.Module, layers: str) -> str:
    """The module around a layer list that takes token ids; empty if only the whole model does.

    Decoders that are made of BERT-like encoders keep their layers one level further down.
    """
    path = layers.rpartition(".")[0]
    while path:
        forward = type(model.get_submodule(path)).forward
        if "input_ids" in inspect.signature(forward).parameters:
            break
        path = path.rpartition(".")[0]
    return path


def _layers_that_count(text: Any) -> frozenset[int]:
    """Layers whose cache knows how many tokens it has seen: those with keys and values."""
    try:
        with guard("no cache can be made", ModelError, "Restore the original configuration."):
            slots = DynamicCache(config=text).layers
    except ModelError:
        return frozenset()
    if len(slots) != text.num_hidden_layers:
        return frozenset()
    return frozenset(
        index
        for index, slot in enumerate(slots)
        if isinstance(slot, CacheLayerMixin) and not isinstance(slot, DummyLayer)
    )


def _lenders(text: Any) -> dict[int, str]:
    """Layers whose results a later layer reuses → why they must stay."""
    modes = getattr(text, "kv_sharing_modes", None) or ()
    lenders = {i: KV_PRODUCERS.why for i, mode in enumerate(modes) if mode == "store"}
    for key, (lends, borrows, why) in LENDING.items():
        last = None
        for i, kind in enumerate(getattr(text, key, None) or ()):
            if kind == lends:
                last = i
            elif kind == borrows and last is not None:
                lenders[last] = why
    return lenders


def _pinned(pin: Pin, text: Any) -> list[int]:
    if pin.where == "first":
        return [0]
    if pin.where == "last":
        return [text.num_hidden_layers - 1]
    return [i for i, mode in enumerate(text.kv_sharing_modes) if mode == "store"]
