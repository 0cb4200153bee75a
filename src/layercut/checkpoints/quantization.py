"""Quantised checkpoints as files: which tensors a layer holds, and what names layers elsewhere.

A quantised tensor is stored as several under its module's name (``qweight``, ``scales``,
``weight_scale_inv``, ``weight.absmax`` …), so a layer can move without any of them being decoded.
What must change beside the names is the quantisation's own configuration, where it lists modules.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from layercut.checkpoints.families import LEFTOVER_TABLES
from layercut.checkpoints.layout import Layout, stored_layers
from layercut.checkpoints.safetensors_file import DTYPES, TABLES, StoredTensor
from layercut.errors import ModelError

CONFIG_KEYS = frozenset({"quantization_config", "compression_config", "quantization"})
"""The last one is mlx-lm's, with an entry for each module that differs from the others."""
CONFIG_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Older spellings of the same configuration, in files beside config.json."""
PLAIN = frozenset({"weight", "bias"})
PATTERN_SIGNS = frozenset("*[](|+?\\^$")
MARK = re.compile(r"re:|[+-]:")
"""What llm-compressor and GPTQModel put before an expression."""
REMEDY = "Download the checkpoint again."

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
) -> None:
    """Refuse a quantised checkpoint in which a layer differs from its peers without a reason.

    Peers are the layers that the configuration makes alike. A module is either plain or
    quantised in each of them, always by the same set of tensors.

    Args:
        expected: name → (shape, may be absent) of the model before quantisation.
        stored: what the files hold.
        layout: where its layers are.

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
    for layers in peers.values():
        _check_peers({layer: present[layer] for layer in sorted(layers)})
        _check_modules(wanted[layers[0]], present[layers[0]], f"layer {layers[0]}")
    untied = [name for name, (_, tied) in expected.items() if not tied]
    _check_modules(
        _lies_outside(untied, layout.layers), _lies_outside(names, layout.stored), "the model"
    )
    for name, tensor in stored.items():
        if tensor.dtype in DTYPES and name in expected and tensor.shape != expected[name][0]:
            raise ModelError(
                f"{tensor.path.name}: {name} has shape {list(tensor.shape)}, config.json makes it "
                f"{list(expected[name][0])}. Use the configuration that belongs to these weights."
            )


def renumber_layers(
    value: Any, layout: Layout, new_index: Mapping[int, int], names: Iterable[str]
) -> Any:
    """A quantisation's configuration after the layer drop; entries of dropped layers are gone.

    Args:
        value: the parsed configuration.
        layout: where its layers are.
        new_index: old index → new index of the kept layers.
        names: the source's tensors; patterns are tried on their modules.

    Raises:
        ModelError: a pattern picks layers in a way that renumbering cannot follow.
    """
    modules = {split_name(name)[0] for name in names}
    renamed = {m: layout.new_stored_name(f"{m}.", new_index) for m in modules}
    return _walk(value, _Renumbering(layout, new_index, renamed))


def split_name(name: str) -> tuple[str, str]:
    """``a.q_proj.weight.absmax`` → (``a.q_proj``, ``weight.absmax``)."""
    module, separator, rest = name.partition(".weight.")
    if separator:
        return module, f"weight.{rest}"
    module, _, part = name.rpartition(".")
    return module, part


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


def _check_peers(layers: Mapping[int, Parts]) -> None:
    modules = Counter(module for parts in layers.values() for module in parts)
    for module, n_layers in modules.items():
        if n_layers != len(layers):
            with_it = 2 * n_layers > len(layers)
            odd = next(i for i, parts in layers.items() if (module in parts) != with_it)
            verb = "lacks" if with_it else "alone holds"
            raise ModelError(f"layer {odd} {verb} {module}, unlike its peers. {REMEDY}")
        kinds = Counter(parts[module] for parts in layers.values())
        for plain in (True, False):
            alike = [kind for kind, _ in kinds.most_common() if (kind <= PLAIN) == plain]
            if len(alike) > 1:
                odd = next(i for i, parts in layers.items() if parts[module] == alike[1])
                differing = ", ".join(sorted(alike[0] ^ alike[1]))
                raise ModelError(
                    f"layer {odd} differs from its peers in {module}: {differing}. {REMEDY}"
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


class _Renumbering:
    """Renumbers one string; ``None`` means that it named dropped layers only."""

    def __init__(
        self,
        layout: Layout,
        new_index: Mapping[int, int],
        renamed: Mapping[str, str | None],
    ) -> None:
        self.new_index = new_index
        self.renamed = {old: new and new.removesuffix(".") for old, new in renamed.items()}
        layer_list = re.escape(layout.stored.rpartition(".")[2])
        # `layers.13`, also escaped as in `layers\.13`, but neither `sublayers.13` nor `layers.133`.
        self.token = re.compile(rf"(?<![A-Za-z0-9_])({layer_list}\\?\.)(\d+)(?!\d)")

    def __call__(self, text: str) -> str | None:
        substituted = self._substitute(text)
        if not PATTERN_SIGNS & set(text):
            return substituted
        picks = _readings(text)
        candidates = [c for c in dict.fromkeys((substituted, text)) if c is not None]
        wanted = [self._kept(pick(text, self.renamed)) for pick in picks]
        for candidate in candidates:
            new = [pick(candidate, filter(None, self.renamed.values())) for pick in picks]
            if new == wanted:
                return candidate
        if not any(wanted):
            return None
        raise ModelError(
            f"the quantisation's configuration picks layers by {text!r}, which cannot be "
            "renumbered. Write one entry per layer instead."
        )

    def _substitute(self, text: str) -> str | None:
        numbers = {int(match.group(2)) for match in self.token.finditer(text)}
        if not numbers <= self.new_index.keys():
            return None
        return self.token.sub(lambda m: f"{m.group(1)}{self.new_index[int(m.group(2))]}", text)

    def _kept(self, old: Collection[str]) -> set[str]:
        return {new for module in old if (new := self.renamed[module])}


def _readings(text: str) -> list[Callable[[str, Iterable[str]], set[str]]]:
    """How libraries may read a pattern: as an expression, or as shell wildcards."""
    return [_expression] if MARK.match(text) else [_expression, _wildcards]


def _expression(text: str, names: Iterable[str]) -> set[str]:
    try:
        pattern = re.compile(MARK.sub("", text))
    except re.error:
        return set()
    return {name for name in names if pattern.match(name)}


def _wildcards(text: str, names: Iterable[str]) -> set[str]:
    return set(fnmatch.filter(names, text))


def _walk(value: Any, renumber: _Renumbering) -> Any:
    if isinstance(value, str):
        return renumber(value)
    if isinstance(value, list):
        items = [(item, _walk(item, renumber)) for item in value]
        return [new for old, new in items if new is not None or old is None]
    if isinstance(value, dict):
        entries = [(renumber(key), item) for key, item in value.items()]
        return {key: _walk(item, renumber) for key, item in entries if key is not None}
    return value
