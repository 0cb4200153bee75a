"""Quantised checkpoints as files: which tensors a layer holds, and what names layers elsewhere.

A quantised tensor is stored as several under its module's name (``qweight``, ``scales``,
``weight_scale_inv``, ``weight.absmax`` …), so a layer can move without any of them being decoded.
What must change beside the names is the quantisation's own configuration, where it lists modules.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from layercut.checkpoints.families import LEFTOVER_TABLES
from layercut.checkpoints.layer_names import CONFIG_KEYS, LayerNames, read_pattern
from layercut.checkpoints.layout import Layout, stored_layers
from layercut.checkpoints.safetensors_file import DTYPES, TABLES, StoredTensor
from layercut.checkpoints.stacks import Find
from layercut.checkpoints.weight_names import Conversion, split_name
from layercut.errors import ModelError

CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Older spellings of the same configuration, in files beside config.json."""
PLAIN = frozenset({"weight", "bias"})
REMEDY = "Compare the files with the sha256 of the original."

Parts = dict[str, frozenset[str]]
"""Module inside a layer → names of its tensors."""


def is_quantised(config: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> bool:
    """Whether weights are stored as something else than floating-point numbers."""
    return any(config.get(key) for key in CONFIG_KEYS) or any(
        is_packed(name, tensor) for name, tensor in stored.items()
    )


def is_packed(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor is stored in a type that holds no floating-point numbers, nor a table."""
    return tensor.dtype not in DTYPES | TABLES and not LEFTOVER_TABLES.fullmatch(name)


def check_names(
    expected: Mapping[str, tuple[tuple[int, ...], bool]],
    stored: Mapping[str, StoredTensor],
    layout: Layout,
    config: Mapping[str, Any],
    conversions: Sequence[Conversion],
) -> None:
    """Refuse a quantised checkpoint in which a layer differs from its peers without a reason.

    Peers are the layers that the configuration makes alike. A module is either plain or
    quantised in each of them, by the same set of tensors unless an entry of the quantisation's
    configuration tells these layers apart.

    Args:
        expected: name → (shape, may be absent) of the model before quantisation.
        stored: what the files hold.
        layout: where its layers are.
        config: the parsed config.json.
        conversions: how transformers names the tensors, in the causal language model first.

    Raises:
        ModelError: layers or tensors are missing or surplus.
    """
    names = [n for n in stored if n in expected or not LEFTOVER_TABLES.fullmatch(n)]
    wanted, present = (
        _split_by_layer(expected, layout.layers),
        _split_by_layer(names, layout.stored),
    )
    if stored_layers(layout, names) != set(range(len(wanted))):
        raise ModelError(
            f"config.json says num_hidden_layers = {len(wanted)}, the weights hold "
            f"{len(present)} layers. Use the configuration that belongs to these weights."
        )
    peers: dict[frozenset[tuple[str, frozenset[str]]], list[int]] = defaultdict(list)
    for layer, parts in wanted.items():
        peers[frozenset(parts.items())].append(layer)
    entries = _Entries(config, {layout.stored, layout.layers})
    for layers in peers.values():
        own = wanted[layers[0]].keys()
        _check_peers({layer: present[layer] for layer in sorted(layers)}, own, entries)
        _check_modules(wanted[layers[0]], present[layers[0]], f"layer {layers[0]}")
    untied = [name for name, (_, tied) in expected.items() if not tied]
    outside = [
        _spell(name, conversions[0])
        for name in names
        if layout.stored_number(name) is None and not _is_of_another_part(name, conversions)
    ]
    _check_modules(
        _lies_outside(untied, layout.layers), _lies_outside(outside, layout.layers), "the model"
    )
    for name, tensor in stored.items():
        if tensor.dtype in DTYPES and name in expected and tensor.shape != expected[name][0]:
            raise ModelError(
                f"{tensor.path.name}: {name} has shape {list(tensor.shape)}, config.json makes it "
                f"{list(expected[name][0])}. Use the configuration that belongs to these weights."
            )


def renumber_layers(
    value: Any,
    layout: Layout,
    new_index: Mapping[int, int],
    names: Iterable[str],
    find_conversions: Find = tuple,
) -> Any:
    """A quantisation's configuration after the layer drop; entries of dropped layers are gone.

    Args:
        value: the parsed configuration.
        layout: where its layers are.
        new_index: old index → new index of the kept layers.
        names: the source's tensors; patterns are tried on their modules.
        find_conversions: builds transformers' models of the checkpoint, whose spellings count too.

    Raises:
        ModelError: an entry looks like a layer's name and cannot be told whose, or a pattern picks
            layers in a way that renumbering cannot follow.
    """
    return LayerNames(layout, new_index, names, find_conversions).walk(value, every_pattern=True)


def _split_by_layer(names: Iterable[str], prefix: str) -> dict[int, Parts]:
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.(.+)")
    layers: dict[int, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := pattern.fullmatch(name):
            module, part = split_name(match.group(2))
            layers[int(match.group(1))][module].add(part)
    return {i: {m: frozenset(p) for m, p in parts.items()} for i, parts in layers.items()}


def _lies_outside(names: Iterable[str], prefix: str) -> Parts:
    parts: dict[str, set[str]] = defaultdict(set)
    for name in names:
        if not name.startswith(f"{prefix}."):
            module, part = split_name(name)
            parts[module].add(part)
    return {module: frozenset(names_of_part) for module, names_of_part in parts.items()}


def _spell(name: str, conversion: Conversion) -> str:
    """A stored tensor's name in the model's own spelling, also of a quantised one."""
    module, part = split_name(name)
    weight = f"{module}.weight"
    if conversion.reads(name) or not conversion.reads(weight):
        return conversion.convert(name)
    return f"{split_name(conversion.convert(weight))[0]}.{part}"


def _is_of_another_part(name: str, conversions: Sequence[Conversion]) -> bool:
    """Whether the causal language model makes nothing of a tensor, and rightly so."""
    own, *others = conversions
    spellings = (name, f"{split_name(name)[0]}.weight")
    if own.passes_over(name):
        return True
    return not any(map(own.reads, spellings)) and any(
        part.passes_over(name) or any(map(part.reads, spellings)) for part in others
    )


class _Entries:
    """What a quantisation's configuration says of single layers, in lists, groups or expressions.

    Args:
        config: the parsed config.json.
        prefixes: spellings of the decoder's list of layers.
    """

    def __init__(self, config: Mapping[str, Any], prefixes: Iterable[str]) -> None:
        self._prefixes = tuple(prefixes)
        sections = [config, *(part for part in config.values() if isinstance(part, dict))]
        self._texts = {
            text
            for section in sections
            for key in CONFIG_KEYS & section.keys()
            for text in _list_strings(section[key])
        }

    def tell_apart(self, module: str, layer: int, other: int) -> bool:
        """Whether an entry picks a module in one of two layers only."""
        return any(
            self._picks(text, module, layer) != self._picks(text, module, other)
            for text in self._texts
        )

    def _picks(self, text: str, module: str, layer: int) -> bool:
        names = [f"{prefix}.{layer}.{module}" for prefix in self._prefixes]
        part = re.compile(rf"(.*\.)?{re.escape(text.rstrip('.'))}(\..*)?")
        return any(part.fullmatch(name) for name in names) or any(
            pick(text, names) for pick in read_pattern(text)
        )


def _list_strings(value: Any) -> list[str]:
    """Every string in parsed JSON, keys among them."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in _list_strings(part)]
    return (
        [text for item in value for text in _list_strings(item)] if isinstance(value, list) else []
    )


def _check_peers(layers: Mapping[int, Parts], own: Collection[str], entries: _Entries) -> None:
    modules = Counter(module for parts in layers.values() for module in parts)
    for module, n_layers in modules.items():
        if n_layers != len(layers):
            with_it = 2 * n_layers > len(layers)
            odd = next(i for i, parts in layers.items() if (module in parts) != with_it)
            peer = next(i for i, parts in layers.items() if (module in parts) == with_it)
            if module in own or not entries.tell_apart(module, odd, peer):
                verb = "lacks" if with_it else "alone holds"
                raise ModelError(f"layer {odd} {verb} {module}, unlike its peers. {REMEDY}")
        kinds = Counter(parts[module] for parts in layers.values() if module in parts)
        for plain in (True, False):
            alike = [kind for kind, _ in kinds.most_common() if (kind <= PLAIN) == plain]
            for other in alike[1:]:
                odd, peer = (
                    next(i for i, parts in layers.items() if parts.get(module) == kind)
                    for kind in (other, alike[0])
                )
                if plain or not entries.tell_apart(module, odd, peer):
                    differing = ", ".join(sorted(alike[0] ^ other))
                    raise ModelError(
                        f"layer {odd} differs from its peers in {module}: {differing}, and nothing "
                        f"in the quantisation's configuration says so. {REMEDY}"
                    )


def _check_modules(wanted: Parts, present: Parts, where: str) -> None:
    """Compare modules where the files use the model's own names; experts may be stored apart."""
    unknown = [m for m in present if not any(m == w or m.startswith(f"{w}.") for w in wanted)]
    missing = [w for w in wanted if not any(m == w or m.startswith(f"{w}.") for m in present)]
    if missing and not unknown:
        raise ModelError(f"the weights of {where} lack {missing[0]}. {REMEDY}")
    if unknown and not missing:
        raise ModelError(
            f"the weights of {where} hold {unknown[0]}, which the configured model does not have. "
            "Use the configuration that belongs to these weights."
        )
