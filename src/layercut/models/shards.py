"""safetensors files as bytes: which there are, and what is stored where.

A file is 8 bytes of header length (little endian), a JSON header padded with spaces to 8 bytes,
then the tensors' bytes without holes. The header is checked whole before anything is read.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import torch
from torch import Tensor

from layercut.errors import ModelError

if TYPE_CHECKING:
    from layercut.models.blocks import StoredBlocks

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger length is a damaged or hostile file."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COPY_BYTES = 1 << 24
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
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


Content: TypeAlias = "StoredTensor | StoredBlocks | Tensor"
"""What `write_shard` can put into a file."""


def check_plain_file(path: Path) -> None:
    """Refuse what is not a regular file (links to one are fine), before opening could block.

    Raises:
        ModelError: missing, a folder, a pipe, a socket, a device, or a git-lfs pointer.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}). Download the checkpoint again."
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ModelError(f"{path} is {kind} where a file is meant. Download the checkpoint again.")
    with _open(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` there."
            )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        ModelError: there are none, only pickles, two layouts at once, or the index names files
            that are missing or outside of the folder.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.exists():
        names = _indexed_files(index)
        # Some programs write an index for a single file, too.
        if single.exists() and names != [SINGLE_FILE]:
            raise ModelError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}, and one of them is stale. "
                "Delete the one that does not belong to this checkpoint."
            )
        return tuple(_existing(index, name) for name in names)
    if single.exists():
        return (single,)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds only pickle weights ({pickles[0]}), which can run code when opened. "
            "Use a checkpoint with .safetensors files."
        )
    raise ModelError(
        f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}. "
        "Download the checkpoint again."
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that must hold an object.

    Raises:
        ModelError: it cannot be read, is not JSON, or is something else than an object.
    """
    check_plain_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON ({error}). Download the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object. Download the checkpoint again.")
    return content


def read_shard(path: Path) -> Shard:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        ModelError: the file is damaged, or holds a type that the format does not know.
    """
    check_plain_file(path)
    size = path.stat().st_size
    with _open(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise _damaged(path, f"{size} bytes cannot hold a header of {length} bytes")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", None)
        tensors = {name: _entry(path, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, "its header does not follow the format") from error
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected = 8 + length
    for name, tensor in ordered.items():
        n_bytes = math.prod(tensor.shape) * BITS[tensor.dtype] // 8
        if tensor.begin != expected or tensor.nbytes != n_bytes:
            raise _damaged(path, f"the bytes of {name} are not where they should be")
        expected = tensor.end
    if expected != size:
        raise _damaged(path, f"it has {size} bytes, its header describes {expected}")
    return Shard(path, ordered, metadata)


def read_tensor(stored: StoredTensor) -> Tensor:
    """A stored tensor of one of ``DTYPES`` or ``TABLES``, decoded.

    Raises:
        ModelError: the file became shorter since its header was read.
    """
    content = bytearray(stored.nbytes)
    with stored.path.open("rb") as file:
        file.seek(stored.begin)
        if file.readinto(content) != stored.nbytes:
            raise shrunk(stored.path)
    dtype = (DTYPES | TABLES)[stored.dtype]
    if not content:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype).view(stored.shape)


def _indexed_files(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map. Download the checkpoint again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name in {"", ".", ".."} or any(c in name for c in "/\\\0"):
            raise ModelError(
                f"security: {index} names the file {name!r}, which is not a plain name inside the "
                "checkpoint's folder. Do not use this checkpoint."
            )
    return names


def _existing(index: Path, name: str) -> Path:
    path = index.parent / name
    if not path.exists():
        raise ModelError(
            f"{index.name} names {name}, which is missing from {index.parent}. "
            "Download the checkpoint again."
        )
    return path


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


def read_blocks(path: Path, begin: int, n_bytes: int) -> Iterator[memoryview]:
    """A part of a file, a block at a time.

    Raises:
        ModelError: the file became shorter since its header was read.
    """
    with path.open("rb") as file:
        file.seek(begin)
        while n_bytes:
            block = file.read(min(COPY_BYTES, n_bytes))
            if not block:
                raise shrunk(path)
            yield memoryview(block)
            n_bytes -= len(block)


def shrunk(path: Path) -> ModelError:
    """What to raise when a file ends before its header says."""
    return _damaged(path, "it became shorter while it was read")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}). Check the permissions of the file."
        ) from error


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is damaged or truncated: {why}. Download this file again.")
