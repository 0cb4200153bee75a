"""Parts of stored tensors that hold one block per layer, such as an embedding for each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from layercut.models.layout import Layout
from layercut.models.shards import COPY_BYTES, Content, StoredTensor, read_blocks, shrunk
from layercut.types import PruningPlan


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

    def pieces(self) -> Iterator[memoryview]:
        """The kept part's bytes, a few rows at a time.

        Raises:
            ModelError: the file became shorter since its header was read.
        """
        n_rows = math.prod(self.source.shape[: self.dimension])
        row = self.source.nbytes // n_rows
        block = row // self.n_blocks
        if n_rows == 1:
            for index in self.kept:
                yield from read_blocks(self.source.path, self.source.begin + index * block, block)
            return
        n_at_once = max(1, COPY_BYTES // row)
        with self.source.path.open("rb") as file:
            file.seek(self.source.begin)
            for start in range(0, n_rows, n_at_once):
                n_read = min(n_at_once, n_rows - start)
                content = bytearray(n_read * row)
                if file.readinto(content) != len(content):
                    raise shrunk(self.source.path)
                rows = torch.frombuffer(content, dtype=torch.uint8)
                kept = rows.view(n_read, self.n_blocks, block)[:, list(self.kept)]
                yield kept.reshape(-1).numpy().data


def kept_part(layout: Layout, plan: PruningPlan, name: str, stored: StoredTensor) -> Content:
    """A stored tensor; of one that holds a block per layer, the kept layers' blocks."""
    dimension = layout.slice_dimension(name)
    if dimension is None:
        return stored
    return StoredBlocks(stored, dimension, plan.n_layers, plan.kept)
