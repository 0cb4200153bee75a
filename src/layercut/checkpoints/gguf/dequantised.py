"""Tensors of GGUF files in the layout of transformers, made one at a time when written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from layercut.checkpoints.gguf.header import GgufTensor
from layercut.checkpoints.gguf.keys import ORIGINAL
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.safetensors_file import shrunk_file_error
from layercut.errors import ModelError

Weights = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Dequantised:
    """One tensor of the checkpoint, made of (a part of) one of the GGUF file while it is written.

    Attributes:
        source: where the file keeps it.
        shape: of the result, float32.
        expert: which entry of the source's slowest dimension this is; all of it if ``None``.
        n_heads: heads whose rotated pairs are taken apart; 0 for none.
        offset: what is taken off every number.
        transpose: whether the two dimensions change places.
    """

    source: GgufTensor
    shape: tuple[int, ...]
    expert: int | None = None
    n_heads: int = 0
    offset: float = 0.0
    transpose: bool = False

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return "F32"

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return 4 * math.prod(self.shape)

    def pieces(self) -> Iterator[memoryview]:
        """The result's bytes.

        Raises:
            ModelError: the file became shorter since its header was read.
        """
        yield np.ascontiguousarray(self.read()).reshape(-1).view(np.uint8).data

    def read(self) -> Weights:
        """The result.

        Raises:
            ModelError: the file became shorter since its header was read.
        """
        weight = self._dequantise()
        if self.n_heads:
            # (pair, 2) → (2, pair) in every head.
            width = math.prod(self.shape[1:])
            weight = weight.reshape(self.n_heads, -1, 2, width).swapaxes(1, 2)
        if self.transpose:
            weight = weight.reshape(self.shape[::-1]).T
        if self.offset:
            weight = weight - np.float32(self.offset)
        return weight.reshape(self.shape)

    def _dequantise(self) -> Weights:
        """The stored numbers, (rows, width of a row)."""
        from gguf import GGMLQuantizationType, dequantize  # an optional extra

        source = self.source
        rows = math.prod(source.shape[1:])
        nbytes, begin = source.nbytes, source.begin
        if self.expert is not None:
            rows, nbytes = rows // source.shape[-1], nbytes // source.shape[-1]
            begin += self.expert * nbytes
        stored = np.fromfile(source.path, np.uint8, nbytes, offset=begin)
        if stored.size != nbytes:
            raise shrunk_file_error(source.path)
        what = f"{source.path}: a tensor of {list(source.shape)} cannot be dequantised"
        with guard(what, ModelError, ORIGINAL):
            kind = GGMLQuantizationType(source.number)
            weight: Weights = dequantize(stored.reshape(rows, -1), kind)
        return weight


def zero_biases(contents: Mapping[str, Dequantised], raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """The biases that llama.cpp does without where transformers has all of a module or none.

    Adding zeros changes no number. Llama-derived models with biases of q, k and v alone are such.

    Args:
        contents: the file's tensors by their names in the checkpoint.
        raw: the configuration.
    """
    wanted = {"self_attn": raw.get("attention_bias"), "mlp": raw.get("mlp_bias")}
    biases = {}
    for name, content in contents.items():
        module, _, kind = name.rpartition(".")
        parent = module.split(".")[-2] if module.endswith("_proj") else ""
        if kind == "weight" and wanted.get(parent) and f"{module}.bias" not in contents:
            biases[f"{module}.bias"] = torch.zeros(content.shape[0])
    return biases
