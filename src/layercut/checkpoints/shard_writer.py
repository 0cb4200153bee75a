"""Writes safetensors files; stored tensors are copied by the kernel and never decoded."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layercut.checkpoints.safetensors_file import (
    COPY_BYTES,
    DTYPES,
    Content,
    StoredTensor,
    shrunk_file_error,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}


def write_shard(
    path: Path,
    entries: Sequence[tuple[str, Content]],
    metadata: dict[str, str] | None,
) -> None:
    """Write a safetensors file; stored tensors are copied byte for byte.

    The disk may still be behind: `staged_folder` waits for it once, after the last shard, so that
    it works while the next one is copied.

    Args:
        path: a new file.
        entries: names and contents in the order of the file.
        metadata: ``__metadata__`` of the header.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name, content in entries:
        n_bytes = content.nbytes
        header[name] = {
            "dtype": _NAMES[content.dtype] if isinstance(content, Tensor) else content.dtype,
            "shape": list(content.shape),
            "data_offsets": [position, position + n_bytes],
        }
        position += n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    # Unbuffered: the kernel moves most bytes behind Python's back.
    with path.open("xb", buffering=0) as file:
        write_bytes(file, memoryview(len(text).to_bytes(8, "little") + text))
        for _, content in entries:
            if isinstance(content, Tensor):
                write_bytes(file, view_bytes(content))
            elif isinstance(content, StoredTensor):
                copy_bytes(content.path, content.begin, content.end, file)
            else:
                for piece in content.pieces():
                    write_bytes(file, piece)


def view_bytes(tensor: Tensor) -> memoryview:
    """The bytes by which a tensor is stored."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def copy_bytes(path: Path, begin: int, end: int, target: FileIO) -> None:
    """Append the bytes from ``begin`` to ``end`` of a file to ``target``, by the kernel if it can.

    Raises:
        ModelError: the file became shorter since its header was read.
        OSError: the disk is full.
    """
    with path.open("rb", buffering=0) as source:
        while begin < end:
            n_bytes = _copy_some(source, begin, end - begin, target)
            if not n_bytes:
                raise shrunk_file_error(path)
            begin += n_bytes


def _copy_some(source: FileIO, position: int, wanted: int, target: FileIO) -> int:
    """Append up to ``wanted`` bytes of ``source`` to ``target``; returns how many."""
    if hasattr(os, "copy_file_range"):
        try:
            return os.copy_file_range(source.fileno(), target.fileno(), wanted, position)
        except OSError as error:
            # Some file systems, and pairs of them, cannot copy within the kernel.
            if error.errno not in _NO_KERNEL_COPY:
                raise
    source.seek(position)
    block = source.read(min(COPY_BYTES, wanted))
    write_bytes(target, memoryview(block))
    return len(block)


def write_bytes(file: FileIO, content: memoryview) -> None:
    """Write all of ``content``; one call of the system may take less."""
    while content:
        content = content[file.write(content) :]
