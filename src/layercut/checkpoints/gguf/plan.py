"""Which bytes of a GGUF header change when layers go."""

from __future__ import annotations

import re
import struct

from layercut.checkpoints.gguf.header import LETTERS, GgufHeader, GgufTensor
from layercut.checkpoints.gguf.kinds import check_kinds, wrong_length_error
from layercut.checkpoints.gguf.layers import BLOCK, NAMED_LAYER, GgufLayers
from layercut.checkpoints.gguf.rules import (
    OTHER_LISTS,
    PER_LAYER_FREE,
    PER_LAYER_LISTS,
    PREFIX_COUNTS,
    UNDERSTOOD,
)
from layercut.types import PruningPlan

ENCODER_KEYS = ("vision.", "audio.")
TENSOR_OPTIONS = "general.tensor_extra."
"""Settings of single tensors; all else under ``general.`` describes the model to people."""
SPEAKS_OF_LAYERS = re.compile(r"layer|block|interval|every|step|pattern|depth|loop")
SIZE_LABEL = re.compile(r"((?:\d+x)?)(\d+(?:\.\d+)?)([KMBT])(-.*)?")
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def new_names(layers: GgufLayers, plan: PruningPlan) -> dict[str, str]:
    """Name → name in the pruned file, for every tensor that stays, in stored order."""
    new_index = plan.new_index | {
        layers.n_layers + i: len(plan.kept) + i for i in range(layers.n_behind)
    }
    names = {}
    for name in layers.tensors:
        match = BLOCK.match(name)
        if match is None:
            names[name] = name
        elif (new := new_index.get(int(match[1]))) is not None:
            names[name] = f"blk.{new}.{name[match.end() :]}"
    return names


def new_records(layers: GgufLayers, plan: PruningPlan) -> dict[str, bytes]:
    """Key → its bytes in the pruned file, in stored order; most are those of the source.

    Raises:
        ModelError: a kept layer would become another one, or a key names layers in a way that
            is not known.
    """
    check_kinds(layers, plan)
    header = layers.header
    records = {}
    for key, found in header.fields.items():
        if key.startswith("split."):
            continue
        name = key.removeprefix(f"{layers.family}.") if key.startswith(layers.key("")) else ""
        if name in PER_LAYER_LISTS or key in PER_LAYER_FREE:
            records[key] = _keep_entries(layers, plan, key)
        elif name == "block_count":
            records[key] = _scalar(header, key, len(plan.kept) + layers.n_behind)
        elif name in PREFIX_COUNTS:
            first = header.count(key)
            records[key] = _scalar(header, key, sum(i < first for i in plan.kept))
        else:
            _check_unrelated(layers, key, name)
            records[key] = found.record
    return records | _sizes(layers, plan)


def find_warnings(layers: GgufLayers, plan: PruningPlan) -> list[str]:
    """What other readers than a current llama.cpp would make of the pruned file."""
    key, period = layers.key("attention.sliding_window_pattern"), layers.rules.sliding
    if not period or not layers.header.is_list(key):
        return []
    sliding = layers.header.fields[key].decode()
    place = 0 if layers.rules.first_is_full else period - 1
    if all(bool(sliding[old]) == (new % period != place) for new, old in enumerate(plan.kept)):
        return []
    return [
        f"Which layers slide is listed in {key}. Older llama.cpp and Ollama ignore that "
        f"list and take one of every {period} to be global: run the file with a current one."
    ]


def _keep_entries(layers: GgufLayers, plan: PruningPlan, key: str) -> bytes:
    """A list's record with the kept layers' entries, and those of the layers behind them."""
    header, found = layers.header, layers.header.fields[key]
    if not header.is_list(key):
        return found.record
    if found.element not in LETTERS or found.count not in (
        layers.n_layers,
        layers.n_layers + layers.n_behind,
    ):
        raise wrong_length_error(layers, key)
    width = struct.calcsize(f"<{LETTERS[found.element]}")
    record, start = found.record, found.value_begin - found.begin
    kept = [*plan.kept, *range(layers.n_layers, found.count)]
    entries = [record[start + i * width : start + (i + 1) * width] for i in kept]
    return record[: start - 8] + struct.pack("<Q", len(kept)) + b"".join(entries)


def _scalar(header: GgufHeader, key: str, value: int) -> bytes:
    found = header.fields[key]
    head = found.record[: found.value_begin - found.begin]
    return head + struct.pack(f"<{LETTERS[found.kind]}", value)


def _check_unrelated(layers: GgufLayers, key: str, name: str) -> None:
    """Refuse a key that may speak of single layers in a way that is not known."""
    header, found = layers.header, layers.header.fields[key]
    if key.startswith("tokenizer."):
        return
    if "string" in (found.kind, found.element):
        texts = header.texts(key) if header.is_list(key) else [header.text(key)]
        about = key.startswith("general.") and not key.startswith(TENSOR_OPTIONS)
        if not about and any(NAMED_LAYER.search(text) for text in texts):
            raise header.wrong(key, "names single layers, which layercut cannot renumber")
        return
    if not name or name in UNDERSTOOD | OTHER_LISTS or name.startswith(ENCODER_KEYS):
        return
    lengths = (layers.n_layers, layers.n_layers + layers.n_behind)
    if SPEAKS_OF_LAYERS.search(name) or (header.is_list(key) and found.count in lengths):
        raise header.wrong(key, "may speak of single layers, and layercut does not know how")


def _sizes(layers: GgufLayers, plan: PruningPlan) -> dict[str, bytes]:
    """The records that tell the number of parameters, where there are any."""
    header = layers.header
    numel = {n: t.nbytes and _numel(t) for n, t in layers.tensors.items()}
    total, kept = sum(numel.values()), sum(numel[n] for n in new_names(layers, plan))
    records = {}
    key = "general.parameter_count"
    if key in header and header.count(key) == total:
        records[key] = _scalar(header, key, kept)
    key = "general.size_label"
    match = SIZE_LABEL.fullmatch(header.text(key)) if key in header else None
    if match is not None and total:
        label = _label(float(match[2]) * UNITS[match[3]] * kept / total)
        text = f"{match[1]}{label}{match[4] or ''}".encode()
        found = header.fields[key]
        head = found.record[: found.value_begin - found.begin]
        records[key] = head + struct.pack("<Q", len(text)) + text
    return records


def _numel(tensor: GgufTensor) -> int:
    product = 1
    for size in tensor.shape:
        product *= size
    return product


def _label(n_parameters: float) -> str:
    """A number of parameters as converters write it: 135M, 1.5B, 70B."""
    for unit, size in reversed(UNITS.items()):
        if n_parameters >= size:
            scaled = n_parameters / size
            return f"{scaled:.1f}{unit}" if scaled < 10 and unit in "BT" else f"{scaled:.0f}{unit}"
    return f"{n_parameters / UNITS['K']:.0f}K"
