"""One decision as two files: its tensors, and then a record without which they do not count.

A record is a line with the sha256 of what follows, and JSON; the tensors are a safetensors file
whose sha256 the record names. Both appear whole, under their names, once the disk has them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layercut.checkpoints.safetensors_file import read_shard, read_tensor
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import ModelError

RECORD, TENSORS, PARTIAL = ".record", ".safetensors", ".partial"


@dataclass(frozen=True, slots=True)
class Record:
    """What a record file says.

    Attributes:
        key: scope, kind and item of the decision.
        machine: where it was computed.
        values: of the decision.
        warnings: what was said while it was computed.
        tensors: name → device, and whether the transposed matrix is stored.
        digest: sha256 of the tensors' file; empty without tensors.
    """

    key: tuple[str, str, int | str]
    machine: Mapping[str, Any]
    values: Mapping[str, Any]
    warnings: list[str]
    tensors: dict[str, tuple[str, bool]]
    digest: str


def write_record(
    stem: Path,
    key: tuple[str, str, int | str],
    machine: Mapping[str, Any],
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    warnings: list[str],
) -> Record:
    """Write a decision, to the disk and through its caches.

    Args:
        stem: the files' path without their endings; files that are there are replaced.
        key: of the decision.
        machine: where it was computed.
        values: what JSON can hold.
        tensors: matrices and vectors of floating-point numbers.
        warnings: what was said while it was computed.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """
    places = {name: (str(t.device), _is_transposed(t)) for name, t in tensors.items()}
    digest = ""
    if tensors:
        stored = [(n, t.T if places[n][1] else t) for n, t in tensors.items()]
        path = stem.with_name(stem.name + TENSORS)
        _write_whole(path, lambda partial: write_shard(partial, stored, None))
        digest = _hash_file(path)
    record = Record(key, machine, values, warnings, places, digest)
    body = json.dumps(
        {name: getattr(record, name) for name in Record.__slots__}, ensure_ascii=False
    )
    text = f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}\n"
    path = stem.with_name(stem.name + RECORD)
    write_whole_text(path, text)
    return record


def read_record(stem: Path) -> Record | None:
    """The record, or ``None`` if it is not there or damaged; the tensors are not read."""
    try:
        content = stem.with_name(stem.name + RECORD).read_bytes()
    except FileNotFoundError:
        return None
    digest, _, rest = content.partition(b"\n")
    body = rest.removesuffix(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    fields = json.loads(body)
    scope, kind, item = fields.pop("key")
    places = {name: (device, turned) for name, (device, turned) in fields.pop("tensors").items()}
    return Record(key=(scope, kind, item), tensors=places, **fields)


def read_record_tensors(stem: Path, record: Record) -> dict[str, Tensor] | None:
    """The tensors as they were recorded, or ``None`` if their file is damaged or gone.

    Order, device, type and memory layout are the same, so that products with them have the same
    bits.
    """
    path = stem.with_name(stem.name + TENSORS)
    if not record.tensors:
        return {}
    try:
        if _hash_file(path) != record.digest:
            return None
        stored = read_shard(path).tensors
        tensors = {}
        for name, (device, transposed) in record.tensors.items():
            # A copy has the alignment that torch gives its own tensors: sums may depend on it.
            tensor = read_tensor(stored[name]).clone().to(torch.device(device))
            tensors[name] = tensor.T if transposed else tensor
    except (OSError, ModelError):
        return None
    return tensors


def remove_record(stem: Path) -> None:
    """Remove a decision: the record first, without which the tensors do not count."""
    for ending in (RECORD, TENSORS):
        stem.with_name(stem.name + ending).unlink(missing_ok=True)


def write_whole_text(path: Path, text: str) -> None:
    """Write a file that appears whole, and is there for good when this returns.

    Raises:
        OSError: the disk is full, or the folder cannot be written to.
    """

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    _write_whole(path, write)
    _sync(path.parent)


def _is_transposed(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous()


def _write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file beside ``path``, which takes its place once the disk has it."""
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        write(partial)
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
