"""The tokenizer that a GGUF file describes, as llama.cpp runs it.

transformers' own reader leaves out how text is split, which tokens are matched whole and what is
put in front; a tokenizer that differs from the model's would be written into every pruned
checkpoint. What is built here was held against llama.cpp's own on texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from layercut.checkpoints.gguf.keys import ORIGINAL
from layercut.checkpoints.gguf.vocabulary import (
    BYTE,
    BYTE_LEVEL,
    NORMAL,
    SENTENCEPIECE,
    UNUSED,
    Vocabulary,
)
from layercut.checkpoints.hf_calls import guard, muted
from layercut.errors import ModelError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_WORDS}|\p{{N}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{{L}}\p{{N}}]?{u}*{l}+{s}|[^\r\n\p{{L}}\p{{N}}]?{u}+{l}*{s}"
_SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_CASED.format(u=_UPPER, l=_LOWER, s='')}|\p{{N}}|{_SLASH_REST}"
_GPT4O = (
    _CASED.format(u=_UPPER, l=_LOWER, s="(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
    + rf"|\p{{N}}{{1,3}}|{_SLASH_REST}"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "deepseek-coder": (
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        r"\p{N}",
    ),
    "mpt": (_GPT2,),
    "qwen35": (_QWEN35,),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
}
"""``tokenizer.ggml.pre`` → the expressions that split text before merging, one after the other.

llama.cpp's, where they are also those of the models' own tokenizer.json.
"""
COMPOSED = frozenset({"qwen2", "command-r"})
"""Whose text is normalised to composed characters first."""
WHOLE_PIECES = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
"""Which take a piece that is a token as it is, whatever its merges would make of it."""

SPACE = "▁"
"""How sentencepiece writes a space."""
KEEP_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})
"""Special tokens of Phi-3 that leave the spaces behind them alone."""


def build_tokenizer(vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """The tokenizer of a file.

    Raises:
        ModelError: its kind, or its way of splitting text, is not known.
    """
    builders = {BYTE_LEVEL: _byte_level, SENTENCEPIECE: _sentencepiece}
    if vocabulary.model not in builders:
        raise ModelError(
            f"{vocabulary.path} holds a tokenizer of the kind '{vocabulary.model}', which layercut "
            f"does not know (known: {', '.join(builders)}). {ORIGINAL}"
        )
    what = f"the tokenizer in {vocabulary.path} cannot be converted"
    with guard(what, ModelError, ORIGINAL), muted():
        backend = _own(vocabulary) or builders[vocabulary.model](vocabulary)
        return _complete(backend, vocabulary)


def _complete(backend: Tokenizer, vocabulary: Vocabulary) -> PreTrainedTokenizerFast:
    """With the tokens that are matched whole, and those around a text."""
    special = vocabulary.special
    for tokens, is_special in ((special, True), (vocabulary.user_defined, False)):
        backend.add_tokens([_added(vocabulary, token, is_special) for token in tokens])
    _add_ends(backend, vocabulary)
    roles = {role: vocabulary.tokens[i] for role, i in vocabulary.ids.items()}
    templates: Any = vocabulary.templates
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=templates["default"] if set(templates) == {"default"} else templates or None,
        additional_special_tokens=[t for t in special if t not in roles.values()],
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _added(vocabulary: Vocabulary, token: str, special: bool) -> AddedToken:
    """A token that is matched whole, before anything is split."""
    strips = vocabulary.strips_right and token not in KEEP_SPACES
    return AddedToken(token, special=special, normalized=False, rstrip=strips)


def _own(vocabulary: Vocabulary) -> Tokenizer | None:
    """The tokenizer that the file carries whole, if its tokens are those that the keys list."""
    if not vocabulary.own_json:
        return None
    backend = Tokenizer.from_str(vocabulary.own_json)
    own = backend.get_vocab(with_added_tokens=True)
    return backend if own == {t: i for i, t in enumerate(vocabulary.tokens)} else None


def _add_ends(backend: Tokenizer, vocabulary: Vocabulary) -> None:
    """Let encoding put tokens in front of a text and behind it, where the file wants that."""
    wanted = {"bos_token": vocabulary.add_bos, "eos_token": vocabulary.add_eos}
    ends = {role: vocabulary.tokens[vocabulary.ids[role]] for role, add in wanted.items() if add}
    if not ends:
        return
    around = [ends.get("bos_token"), "$A", ends.get("eos_token")]
    first = [piece for piece in around if piece is not None]
    second = [piece.replace("$A", "$B") for piece in first]
    backend.post_processor = processors.TemplateProcessing(
        single=first,
        pair=first + [f"{piece}:1" for piece in second],
        special_tokens=[(token, vocabulary.ids[role]) for role, token in ends.items()],
    )


def _byte_level(vocabulary: Vocabulary) -> Tokenizer:
    pre = vocabulary.pre
    if pre not in SPLITS:
        says = (
            f"splits text by '{pre}'"
            if pre not in {"", "default"}
            else "does not say how it splits text"
        )
        raise ModelError(
            f"the tokenizer in {vocabulary.path} {says} (tokenizer.ggml.pre; known: "
            f"{', '.join(SPLITS)}). {ORIGINAL}"
        )
    if not vocabulary.merges:
        raise ModelError(f"{vocabulary.path} holds a tokenizer without merges. {ORIGINAL}")
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    backend = Tokenizer(
        models.BPE(vocab=ids, merges=list(vocabulary.merges), ignore_merges=pre in WHOLE_PIECES)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in SPLITS[pre]),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    if pre in COMPOSED:
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """Pieces merged in the order of their scores; what is no token becomes bytes."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    unknown = vocabulary.ids.get("unk_token")
    n_bytes = sum(kind == BYTE for kind in vocabulary.types)
    if n_bytes not in {0, 256} or not vocabulary.scores:
        what = "scores" if not vocabulary.scores else f"{256 - n_bytes} of the 256 bytes"
        raise ModelError(f"the tokenizer in {vocabulary.path} lacks {what}. {ORIGINAL}")
    backend = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(vocabulary),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=n_bytes == 256,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if vocabulary.space_prefix:
        # Also behind every token that is matched whole.
        steps.insert(0, normalizers.Prepend(SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.space_prefix:
        decoding.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(decoding)
    return backend


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that make llama.cpp's choices: by the score of what is made, leftmost first.

    Raises:
        ModelError: the choice depends on places in the text, which merges cannot express.
    """
    scores = {
        token: score
        for token, score, kind in zip(
            vocabulary.tokens, vocabulary.scores, vocabulary.types, strict=True
        )
        if kind in {NORMAL, UNUSED}
    }
    alphabet = {token for token in scores if len(token) == 1}
    found: list[tuple[float, tuple[str, str]]] = []
    made: dict[float, str] = {}
    for token, score in scores.items():
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in scores and token[i:] in scores
        ]
        if not pairs:
            continue
        found.extend((score, pair) for pair in pairs)
        other = made.setdefault(score, token)
        if set(other) != set(token) or (len(set(token)) > 1 and other != token):
            raise ModelError(
                f"the tokenizer in {vocabulary.path} scores {other!r} and {token!r} alike, and "
                f"merges cannot express that. {ORIGINAL}"
            )
    split = next(
        (
            t
            for t, k in zip(vocabulary.tokens, vocabulary.types, strict=True)
            if k == NORMAL and len(t) > 1 and not alphabet.issuperset(t)
        ),
        None,
    )
    if split is not None:
        raise ModelError(
            f"the tokenizer in {vocabulary.path} holds {split!r} and not all of its characters, "
            f"and merges cannot express that. {ORIGINAL}"
        )
    # Of runs of one character, which share a score, the longer left part comes first: so the run
    # grows from its left end.
    found.sort(key=lambda item: (-item[0], -len(item[1][0]), -len(item[1][1])))
    return [pair for _, pair in found]
