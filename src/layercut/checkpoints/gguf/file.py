"""GGUF files as bytes: which keys and tensors one holds, and where.

A file is 24 bytes (magic, version, two counts), keys with typed values, tensor descriptions, then
the tensors' bytes from the next multiple of the alignment on. All numbers are little endian. The
header is walked once with every length held against the file's size, so nothing that a damaged or
hostile header claims is allocated. The rules are those of llama.cpp's ggml/src/gguf.cpp.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from layercut.checkpoints.folder import check_plain_file, open_file
from layercut.checkpoints.gguf.header import (
    ARRAY,
    NAMES,
    SCALARS,
    STRING,
    TENSOR_TYPES,
    GgufField,
    GgufHeader,
    GgufTensor,
)
from layercut.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_HEADER_BYTES = 1 << 28
MAX_TEXTS = 1_200_000
"""Keys, tensors and listed texts of one header. The largest vocabularies have 800,000 texts, merges
included, and this many are still walked within a second."""
MAX_NUMBERS = 1 << 22
"""Entries of one list of numbers."""
MAX_KEY_BYTES = 1 << 16
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4

TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,127}")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of a GGUF file; no tensor is read.

    Raises:
        ModelError: the file is none, damaged, truncated, or of a version, byte order or type that
            layercut does not know.
    """
    check_plain_file(path)
    with open_file(path) as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(
                f"{path} is not a GGUF file: it does not begin with GGUF. "
                "Name a checkpoint's folder, or a .gguf file."
            )
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Walk(path, data).header()
        except (struct.error, OverflowError, UnicodeDecodeError, ValueError) as error:
            raise _damaged(path, "its header is cut short or is not one") from error


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is damaged or truncated: {why}. Download it again.")


class _Walk:
    """One pass over a header, from its first byte to its last."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = len(MAGIC)
        self.texts_left = MAX_TEXTS

    def header(self) -> GgufHeader:
        version = self._check_version(self._u32())
        n_tensors, n_keys = self._u64(), self._u64()
        self._spend(n_tensors, "tensors", 24)
        self._spend(n_keys, "keys", 13)
        spans: dict[str, tuple[str, str, int, int, int, int]] = {}
        for _ in range(n_keys):
            begin = self.position
            key = self._key(spans)
            spans[key] = (*self._span(key), begin)
        alignment = self._alignment(spans)
        described = [self._tensor() for _ in range(n_tensors)]
        header = self.data[: self.position]
        data_begin = -(-self.position // alignment) * alignment
        return GgufHeader(
            self.path,
            version,
            alignment,
            {
                key: GgufField(kind, element, count, begin, value_begin, end, header)
                for key, (kind, element, count, value_begin, end, begin) in spans.items()
            },
            self._place(described, data_begin, alignment),
            data_begin,
        )

    def _check_version(self, version: int) -> int:
        if version & 0xFFFF == 0:
            raise ModelError(
                f"{self.path} is a big-endian GGUF file, which layercut does not read. "
                "Convert it by gguf's gguf-convert-endian first."
            )
        if version not in VERSIONS:
            raise ModelError(
                f"{self.path} is of GGUF version {version}; layercut reads 2 and 3. "
                "Convert the model again with a current llama.cpp."
            )
        return version

    def _key(self, seen: Mapping[str, object]) -> str:
        name = self._string(MAX_KEY_BYTES)
        if not name or not name.isprintable():
            raise self._wrong(f"it has a key named {name[:80]!a}")
        if name in seen:
            raise self._wrong(f"it holds the key {name!a} twice")
        return name

    def _span(self, key: str) -> tuple[str, str, int, int, int]:
        """Kind, element, count, first byte and end of a value, which is stepped over."""
        number = self._u32()
        if number != ARRAY:
            begin = self.position
            self._step(number, 1, key)
            return NAMES[number], "", 1, begin, self.position
        element, count = self._u32(), self._u64()
        if element == ARRAY:
            raise self._wrong(f"the key {key!a} is a list of lists, which GGUF does not have")
        begin = self.position
        self._step(element, count, key)
        return NAMES[ARRAY], NAMES[element], count, begin, self.position

    def _step(self, number: int, count: int, key: str) -> None:
        if number == STRING:
            self._spend(count, f"texts in {key!a}", 8)
            position, data, unpack = self.position, self.data, _U64.unpack_from
            for _ in range(count):
                position += 8 + unpack(data, position)[0]
            self._move_to(position)
        elif number in SCALARS:
            width = struct.calcsize(f"<{SCALARS[number][1]}")
            self._check_count(count, f"numbers in {key!a}", width, MAX_NUMBERS)
            self._move_to(self.position + width * count)
        else:
            raise self._wrong(f"the key {key!a} is of type {number}, which GGUF does not have")

    def _alignment(self, spans: Mapping[str, tuple[str, str, int, int, int, int]]) -> int:
        if ALIGNMENT_KEY not in spans:
            return DEFAULT_ALIGNMENT
        kind, _, _, begin, _, _ = spans[ALIGNMENT_KEY]
        alignment = _U32.unpack_from(self.data, begin)[0] if kind == "uint32" else 0
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._wrong(f"its {ALIGNMENT_KEY} is not a power of two up to {MAX_ALIGNMENT:,}")
        return int(alignment)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int, int]:
        """Name, shape, type, bytes and offset of the next tensor."""
        name = self._string(MAX_KEY_BYTES)
        if not TENSOR_NAME.fullmatch(name):
            raise self._wrong(f"it has a tensor named {name[:80]!a}")
        n_dimensions = self._u32()
        if n_dimensions > MAX_DIMENSIONS:
            raise self._wrong(f"{name} has {n_dimensions} dimensions")
        shape = tuple(self._u64() for _ in range(n_dimensions))
        number, offset = self._u32(), self._u64()
        if number not in TENSOR_TYPES:
            raise ModelError(
                f"{self.path} stores {name} as type {number}, which layercut does not know. "
                "Use a file of another quantisation."
            )
        kind, block, width = TENSOR_TYPES[number]
        if (shape[0] if shape else 1) % block:
            raise self._wrong(f"the rows of {name} are not whole blocks of {kind}")
        return name, shape, number, math.prod(shape) // block * width, offset

    def _place(
        self,
        described: list[tuple[str, tuple[int, ...], int, int, int]],
        data_begin: int,
        alignment: int,
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for name, shape, number, nbytes, offset in described:
            if name in tensors:
                raise self._wrong(f"it holds the tensor {name} twice")
            if offset % alignment or data_begin + offset + nbytes > self.size:
                raise self._wrong(f"the bytes of {name} are not inside the file")
            kind = TENSOR_TYPES[number][0]
            begin = data_begin + offset
            tensors[name] = GgufTensor(self.path, kind, number, shape, begin, nbytes)
        end = data_begin
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].begin):
            if tensor.nbytes and tensor.begin < end:
                raise self._wrong(f"the bytes of {name} overlap another tensor's")
            end = max(end, tensor.begin + tensor.nbytes)
        return tensors

    def _spend(self, count: int, what: str, width: int) -> None:
        """Refuse more names and texts than the file could hold, or than any model has."""
        self._check_count(count, what, width, self.texts_left)
        self.texts_left -= count

    def _check_count(self, count: int, what: str, width: int, limit: int) -> None:
        if count * width > self.size - self.position:
            raise self._wrong(f"it claims {count:,} {what}, and has no room for them")
        if count > limit:
            raise self._wrong(f"it claims {count:,} {what}, more than any model has")

    def _move_to(self, position: int) -> None:
        if position > min(self.size, MAX_HEADER_BYTES):
            raise self._wrong("a value reaches beyond its header")
        self.position = position

    def _string(self, max_bytes: int) -> str:
        length = self._u64()
        if length > min(max_bytes, self.size - self.position):
            raise self._wrong(f"a name of it claims {length:,} bytes")
        text = self.data[self.position : self.position + length]
        self._move_to(self.position + length)
        return text.decode("utf-8")

    def _u32(self) -> int:
        (number,) = _U32.unpack_from(self.data, self.position)
        self._move_to(self.position + 4)
        return int(number)

    def _u64(self) -> int:
        (number,) = _U64.unpack_from(self.data, self.position)
        self._move_to(self.position + 8)
        return int(number)

    def _wrong(self, why: str) -> ModelError:
        return _damaged(self.path, why)
