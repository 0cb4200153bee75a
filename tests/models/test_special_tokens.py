"""What tokenizers put in front of text, found by what they do, and what separates documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from conftest import byte_tokenizer
from layercut.errors import ModelError
from layercut.models.special_tokens import document_separator, leading_tokens, text_frame

BOS, EOS = 1, 0


def adding(before: str, after: str = "") -> PreTrainedTokenizerFast:
    """A byte tokenizer that puts tokens around every text, whatever its flags say."""
    tokenizer = byte_tokenizer()
    ids = {"<eos>": EOS, "<bos>": BOS, "<pad>": 2}
    single = f"{before} $A {after}".strip()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, i) for t, i in ids.items() if t in single]
    )
    return tokenizer


def named(eos: str | None, *others: str, template: str | None = None) -> Any:
    """A byte tokenizer with further special tokens, of which ``eos`` is the declared end."""
    tokenizer = byte_tokenizer()
    # The byte tokenizer's own end would be one that ends texts.
    content = json.loads(tokenizer.backend_tokenizer.to_str().replace("<eos>", "<none>"))
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))
    backend.add_special_tokens([token for token in (eos, *others) if token])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token=eos, chat_template=template
    )


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (byte_tokenizer(), ()),
        (adding("<bos>"), (BOS,)),
        (adding("<bos>", "<eos>"), (BOS,)),
        (adding("", "<eos>"), ()),
        (adding("<pad> <bos>"), (2, BOS)),
        (adding("<eos>"), (EOS,)),
    ],
    ids=["nothing", "one", "both ends", "the end alone", "two", "the end in front"],
)
def test_leading_tokens_are_what_the_tokenizer_does(tokenizer: Any, expected: tuple[int, ...]):
    assert leading_tokens(tokenizer) == expected


def test_flags_do_not_count():
    tokenizer = adding("<bos>")
    tokenizer.init_kwargs["add_bos_token"] = False
    assert leading_tokens(tokenizer) == (BOS,)
    plain = byte_tokenizer()
    plain.init_kwargs["add_bos_token"] = True
    assert leading_tokens(plain) == ()


def test_a_token_that_is_added_even_when_none_is_asked_for_leads():
    class Stubborn:
        all_special_ids = (7,)

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [7, *map(ord, text)]}

    assert leading_tokens(Stubborn()) == (7,)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (lambda text, special: [], "makes no tokens of plain text"),
        (lambda text, special: [len(text) + special], "reads 'Hello there' otherwise when it adds"),
    ],
)
def test_text_that_cannot_be_told_apart_is_refused(ids: Any, message: str):
    class Broken:
        def __call__(
            self, text: str, add_special_tokens: bool, **_: object
        ) -> dict[str, list[int]]:
            return {"input_ids": ids(text, add_special_tokens)}

    with pytest.raises(ModelError, match=message):
        leading_tokens(Broken())


ENDS_TURNS = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (named("<|endoftext|>"), "<|endoftext|>"),
        (named("</s>", template=ENDS_TURNS), "</s>"),
        (named("<|im_end|>", "<|endoftext|>"), "<|endoftext|>"),
        (named("<|eot_id|>", "<|end_of_text|>"), "<|end_of_text|>"),
        (named("<|return|>", "<|endoftext|>", "<|end|>"), "<|endoftext|>"),
        (named("<|im_end|>"), None),
        (named("<fin>"), "<fin>"),
        (named("<fin>", template=ENDS_TURNS), None),
        (named("<fin>", "</s>", template=ENDS_TURNS), "</s>"),
        (named("<|im_end|>", "</s>", "<|endoftext|>"), None),
        (named(None, "</s>"), None),
    ],
)
def test_documents_are_separated_by_what_ends_texts_and_not_turns(tokenizer: Any, expected: str):
    separator = document_separator(tokenizer)
    assert (separator and tokenizer.convert_ids_to_tokens(separator)) == expected
    assert text_frame(tokenizer).document_separator == expected


def test_of_several_ends_the_one_that_the_configuration_lists_separates(tmp_path: Path):
    named("<|im_end|>", "</s>", "<|endoftext|>").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert document_separator(tokenizer) is None
    end = tokenizer.convert_tokens_to_ids("</s>")
    ends = [end, tokenizer.eos_token_id]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert document_separator(tokenizer) == end
    (tmp_path / "generation_config.json").write_text("{")
    assert document_separator(tokenizer) is None


def test_the_frame_is_told_by_name():
    assert text_frame(adding("<bos>")).to_json() == {
        "leading_token": "<bos>",
        "document_separator": "<eos>",
    }
    assert text_frame(adding("<pad> <bos>")).leading_token == "<pad><bos>"
    assert text_frame(named("<|im_end|>")).to_json() == {
        "leading_token": None,
        "document_separator": None,
    }
