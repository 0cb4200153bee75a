"""What the header of a GGUF file says: typed keys, and tensors by their place in the file."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layercut.errors import ModelError

STRING, ARRAY = 8, 9
SCALARS = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
"""Number of a value's type → its name and its letter in `struct`."""
NAMES = {number: name for number, (name, _) in SCALARS.items()} | {STRING: "string", ARRAY: "array"}
LETTERS = dict(SCALARS.values())
INTEGERS = frozenset({"uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"})
FLOATS = frozenset({"float32", "float64"})

TENSOR_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}
"""Number of a tensor's type → its name, the elements of a block and the bytes of one."""

_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GgufField:
    """One key of a header; its value is decoded when it is asked for.

    Attributes:
        kind: ``uint32``, ``string``, ``array`` …
        element: of an array, the kind of its entries; else empty.
        count: of an array, its entries; else 1.
        begin: first byte of the key's record, counted from the start of the file.
        value_begin: first byte of the value; of an array, of its first entry.
        end: one past the last byte.
    """

    kind: str
    element: str
    count: int
    begin: int
    value_begin: int
    end: int
    _header: bytes = field(repr=False, compare=False)

    @property
    def record(self) -> bytes:
        """The key's own bytes: name, type and value, as stored."""
        return self._header[self.begin : self.end]

    def decode(self) -> Any:
        """The value: a number, a truth, a text, or a list of one of these.

        Raises:
            UnicodeDecodeError: a text is not UTF-8.
        """
        kind = self.element or self.kind
        if kind == "string":
            values: list[Any] = self._texts()
        else:
            form = f"<{self.count}{LETTERS[kind]}"
            values = list(struct.unpack_from(form, self._header, self.value_begin))
        return values if self.element else values[0]

    def _texts(self) -> list[str]:
        texts, position = [], self.value_begin
        for _ in range(self.count):
            (length,) = _U64.unpack_from(self._header, position)
            position += 8
            texts.append(self._header[position : position + length].decode("utf-8"))
            position += length
        return texts


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a file.

    Attributes:
        path: the file.
        kind: its type: ``F32``, ``Q4_K``, ``IQ4_XS``, ``MXFP4`` …
        number: of that type in the file.
        shape: the fastest dimension first, as ggml orders it.
        begin: first byte, counted from the start of the file.
        nbytes: bytes without the padding behind it.
    """

    path: Path
    kind: str
    number: int
    shape: tuple[int, ...]
    begin: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What one file holds.

    Attributes:
        path: the file.
        version: of the format, 2 or 3.
        alignment: of the tensors' bytes.
        fields: key → where and what it is, in stored order.
        tensors: name → where and what it is, in the order of their descriptions.
        data_begin: first byte of the tensors' part.
    """

    path: Path
    version: int
    alignment: int
    fields: Mapping[str, GgufField]
    tensors: Mapping[str, GgufTensor]
    data_begin: int

    def __contains__(self, key: str) -> bool:
        """Whether a key is there."""
        return key in self.fields

    def text(self, key: str) -> str:
        """The text under ``key``.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        return str(self._value(key, {"string"}, "a text"))

    def count(self, key: str) -> int:
        """The number of things under ``key``: an integer that is not negative.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        number = int(self._value(key, INTEGERS, "a count"))
        if number < 0:
            raise self.wrong(key, f"is {number}, and must not be negative")
        return number

    def number(self, key: str) -> float:
        """The finite number under ``key``.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        number = float(self._value(key, INTEGERS | FLOATS, "a number"))
        if not math.isfinite(number):
            raise self.wrong(key, f"is {number}")
        return number

    def flag(self, key: str) -> bool:
        """Whether ``key`` is true.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        return bool(self._value(key, {"bool"}, "true or false"))

    def texts(self, key: str) -> list[str]:
        """The texts that ``key`` lists.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        return list(self._value(key, {"string"}, "a list of texts", listed=True))

    def counts(self, key: str) -> list[int]:
        """The integers that ``key`` lists; they may be negative.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        return list(self._value(key, INTEGERS, "a list of integers", listed=True))

    def numbers(self, key: str) -> list[float]:
        """The numbers that ``key`` lists.

        Raises:
            ModelError: the key is absent, or holds something else.
        """
        return list(self._value(key, INTEGERS | FLOATS, "a list of numbers", listed=True))

    def is_list(self, key: str) -> bool:
        """Whether ``key`` is there and holds a list."""
        return key in self.fields and self.fields[key].kind == "array"

    def wrong(self, key: str, why: str) -> ModelError:
        """What to raise when a key's value cannot be used."""
        return ModelError(
            f"{self.path}: the key {key!a} {why}. Use a GGUF file that llama.cpp's converter wrote."
        )

    def _value(
        self, key: str, kinds: frozenset[str] | set[str], what: str, *, listed: bool = False
    ) -> Any:
        if key not in self.fields:
            raise self.wrong(key, f"is absent, and {what} is needed there")
        found = self.fields[key]
        if (found.element or found.kind) not in kinds or (found.kind == "array") != listed:
            held = f"a list of {found.element}" if found.element else f"of type {found.kind}"
            raise self.wrong(key, f"is {held}, and should be {what}")
        try:
            return found.decode()
        except UnicodeDecodeError as error:
            raise self.wrong(key, "holds a text that is not UTF-8") from error
