"""GGUF files put together byte by byte, so that their headers may claim anything."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layercut.checkpoints.gguf.header import TENSOR_TYPES

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMS = dict(
    zip((U8, I8, U16, I16, U32, I32, F32, BOOL, U64, I64, F64), "BbHhIif?Qqd", strict=True)
)


def text(value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(content)) + content


def value(kind: int, content: object) -> bytes:
    return (
        text(content)
        if isinstance(content, str | bytes)
        else struct.pack(f"<{FORMS[kind]}", content)
    )


def key(name: str | bytes, kind: int, content: object) -> bytes:
    return text(name) + struct.pack("<I", kind) + value(kind, content)


def listed(
    name: str | bytes, kind: int, contents: Sequence[object], claim: int | None = None
) -> bytes:
    count = len(contents) if claim is None else claim
    head = text(name) + struct.pack("<IIQ", ARRAY, kind, count)
    return head + b"".join(value(kind, content) for content in contents)


@dataclass
class Tensor:
    name: str | bytes
    shape: tuple[int, ...] = (4,)
    kind: int = 0
    offset: int = 0

    @property
    def record(self) -> bytes:
        sizes = struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *self.shape)
        return text(self.name) + sizes + struct.pack("<IQ", self.kind, self.offset)


def model_keys(family: str = "llama", n_blocks: int = 2) -> list[bytes]:
    """What every language model names, and a tokenizer of three tokens."""
    return [
        key("general.architecture", STRING, family),
        key(f"{family}.block_count", U32, n_blocks),
        key("tokenizer.ggml.model", STRING, "gpt2"),
        key("tokenizer.ggml.pre", STRING, "gpt-2"),
        listed("tokenizer.ggml.tokens", STRING, ["a", "b", "ab"]),
        listed("tokenizer.ggml.token_type", I32, [1, 1, 1]),
        listed("tokenizer.ggml.merges", STRING, ["a b"]),
        key("tokenizer.ggml.eos_token_id", U32, 2),
    ]


def gguf_bytes(
    keys: Sequence[bytes] = (),
    tensors: Sequence[Tensor] = (),
    *,
    data: int | bytes = 0,
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of these records, ``data`` bytes of tensors behind them."""
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(keys) if n_keys is None else n_keys,
    )
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys)
    header += b"".join(tensor.record for tensor in tensors)
    return header + bytes(-len(header) % alignment) + bytes(data)


def write_toy(
    path: Path,
    family: str = "llama",
    *,
    kind: str = "Q8_0",
    n_blocks: int = 6,
    keys: Sequence[bytes] = (),
    extra: Sequence[str] = (),
    missing: Sequence[int] = (),
    alignment: int = 32,
) -> Path:
    """A model of random bytes: two matrices of ``kind`` in each block and what surrounds them.

    Args:
        path: the new file.
        family: ``general.architecture``.
        kind: of the matrices.
        n_blocks: ``block_count``.
        keys: further records.
        extra: names of further tensors.
        missing: blocks without tensors.
        alignment: of the tensors.
    """
    number = next(n for n, entry in TENSOR_TYPES.items() if entry[0] == kind)
    shapes: dict[str, tuple[tuple[int, ...], int]] = {"token_embd.weight": ((256, 3), number)}
    for block in (b for b in range(n_blocks) if b not in missing):
        shapes[f"blk.{block}.attn_norm.weight"] = ((256,), 0)
        shapes[f"blk.{block}.attn_q.weight"] = ((256, 4), number)
        shapes[f"blk.{block}.ffn_down.weight"] = ((256, 2), number)
    shapes |= dict.fromkeys(("output_norm.weight", *extra), ((5,), 0))
    generator, data, tensors = random.Random(f"{family}{kind}"), b"", []
    for name, (shape, type_number) in shapes.items():
        _, block_size, width = TENSOR_TYPES[type_number]
        tensors.append(Tensor(name, shape, type_number, len(data)))
        data += generator.randbytes(math.prod(shape) // block_size * width)
        data += bytes(-len(data) % alignment)
    if alignment != 32:
        keys = [*keys, key("general.alignment", U32, alignment)]
    records = [*model_keys(family, n_blocks), *keys]
    path.write_bytes(gguf_bytes(records, tensors, data=data, alignment=alignment))
    return path
