"""The tokenizer of a GGUF file encodes as llama.cpp does; what is not known is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from gguf_files import TOKENS, TYPES, byte_level_keys, write_llama
from layercut.checkpoints.gguf.tokenizer import build_tokenizer
from layercut.checkpoints.gguf.vocabulary import Vocabulary, read_vocabulary
from layercut.errors import ModelError
from layercut.models.load import load

pytest.importorskip("gguf")

BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "a", "▁a", "\n", "▁▁"]
SPM = ["<unk>", "<s>", "</s>", *BYTES, *PIECES, "<think>", "<|end|>"]
SPM_TYPES = [2, 3, 3, *[6] * 256, *[1] * len(PIECES), 4, 3]


def keys(**changed: Any) -> dict[str, Any]:
    """Keys of a byte-level tokenizer with some changed; ``None`` leaves one out."""
    found = byte_level_keys() | {f"tokenizer.{k.replace('__', '.')}": v for k, v in changed.items()}
    return {key: value for key, value in found.items() if value is not None}


def spm(**changed: Any) -> dict[str, Any]:
    """Keys of a sentencepiece tokenizer with some changed."""
    scores = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [-1000.0] * 2
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": SPM,
        "tokenizer.ggml.token_type": SPM_TYPES,
        "tokenizer.ggml.scores": scores,
    }
    found |= {f"tokenizer.{k.replace('__', '.')}": v for k, v in changed.items()}
    return {key: value for key, value in found.items() if value is not None}


def read(values: dict[str, Any]) -> Vocabulary:
    return read_vocabulary(Path("m.gguf"), values)


def encode(values: dict[str, Any], text: str, *, special: bool = False) -> list[str]:
    tokenizer = build_tokenizer(read(values))
    ids = tokenizer(text, add_special_tokens=special).input_ids
    return [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["ab", "Ġ1234"]),
        ("smollm", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["ab", "Ġ", "123", "4"]),
        ("qwen2", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("tekken", ["ab", "Ġ", "1", "2", "3", "4"]),
        ("gpt-4o", ["ab", "Ġ", "123", "4"]),
    ],
)
def test_text_is_split_as_the_file_says(pre: str, pieces: list[str]) -> None:
    tokenizer = build_tokenizer(read(keys(ggml__pre=pre, ggml__add_bos_token=False)))
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("ab 1234")
    assert [piece for piece, _ in split] == pieces
    assert tokenizer("ab").input_ids == [len(TOKENS) - 1]


def test_user_defined_tokens_match_whole_before_text_is_split() -> None:
    more = keys(
        ggml__tokens=[*TOKENS, "<think>", "a1 b", "[PAD]"], ggml__token_type=[*TYPES, 4, 4, 5]
    )
    assert encode(more, "ab<think>a1 b") == ["ab", "<think>", "a1 b"]
    assert "[PAD]" not in encode(more, "[PAD]")
    tokenizer = build_tokenizer(read(more))
    ids = tokenizer("<think>ab<bos>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>ab"


def test_a_token_that_ends_an_answer_is_matched_whole_whatever_its_type() -> None:
    more = keys(ggml__tokens=[*TOKENS, "<|im_end|>"], ggml__token_type=[*TYPES, 1])
    assert encode(more, "ab<|im_end|>") == ["ab", "<|im_end|>"]


@pytest.mark.parametrize(
    ("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False)]
)
def test_a_piece_that_is_a_token_is_taken_whole_where_the_engine_does(
    pre: str, whole: bool
) -> None:
    more = keys(
        ggml__pre=pre,
        ggml__tokens=[*TOKENS, "Ġcab"],
        ggml__token_type=[*TYPES, 1],
        ggml__add_bos_token=False,
    )
    assert encode(more, " cab") == (["Ġcab"] if whole else ["Ġ", "c", "ab"])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (keys(ggml__pre="llama-bpe"), ["<bos>", "ab"]),
        (keys(ggml__pre="tekken"), ["<bos>", "ab"]),
        (keys(ggml__pre="llama-bpe", ggml__add_bos_token=False), ["ab"]),
        (keys(ggml__pre="qwen2"), ["ab"]),
        (keys(ggml__pre="qwen2", ggml__add_bos_token=True), ["<bos>", "ab"]),
        (keys(ggml__add_bos_token=True, ggml__add_eos_token=True), ["<bos>", "ab", "<eos>"]),
        (keys(ggml__add_eos_token=True), ["ab", "<eos>"]),
    ],
)
def test_tokens_are_added_as_the_file_says_or_as_the_engine_does_unasked(
    values: dict[str, Any], expected: list[str]
) -> None:
    assert encode(values, "ab", special=True) == expected


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    assert encode(spm(), "hello", special=True) == ["<s>", "▁hello"]
    assert encode(spm(), "hello  hella\né") == [
        "▁hello",
        "▁▁",
        "hell",
        "a",
        "\n",
        "<0xC3>",
        "<0xA9>",
    ]
    # The engine's prefix goes in front of every text between tokens that are matched whole.
    assert encode(spm(), "a<think>a") == ["▁a", "<think>", "▁a"]
    assert encode(spm(ggml__add_space_prefix=False), "a<think>a") == ["a", "<think>", "a"]
    assert encode(spm(ggml__add_bos_token=False), "a", special=True) == ["▁a"]
    tokenizer = build_tokenizer(read(spm()))
    assert tokenizer.decode(tokenizer("hello  a\né").input_ids, skip_special_tokens=True) == (
        "hello  a\né"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<s>",
        "</s>",
        "<unk>",
    )


def test_special_tokens_of_phi_3_take_the_spaces_behind_them() -> None:
    assert encode(spm() | {"general.name": "Phi-3 mini"}, "<|end|>  a") == ["<|end|>", "▁a"]
    assert encode(spm(), "<|end|> a") == ["<|end|>", "▁", "▁a"]


def test_a_run_of_spaces_grows_from_its_left_end() -> None:
    pieces = ["▁", "▁▁", "▁▁▁", "a"]
    values = spm(
        ggml__tokens=["<unk>", "<s>", "</s>", *BYTES, *pieces],
        ggml__token_type=[2, 3, 3, *[6] * 256, *[1] * 4],
        ggml__scores=[0.0] * 259 + [-1e9, -1e9, -1e9, 0.0],
        ggml__add_space_prefix=False,
    )
    assert encode(values, "     a") == ["▁▁▁", "▁▁", "a"]


def test_every_end_of_an_answer_stops_a_generation(tmp_path: Path) -> None:
    tokens = [*TOKENS, "<|eot_id|>", "<|eom_id|>", "<stop>"]
    path = write_llama(
        tmp_path / "tiny.gguf",
        vocab_size=len(tokens),
        tokenizer__ggml__tokens=tokens,
        tokenizer__ggml__token_type=[*TYPES, 3, 3, 3],
        tokenizer__ggml__eot_token_id=len(tokens) - 1,
    )
    view = load(str(path), dtype="float32")
    ends = GenerationConfig.from_pretrained(view.path).eos_token_id
    assert ends == [0, len(tokens) - 1, len(TOKENS), len(TOKENS) + 1]
    assert view.tokenizer.eos_token_id == 0


def test_named_chat_templates_keep_their_names() -> None:
    more = {"chat_template": "A", "chat_template.tool_use": "B", "chat_templates": ["tool_use"]}
    tokenizer = build_tokenizer(
        read(byte_level_keys() | {f"tokenizer.{k}": v for k, v in more.items()})
    )
    assert tokenizer.chat_template == {"default": "A", "tool_use": "B"}
    assert build_tokenizer(read(keys(chat_template="A"))).chat_template == "A"


def test_a_tokenizer_that_the_file_carries_whole_is_used_where_it_agrees() -> None:
    own = build_tokenizer(read(keys(ggml__pre="qwen2"))).backend_tokenizer.to_str()
    carried = keys(ggml__pre="of-tomorrow", huggingface__json=own)
    assert encode(carried, "ab") == ["ab"]
    other = carried | {"tokenizer.ggml.tokens": [*TOKENS[:-1], "ba"]}
    with pytest.raises(ModelError, match="splits text by 'of-tomorrow'"):
        build_tokenizer(read(other))


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown split": (keys(ggml__pre="tekken9"), r"splits text by 'tekken9'.*known: gpt-2"),
    "no split": (keys(ggml__pre=None), "does not say how it splits text"),
    "default split": (keys(ggml__pre="default"), "does not say how it splits text"),
    "no tokenizer": (keys(ggml__model=None), "holds no tokenizer"),
    "none": (keys(ggml__model="none"), "holds no tokenizer"),
    "wordpiece": (keys(ggml__model="bert"), r"of the kind 'bert'.*known: gpt2, llama"),
    "unigram": (keys(ggml__model="t5"), "of the kind 't5'"),
    "rwkv": (keys(ggml__model="rwkv"), "of the kind 'rwkv'"),
    "twice": (keys(ggml__tokens=[*TOKENS[:-1], "a"]), "holds the token 'a' twice"),
    "no types": (keys(ggml__token_type=None), r"token_type for 0: which of them are control"),
    "a role beyond": (keys(ggml__eos_token_id=999), r"eos_token_id is 999, and there are"),
    "unnamed lead": (
        keys(ggml__pre="llama-bpe", ggml__bos_token_id=None),
        "adds a bos_token to text and does not name it",
    ),
    "charsmap": (
        keys(ggml__precompiled_charsmap=[1]),
        r"sets tokenizer\.ggml\.precompiled_charsmap",
    ),
    "unheard of": (keys(ggml__new_rule=1), r"sets tokenizer\.ggml\.new_rule"),
    "no merges": (keys(ggml__merges=None), "tokenizer without merges"),
    "a merge of unknown tokens": (keys(ggml__merges=["q zz"]), "cannot be converted"),
    "no scores": (spm(ggml__scores=None), "lacks scores"),
    "some bytes": (spm(ggml__token_type=[2, 3, 3, 1, *SPM_TYPES[4:]]), "lacks 1 of the 256 bytes"),
    "equal scores": (spm(ggml__scores=[0.0] * len(SPM)), "scores '.*' and '.*' alike"),
    "a piece without its letters": (
        spm(ggml__tokens=[*SPM[:-2], "xy", SPM[-1]], ggml__token_type=[*SPM_TYPES[:-2], 1, 3]),
        "holds 'xy' and not all of its characters",
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_tokenizer_that_is_not_known_is_refused(fault: str) -> None:
    values, why = REFUSALS[fault]
    with pytest.raises(ModelError, match=why):
        build_tokenizer(read(values))
