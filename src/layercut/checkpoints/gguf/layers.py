"""Where a GGUF file has its layers, and whether every tensor belongs where its name says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layercut.checkpoints.gguf.header import GgufHeader, GgufTensor
from layercut.checkpoints.gguf.model import ARCHITECTURE
from layercut.checkpoints.gguf.rules import RULES, GgufRules
from layercut.errors import ModelError

BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.")
ENCODERS = ("v.", "a.", "mm.")
"""How tensors of an encoder in the same file begin; its layers are not the decoder's."""
NAMED_LAYER = re.compile(r"(?:^|[^A-Za-z0-9])(?:blk|block|blocks|layer|layers|h)\.[0-9]")


@dataclass(frozen=True, slots=True)
class GgufLayers:
    """The layers of one model.

    Attributes:
        header: of its only file, or of its first part.
        tensors: name → tensor, of all parts, in stored order.
        family: ``general.architecture``.
        rules: that family's row.
        n_layers: layers of the decoder.
        n_behind: layers for multi-token prediction behind them.
    """

    header: GgufHeader
    tensors: Mapping[str, GgufTensor]
    family: str
    rules: GgufRules
    n_layers: int
    n_behind: int

    def key(self, name: str) -> str:
        """A key of the family by what stands behind the family's name."""
        return f"{self.family}.{name}"

    def count(self, name: str, default: int = 0) -> int:
        """The integer under a key of the family."""
        key = self.key(name)
        return self.header.count(key) if key in self.header else default


def find_layers(parts: Sequence[GgufHeader]) -> GgufLayers:
    """Where a model's layers are.

    Args:
        parts: the headers of its files, the first one in front.

    Raises:
        ModelError: the family is not known, a layer is missing, or a tensor belongs to none.
    """
    header = parts[0]
    family = header.text(ARCHITECTURE)
    if family not in RULES:
        raise ModelError(
            f"{header.path} is of the family '{family}', and what llama.cpp derives there from "
            "the layers' numbers was not checked. Prune the original checkpoint and convert that."
        )
    if why := RULES[family].refused:
        raise ModelError(
            f"{header.path}: no layer of '{family}' can be dropped from a GGUF file: {why}. "
            "Choose another model."
        )
    n_blocks = header.count(f"{family}.block_count")
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    key = f"{family}.nextn_predict_layers"
    n_behind = header.count(key) if key in header else 0
    if n_behind >= n_blocks:
        raise header.wrong(key, f"is {n_behind} of {n_blocks} blocks")
    layers = GgufLayers(header, tensors, family, RULES[family], n_blocks - n_behind, n_behind)
    _check_names(layers)
    return layers


def _check_names(layers: GgufLayers) -> None:
    header = layers.header
    found = set()
    n_blocks = layers.n_layers + layers.n_behind
    for name in layers.tensors:
        match = BLOCK.match(name)
        if match is None:
            if not name.startswith(ENCODERS) and (NAMED_LAYER.search(name) or "per_layer" in name):
                raise ModelError(
                    f"{header.path} holds {name}, which belongs to single layers in a way that "
                    "layercut does not know. Prune the original checkpoint and convert that."
                )
            continue
        found.add(int(match[1]))
    missing = set(range(layers.n_layers)) - found
    if missing or found - set(range(n_blocks)):
        what = f"lacks layer {min(missing)}" if missing else f"holds layer {max(found)}"
        raise ModelError(
            f"{header.path} says that it has {n_blocks} layers and {what}. "
            "Use a file whose keys belong to its tensors."
        )
