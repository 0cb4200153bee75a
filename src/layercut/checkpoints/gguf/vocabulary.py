"""What a GGUF file says of its tokenizer, with what llama.cpp takes where a key is missing.

The defaults and the lists of names are those of llama.cpp's src/llama-vocab.cpp: files are made to
run there, so an absent key means what it means there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercut.checkpoints.gguf.keys import ORIGINAL
from layercut.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""GGUF's token types."""
SENTENCEPIECE, BYTE_LEVEL = "llama", "gpt2"
"""``tokenizer.ggml.model``: pieces merged by score, and byte-level BPE."""
LEADING_BY_DEFAULT = frozenset(
    {"llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"}
    | {"jina-v5-nano", "tekken", "chameleon"}
)
"""``tokenizer.ggml.pre`` of byte-level tokenizers that add their leading token unasked."""
ROLES = {
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "mask_token": "mask",
}
SENTENCEPIECE_IDS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}
"""What the roles are where a sentencepiece vocabulary does not say."""
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
END_TOKENS = frozenset(
    {"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>"}
    | {"<EOT>", "_<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>"}
)
"""Tokens that end an answer by their name, and are control tokens whatever their type says."""
FILL_TOKENS = frozenset(
    {"<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|fim_repo|>"}
    | {"<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<reponame>"}
    | {"<fim-prefix>", "<fim-suffix>", "<fim-middle>", "<fim-pad>", "<fim-repo>"}
    | {"<PRE>", "<SUF>", "<MID>", "<PAD>", "<REPO>", "<|repo_name|>", "<|file_sep|>"}
    | {"▁<PRE>", "▁<SUF>", "▁<MID>"}
)
"""Tokens of fill-in-the-middle prompts, which are control tokens by their name, too."""
INFORMATIONAL = frozenset(
    {f"ggml.{name}_token_id" for name in ("seperator", "separator", "cls", "prefix", "suffix")}
    | {f"ggml.{name}_token_id" for name in ("middle", "fsep", "eot", "eom")}
    | {f"ggml.fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")}
    # The separator is only put between the parts of encoders' inputs.
    | {"ggml.add_sep_token", "ggml.token_type_count", "ggml.eos_token_ids", "chat_templates"}
)
"""Keys below ``tokenizer.`` that do not change how text is encoded."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A file's tokens and how they are used.

    Attributes:
        path: the file, for messages.
        model: ``tokenizer.ggml.model``.
        pre: ``tokenizer.ggml.pre``; empty if it is missing.
        tokens: by id.
        types: by id.
        scores: by id; empty if there are none.
        merges: pairs in the order of their rank; empty if there are none.
        ids: id of each role that is taken.
        ends: ids that end an answer, the first is the ``eos_token``'s.
        add_bos: whether encoding puts the ``bos_token`` in front.
        add_eos: whether it puts the ``eos_token`` behind.
        space_prefix: whether a space goes in front of text.
        strips_right: whether special tokens take the spaces behind them away.
        templates: chat templates by name.
        own_json: a ``tokenizer.json`` that the file carries; empty if there is none.
    """

    path: Path
    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[tuple[str, str], ...]
    ids: Mapping[str, int]
    ends: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    strips_right: bool
    templates: Mapping[str, str]
    own_json: str

    @property
    def special(self) -> tuple[str, ...]:
        """Control and unknown tokens, which are matched whole and do not appear in text."""
        return tuple(
            token
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind in {CONTROL, UNKNOWN} or token in END_TOKENS or token in FILL_TOKENS
        )

    @property
    def user_defined(self) -> tuple[str, ...]:
        """Tokens of ordinary text that are matched whole, before anything is split."""
        special = set(self.special)
        return tuple(
            token
            for token, kind in zip(self.tokens, self.types, strict=True)
            if kind == USER_DEFINED and token not in special
        )


def read_vocabulary(path: Path, values: Mapping[str, Any]) -> Vocabulary:
    """What the keys below ``tokenizer.`` say.

    Raises:
        ModelError: naming a key that is missing, contradicts another or is not known.
    """
    keys = {
        k.removeprefix("tokenizer."): v for k, v in values.items() if k.startswith("tokenizer.")
    }
    reader = _Reader(path, keys)
    model = reader.take("ggml.model", str, "")
    if not model or model in {"none", "no_vocab"}:
        raise ModelError(f"{path} holds no tokenizer. {ORIGINAL}")
    pre = reader.take("ggml.pre", str, "")
    tokens = _name_empty(reader.take("ggml.tokens", list, []))
    types = reader.take("ggml.token_type", list, [])
    scores = reader.take("ggml.scores", list, [])
    _check_tokens(path, tokens, types, scores)
    ids = _role_ids(reader, model, len(tokens))
    ends = [reader.take(f"ggml.{key}", int, None) for key in END_KEYS]
    by_name = [i for i, token in enumerate(tokens) if token in END_TOKENS]
    vocabulary = Vocabulary(
        path=path,
        model=model,
        pre=pre,
        tokens=tuple(tokens),
        types=tuple(types),
        scores=tuple(scores[: len(tokens)]),
        merges=tuple(_pair(path, merge) for merge in reader.take("ggml.merges", list, [])),
        ids=ids,
        ends=tuple(
            dict.fromkeys(
                i
                for i in (ids.get("eos_token"), *ends, *by_name)
                if i is not None and 0 <= i < len(tokens)
            )
        ),
        add_bos=reader.take(
            "ggml.add_bos_token", bool, model == SENTENCEPIECE or pre in LEADING_BY_DEFAULT
        ),
        add_eos=reader.take("ggml.add_eos_token", bool, False),
        space_prefix=reader.take("ggml.add_space_prefix", bool, model == SENTENCEPIECE),
        strips_right=any(n in str(values.get("general.name")).lower() for n in ("phi-3", "phi3")),
        templates=_templates(reader),
        own_json=reader.take("huggingface.json", str, ""),
    )
    reader.check_all_read(model)
    for wanted, role in ((vocabulary.add_bos, "bos_token"), (vocabulary.add_eos, "eos_token")):
        if wanted and role not in ids:
            raise ModelError(f"{path} adds a {role} to text and does not name it. {ORIGINAL}")
    return vocabulary


class _Reader:
    """The keys below ``tokenizer.``, each read once."""

    def __init__(self, path: Path, keys: Mapping[str, Any]) -> None:
        self.path, self.keys = path, keys
        self.read: set[str] = set()

    def take(self, key: str, kind: type, default: Any) -> Any:
        self.read.add(key)
        value = self.keys.get(key, default)
        if value is not default and (
            not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        ):
            raise ModelError(
                f"{self.path}: tokenizer.{key} holds {type(value).__name__} where "
                f"{kind.__name__} is meant. {ORIGINAL}"
            )
        return value

    def check_all_read(self, model: str) -> None:
        for key, value in self.keys.items():
            # Only unigram models remove them.
            neutral = key == "ggml.remove_extra_whitespaces" and (
                value is False or model in {BYTE_LEVEL, SENTENCEPIECE}
            )
            if key not in self.read and key not in INFORMATIONAL and not neutral:
                raise ModelError(
                    f"{self.path} sets tokenizer.{key}, which layercut does not know. {ORIGINAL}"
                )


def _name_empty(tokens: list[Any]) -> list[Any]:
    return [f"[EMPTY_{i}]" if token == "" else token for i, token in enumerate(tokens)]


def _check_tokens(path: Path, tokens: list[Any], types: list[Any], scores: list[Any]) -> None:
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise ModelError(f"{path} holds a tokenizer without tokens. {ORIGINAL}")
    if len(set(tokens)) != len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))  # type: ignore[func-returns-value]
        raise ModelError(f"{path} holds the token {twice!r} twice. {ORIGINAL}")
    if len(types) != len(tokens) or not all(isinstance(kind, int) for kind in types):
        raise ModelError(
            f"{path} holds {len(tokens)} tokens and tokenizer.ggml.token_type for {len(types)}: "
            f"which of them are control tokens is not known. {ORIGINAL}"
        )
    if scores and len(scores) < len(tokens):
        raise ModelError(f"{path} holds {len(tokens)} tokens and {len(scores)} scores. {ORIGINAL}")


def _role_ids(reader: _Reader, model: str, n_tokens: int) -> dict[str, int]:
    ids: dict[str, int] = {}
    for role, key in ROLES.items():
        default = SENTENCEPIECE_IDS.get(role) if model == SENTENCEPIECE else None
        index = reader.take(f"ggml.{key}_token_id", int, default)
        # -1, or as an unsigned number, is how some programs write that there is none.
        if index is not None and index not in {-1, 0xFFFFFFFF}:
            if not 0 <= index < n_tokens:
                raise ModelError(
                    f"{reader.path}: tokenizer.ggml.{key}_token_id is {index}, and there are "
                    f"{n_tokens} tokens. {ORIGINAL}"
                )
            ids[role] = index
    return ids


def _templates(reader: _Reader) -> dict[str, str]:
    named = [key for key in reader.keys if key.startswith("chat_template.")]
    templates = {key.removeprefix("chat_template."): reader.take(key, str, "") for key in named}
    if default := reader.take("chat_template", str, ""):
        templates["default"] = default
    return templates


def _pair(path: Path, merge: Any) -> tuple[str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else ("", "", "")
    if not left or not right or " " in right:
        raise ModelError(f"{path}: {merge!r} is no merge of two tokens. {ORIGINAL}")
    return left, right
