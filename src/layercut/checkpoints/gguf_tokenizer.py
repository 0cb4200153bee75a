"""The byte-level BPE tokenizer that a GGUF file describes.

transformers' own reader splits every text as GPT-2 does, whatever the file says; a tokenizer with
other splits than the model was trained with would be written into every pruned checkpoint.
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

from layercut.errors import ModelError

CONTROL_TOKEN = 3
"""GGUF's token type for special tokens."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: Mapping[str, str] = {
    "default": "",
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}",
    "qwen2": rf"{_WORDS}|\p{{N}}|{_REST}",
}
"""``tokenizer.ggml.pre`` → how text is split before merging: as by GPT-2, digits apart, a regex."""
COMPOSED = frozenset({"qwen2"})
"""Whose text is normalised to composed characters first."""
ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def bpe_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer of a file whose ``tokenizer.ggml.model`` is ``gpt2``.

    Args:
        fields: the file's fields by name.

    Raises:
        ModelError: its way of splitting text is not known.
    """

    def value(key: str) -> Any:
        field = fields.get(f"tokenizer.{key}")
        return None if field is None else field.contents()

    kind = value("ggml.pre") or "default"
    if kind not in SPLITS:
        raise ModelError(
            f"the tokenizer of this GGUF file splits text by '{kind}', which layercut does not "
            f"know (known: {', '.join(SPLITS)}). Use the original checkpoint."
        )
    tokens, types = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer(SPLITS[kind])
    backend.decoder = decoders.ByteLevel()
    if kind in COMPOSED:
        backend.normalizer = normalizers.NFC()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    ids = {role: value(f"ggml.{key}_token_id") for role, key in ROLES.items()}
    roles = {role: tokens[i] for role, i in ids.items() if i is not None}
    if value("ggml.add_bos_token") and "bos_token" in roles:
        bos = roles["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, ids["bos_token"])],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=value("chat_template"),
        additional_special_tokens=[t for t in control if t not in roles.values()],
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _pre_tokenizer(split: str) -> Any:
    if not split:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split == "digits":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
