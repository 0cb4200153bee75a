"""safetensors files as bytes: what is stored where, and parts that hold one slice per layer.

A file is 8 bytes of header length (little endian), a JSON header padded with spaces to 8 bytes,
then the tensors' bytes without holes. The header is checked whole before anything is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from layercut.checkpoints.folder import check_plain_file, list_weight_files, open_file
from layercut.checkpoints.layout import Layout
from layercut.errors import ModelError
from layercut.types import PruningPlan

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger length is a damaged or hostile file."""


COPY_BYTES = 1 << 24


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""What weights are computed in; other types are copied."""


TABLES = {"BOOL": torch.bool, "I64": torch.int64}
"""What masks and tables are stored in; no quantisation packs weights into these."""


BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Every type that the format knows, and the bits of one element."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file.

    Attributes:
        path: the file.
        dtype: as the format spells it: ``F32``, ``BF16``, ``I32`` …
        shape: as the header gives it.
        begin: first byte, counted from the start of the file.
        end: one past the last byte.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file, by the name that torch gives them."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Shard:
    """The header of one file: its tensors by name, in stored order, and its ``__metadata__``."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str] | None


class Pieces(Protocol):
    """A tensor that is made while it is written."""

    @property
    def dtype(self) -> str:
        """As the format spells it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, in order."""


Content: TypeAlias = "StoredTensor | Pieces | Tensor"
"""What `write_shard` can put into a file."""


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        ModelError: the file is damaged, or holds a type that the format does not know.
    """
    check_plain_file(path)
    size = path.stat().st_size
    with open_file(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise damaged_file_error(path, f"{size} bytes cannot hold a header of {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None)
        if not all(isinstance(text, str) for text in (metadata or {}).values()):
            raise ValueError("metadata must be text")
        tensors = {name: _entry(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged_file_error(path, "its header does not follow the format") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected = 8 + length
    for name, tensor in ordered.items():
        n_bytes = math.prod(tensor.shape) * BITS[tensor.dtype] // 8
        if tensor.begin != expected or tensor.nbytes != n_bytes:
            raise damaged_file_error(path, f"the bytes of {name} are not where they should be")
        expected = tensor.end
    if expected != size:
        raise damaged_file_error(path, f"it has {size} bytes, its header describes {expected}")
    return Shard(path, ordered, metadata)


def read_stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from the headers alone.

    Raises:
        ModelError: a file is damaged, or two files hold the same tensor.
    """
    stored: dict[str, StoredTensor] = {}
    for path in list_weight_files(folder):
        tensors = read_shard(path).tensors
        twice = sorted(stored.keys() & tensors.keys())
        if twice:
            raise ModelError(
                f"{path} and {stored[twice[0]].path.name} both hold {twice[0]}. Remove the file "
                "that does not belong to this checkpoint."
            )
        stored |= tensors
    return stored


def read_tensor(stored: StoredTensor) -> Tensor:
    """A stored tensor of one of ``DTYPES`` or ``TABLES``, decoded.

    Raises:
        ModelError: the file became shorter since its header was read.
    """
    content = bytearray(stored.nbytes)
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        if file.readinto(content) != stored.nbytes:
            raise shrunk_file_error(stored.path)
    dtype = (DTYPES | TABLES)[stored.dtype]
    if not content:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(stored.shape)


def _entry(path: Path, entry: dict[str, Any], start: int) -> StoredTensor:
    if entry["dtype"] not in BITS:
        raise ModelError(
            f"{path} stores tensors as {entry['dtype']}, a type that layercut does not know. "
            "Use a checkpoint of another format."
        )
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError("sizes and offsets must be natural numbers")
    return StoredTensor(path, entry["dtype"], shape, start + begin, start + end)


def read_chunks(path: Path, begin: int, n_bytes: int) -> Iterator[memoryview]:
    """A part of a file, a block at a time.

    Raises:
        ModelError: the file became shorter since its header was read.
    """
    with path.open("rb") as file:
        file.seek(begin)
        while n_bytes:
            block = file.read(min(COPY_BYTES, n_bytes))
            if not block:
                raise shrunk_file_error(path)
            yield memoryview(block)
            n_bytes -= len(block)


def shrunk_file_error(path: Path) -> ModelError:
    """What to raise when a file ends before its header says."""
    return damaged_file_error(path, "it became shorter while it was read")


def damaged_file_error(path: Path, why: str) -> ModelError:
    """What to raise when a file's content does not follow the format."""
    return ModelError(f"{path} is damaged or truncated: {why}. Download this file again.")


@dataclass(frozen=True, slots=True)
class StoredSlices:
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
                yield from read_chunks(self.source.path, self.source.begin + index * block, block)
            return
        n_at_once = max(1, COPY_BYTES // row)
        with self.source.path.open("rb") as file:
            file.seek(self.source.begin)
            for start in range(0, n_rows, n_at_once):
                n_read = min(n_at_once, n_rows - start)
                content = bytearray(n_read * row)
                if file.readinto(content) != len(content):
                    raise shrunk_file_error(self.source.path)
                rows = torch.frombuffer(content, dtype=torch.uint8)
                kept = rows.view(n_read, self.n_blocks, block)[:, list(self.kept)]
                yield kept.reshape(-1).numpy().data


def keep_slices(layout: Layout, plan: PruningPlan, name: str, stored: StoredTensor) -> Content:
    """A stored tensor; of one that holds a block per layer, the kept layers' blocks."""
    dimension = layout.slice_dimension(name)
    if dimension is None:
        return stored
    return StoredSlices(stored, dimension, plan.n_layers, plan.kept)
