"""Writes the GGUF file that a plan leaves of another one, and compares the two.

Tensors are copied byte for byte, of whatever type, and so is every key that does not change.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from layercut.checkpoints.gguf.file import MAGIC, read_gguf
from layercut.checkpoints.gguf.header import GgufHeader, GgufTensor
from layercut.checkpoints.safetensors_file import read_chunks
from layercut.checkpoints.shard_writer import copy_bytes, write_bytes
from layercut.errors import ModelError, VerificationError

REMEDY = "Nothing was saved; please report this."


@dataclass(frozen=True, slots=True)
class GgufContent:
    """What a new file is to hold.

    Attributes:
        version: of the format.
        alignment: of the tensors' bytes.
        records: key → its bytes, in order.
        tensors: new name → tensor to copy, in order.
    """

    version: int
    alignment: int
    records: Mapping[str, bytes]
    tensors: Mapping[str, GgufTensor]

    def head(self) -> bytes:
        """Everything before the tensors' bytes, the padding included."""
        counts = struct.pack("<IQQ", self.version, len(self.tensors), len(self.records))
        head = bytearray(MAGIC + counts + b"".join(self.records.values()))
        offset = 0
        for name, tensor in self.tensors.items():
            text, sizes = name.encode(), tensor.shape
            head += struct.pack("<Q", len(text)) + text
            head += struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
            head += struct.pack("<IQ", tensor.number, offset)
            offset += self.padded(tensor.nbytes)
        return bytes(head) + bytes(-len(head) % self.alignment)

    def padded(self, n_bytes: int) -> int:
        """The next multiple of the alignment."""
        return -(-n_bytes // self.alignment) * self.alignment

    @property
    def nbytes(self) -> int:
        """The size of the whole file."""
        return len(self.head()) + sum(self.padded(t.nbytes) for t in self.tensors.values())


def write_gguf(path: Path, content: GgufContent) -> None:
    """Write a new file.

    Raises:
        ModelError: a source became shorter since its header was read.
        OSError: the disk is full, or the file cannot be written.
    """
    # Unbuffered: the kernel moves most bytes behind Python's back.
    with path.open("xb", buffering=0) as file:
        write_bytes(file, memoryview(content.head()))
        for tensor in content.tensors.values():
            copy_bytes(tensor.path, tensor.begin, tensor.begin + tensor.nbytes, file)
            _pad(file, content.padded(tensor.nbytes) - tensor.nbytes)


def verify_gguf(path: Path, content: GgufContent) -> int:
    """Read a written file again and compare every key and every tensor's sha256.

    Returns:
        How many tensors were compared.

    Raises:
        VerificationError: a key or a tensor is missing, surplus or different.
    """
    try:
        header = read_gguf(path)
    except ModelError as error:
        raise VerificationError(f"the written file cannot be read: {error} {REMEDY}") from error
    _verify_header(header, content)
    for name, tensor in content.tensors.items():
        written = header.tensors[name]
        if (written.kind, written.shape) != (tensor.kind, tensor.shape):
            raise VerificationError(f"{name} was written in another type or shape. {REMEDY}")
        if _sha256(written) != _sha256(tensor):
            raise VerificationError(f"the sha256 of {name} changed while it was written. {REMEDY}")
    return len(header.tensors)


def _verify_header(header: GgufHeader, content: GgufContent) -> None:
    records = {key: field.record for key, field in header.fields.items()}
    same = list(records) == list(content.records) and records == dict(content.records)
    if not same or (header.version, header.alignment) != (content.version, content.alignment):
        raise VerificationError(f"the keys of the written file are not those meant. {REMEDY}")
    if list(header.tensors) != list(content.tensors):
        raise VerificationError(f"the tensors of the written file are not those meant. {REMEDY}")


def _sha256(tensor: GgufTensor) -> str:
    total = hashlib.sha256()
    for piece in read_chunks(tensor.path, tensor.begin, tensor.nbytes):
        total.update(piece)
    return total.hexdigest()


def _pad(file: FileIO, n_bytes: int) -> None:
    if n_bytes:
        write_bytes(file, memoryview(bytes(n_bytes)))
