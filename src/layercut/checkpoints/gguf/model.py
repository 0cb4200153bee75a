"""Whether a GGUF header describes a language model whose keys have the types that readers expect.

Keys are checked by their names' ends, so that one of a wrong type is named here and not by a
traceback of whatever reads it. A model that is split into several files is put together here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from layercut.checkpoints.gguf.file import read_gguf
from layercut.checkpoints.gguf.header import FLOATS, INTEGERS, GgufHeader
from layercut.errors import ModelError

ARCHITECTURE = "general.architecture"
PROJECTORS = frozenset({"clip", "mmproj"})
"""Architectures of files with an encoder of images or sound for a language model beside it."""
OTHER_TYPES = {
    "adapter": "an adapter",
    "imatrix": "an importance matrix",
    "mmproj": "a projector of images or sound (mmproj)",
    "projector": "a projector of images or sound (mmproj)",
    "vocab": "a vocabulary without a model",
}
"""``general.type`` of files that are no model → what they are."""
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
SPLIT_COUNT, SPLIT_NUMBER, SPLIT_TENSORS = "split.count", "split.no", "split.tensors.count"
MAX_PARTS = 999
TOKENIZER = "tokenizer.ggml."
TOKENS = f"{TOKENIZER}tokens"
NEEDS_MERGES = frozenset({"gpt2"})

TEXT, BOOL, WORDS = frozenset({"string"}), frozenset({"bool"}), frozenset({"int32", "uint32"})
ONE, LIST, EITHER = (False,), (True,), (False, True)
EXPECTED: tuple[tuple[re.Pattern[str], frozenset[str], tuple[bool, ...], str], ...] = tuple(
    (re.compile(pattern), kinds, listed, what)
    for pattern, kinds, listed, what in (
        (
            r".*\.(block_count|context_length|embedding_length|vocab_size|expert_count"
            r"|leading_dense_block_count|nextn_predict_layers|shared_kv_layers|sliding_window"
            r"|key_length(_swa)?|value_length(_swa)?|rope\.dimension_count(_swa)?)"
            r"|split\.(count|no|tensors\.count)",
            INTEGERS,
            ONE,
            "one integer",
        ),
        (
            r".*\.(feed_forward_length|expert_used_count|head_count|head_count_kv)"
            r"|tokenizer\.ggml\..*_token_ids?",
            INTEGERS,
            EITHER,
            "an integer, or a list of them",
        ),
        (
            r".*\.(layer_norm(_rms)?_epsilon|rope\.freq_base(_swa)?|rope\.scaling\.factor)",
            FLOATS | INTEGERS,
            ONE,
            "one number",
        ),
        (
            r".*\.rope\.scaling\.type|general\.(architecture|type|name)"
            r"|tokenizer\.(ggml\.(model|pre)|chat_template|huggingface\.json)",
            TEXT,
            ONE,
            "a text",
        ),
        (r"tokenizer\.ggml\.(tokens|merges)", TEXT, LIST, "a list of texts"),
        # Engines read these two by their width, without asking for their type.
        (r"tokenizer\.ggml\.token_type", WORDS, LIST, "a list of int32"),
        (r"tokenizer\.ggml\.scores", frozenset({"float32"}), LIST, "a list of float32"),
        (
            r"tokenizer\.ggml\.add_(bos_token|eos_token|sep_token|space_prefix)",
            BOOL,
            ONE,
            "true or false",
        ),
    )
)
"""Pattern of a key, the kinds and the forms that its value may have, and those in words."""


def read_language_model(path: Path) -> GgufHeader:
    """The header of a GGUF file that holds a language model, or the first part of one.

    Raises:
        ModelError: it is damaged, holds something else, or a key has a type that no reader expects.
    """
    header = read_gguf(path)
    for key, found in header.fields.items():
        for pattern, kinds, listed, what in EXPECTED:
            if not pattern.fullmatch(key):
                continue
            if (found.element or found.kind) not in kinds or header.is_list(key) not in listed:
                kind = f"a list of {found.element}" if found.element else found.kind
                raise header.wrong(key, f"is {kind}, and should be {what}")
    if SPLIT_NUMBER in header and header.count(SPLIT_NUMBER):
        raise ModelError(
            f"{path} is a later part of a model in several files. Name the first one, "
            "…-00001-of-….gguf."
        )
    family = header.text(ARCHITECTURE)
    kind = header.text("general.type") if "general.type" in header else "model"
    if family in PROJECTORS or kind in OTHER_TYPES:
        held = OTHER_TYPES["mmproj"] if family in PROJECTORS else OTHER_TYPES[kind]
        raise ModelError(f"{path} holds {held}. Name the file of the language model.")
    if not re.fullmatch(r"[A-Za-z0-9_.\-]{1,64}", family):
        raise header.wrong(ARCHITECTURE, f"names no family: {family[:80]!a}")
    if header.count(f"{family}.block_count") == 0:
        raise header.wrong(f"{family}.block_count", "is 0")
    _check_tokenizer(header)
    return header


def find_parts(header: GgufHeader) -> tuple[GgufHeader, ...]:
    """The headers of all files that a model consists of, the given first one in front.

    Raises:
        ModelError: a part is missing, misnamed, damaged, of another model, or holds a tensor again.
    """
    n_parts = header.count(SPLIT_COUNT) if SPLIT_COUNT in header else 1
    if n_parts <= 1:
        return (header,)
    path = header.path
    match = PART_NAME.fullmatch(path.name)
    if match is None or (int(match[2]), int(match[3])) != (1, n_parts) or n_parts > MAX_PARTS:
        raise ModelError(
            f"{path} is the first of {n_parts} parts, and its name does not end with "
            f"-00001-of-{n_parts:05}.gguf, by which the others are found. Rename the parts."
        )
    names = [f"{match[1]}-{i:05}-of-{n_parts:05}{path.suffix}" for i in range(2, n_parts + 1)]
    missing = [name for name in names if not path.with_name(name).exists()]
    if missing:
        raise ModelError(
            f"{path} is one of {n_parts} parts, and {missing[0]} is not beside it. "
            "Download the other parts into the same folder."
        )
    parts = (header, *(read_gguf(path.with_name(name)) for name in names))
    _check_parts(parts)
    return parts


def _check_parts(parts: Sequence[GgufHeader]) -> None:
    seen: set[str] = set()
    for number, part in enumerate(parts):
        if part.count(SPLIT_COUNT) != len(parts) or part.count(SPLIT_NUMBER) != number:
            raise ModelError(
                f"{part.path} says that it is part {part.count(SPLIT_NUMBER) + 1} of "
                f"{part.count(SPLIT_COUNT)}, and its name says {number + 1} of {len(parts)}. "
                "Restore the names that the parts were downloaded with."
            )
        if twice := seen & part.tensors.keys():
            raise ModelError(
                f"{part.path} holds {min(twice)}, which an earlier part holds, too. "
                "Use parts of one model."
            )
        seen |= part.tensors.keys()
    first = parts[0]
    if SPLIT_TENSORS in first and first.count(SPLIT_TENSORS) != len(seen):
        raise ModelError(
            f"{first.path} speaks of {first.count(SPLIT_TENSORS)} tensors, and its parts hold "
            f"{len(seen)}. Use parts of one model."
        )


def _check_tokenizer(header: GgufHeader) -> None:
    """Refuse a tokenizer without tokens or merges, or with lists that do not fit together."""
    if f"{TOKENIZER}model" not in header:
        return
    if TOKENS not in header or not header.fields[TOKENS].count:
        raise header.wrong(TOKENS, "is absent or empty, so the tokenizer has no tokens")
    if header.text(f"{TOKENIZER}model") in NEEDS_MERGES and f"{TOKENIZER}merges" not in header:
        raise header.wrong(f"{TOKENIZER}merges", "is absent, and this tokenizer merges by it")
    n_tokens = header.fields[TOKENS].count
    for name in ("token_type", "scores"):
        key = TOKENIZER + name
        if key in header and header.fields[key].count != n_tokens:
            raise header.wrong(
                key, f"has {header.fields[key].count:,} entries for {n_tokens:,} tokens"
            )


def check_token_ids(header: GgufHeader) -> None:
    """Refuse roles of tokens that the vocabulary does not have; llama.cpp ignores such a role.

    Raises:
        ModelError: a key ``tokenizer.ggml.…_token_id`` is beyond the vocabulary.
    """
    n_tokens = header.fields[TOKENS].count if TOKENS in header else 0
    for key in header.fields:
        if re.fullmatch(r"tokenizer\.ggml\..*_token_id", key) and not header.is_list(key):
            number = header.fields[key].decode()
            # Some converters write −1, or its unsigned twin, for "none".
            if not (0 <= number < n_tokens or number in (-1, 2**32 - 1)):
                raise header.wrong(key, f"is {number}, and there are {n_tokens:,} tokens")
