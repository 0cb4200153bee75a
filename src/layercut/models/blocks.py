"""Parts of stored tensors that hold one block per layer, such as an embedding for each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import torch

from layercut.models.shards import COPY_BYTES, StoredTensor, copy_bytes


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """Some of the equal blocks that a stored tensor consists of along one dimension.

    Attributes:
        source: the whole tensor.
        dimension: along which the blocks lie.
        n_blocks: how many it has.
        kept: sorted indices of those that stay.
    """

    source: StoredTensor
    dimension: int
    n_blocks: int
    kept: tuple[int, ...]

    @property
    def dtype(self) -> str:
        """That of the whole tensor."""
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kept part."""
        shape = list(self.source.shape)
        shape[self.dimension] = shape[self.dimension] // self.n_blocks * len(self.kept)
        return tuple(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept part."""
        return self.source.nbytes // self.n_blocks * len(self.kept)

    def write_to(self, target: BinaryIO) -> None:
        """Append the kept part's bytes to an open file, a few rows at a time."""
        n_rows = math.prod(self.source.shape[: self.dimension])
        row = self.source.nbytes // n_rows
        block = row // self.n_blocks
        if n_rows == 1:
            for index in self.kept:
                copy_bytes(self.source.path, self.source.begin + index * block, block, target)
            return
        n_at_once = max(1, COPY_BYTES // row)
        with self.source.path.open("rb") as file:
            file.seek(self.source.begin)
            for start in range(0, n_rows, n_at_once):
                n_read = min(n_at_once, n_rows - start)
                rows = torch.frombuffer(bytearray(file.read(n_read * row)), dtype=torch.uint8)
                kept = rows.view(n_read, self.n_blocks, block)[:, list(self.kept)]
                target.write(kept.contiguous().numpy().data)
