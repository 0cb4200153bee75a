"""Tokens of task rows, by hand: in the byte tokenizer, byte b has the id b + 3 or so."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import byte_tokenizer, leading_tokenizer
from layercut.data.encoding import IGNORED, encode_choices, encode_completion, training_example
from layercut.data.tasks import TaskRow
from layercut.errors import DataError

BOS = 1
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    return byte_tokenizer()


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids))


def test_choices_share_the_prompt_and_have_no_end(tokenizer: Any):
    yes, no = encode_choices(TaskRow("Is it?", (" yes", " no"), 1), tokenizer)
    assert (yes.start, no.start) == (6, 6)
    assert yes.ids[:6] == no.ids[:6]
    assert (text(tokenizer, yes.targets), text(tokenizer, no.targets)) == (" yes", " no")


def test_an_ending_is_predicted_after_each_choice(tokenizer: Any):
    row = TaskRow("as", (" Ann", " Sue"), 1, ending=" ran.")
    for encoded, name in zip(encode_choices(row, tokenizer), ("Ann", "Sue"), strict=True):
        assert text(tokenizer, encoded.targets) == " ran."
        assert text(tokenizer, encoded.ids[: encoded.start]) == f"as {name}"
    assert text(tokenizer, encode_completion(row, tokenizer).targets) == " Sue ran."


def test_a_completion_ends_with_the_end_of_text_and_a_choice_does_not(tokenizer: Any):
    completion = encode_completion(TaskRow("2+2=", ("4",)), tokenizer)
    assert completion.targets[-1] == tokenizer.eos_token_id
    assert len(completion.targets) == 2
    choice = encode_completion(TaskRow("2+2=", ("3", "4"), 1), tokenizer)
    assert text(tokenizer, choice.targets) == "4"


def test_a_training_row_masks_its_prompt(tokenizer: Any):
    example = training_example(TaskRow("ab", ("c", "d"), 1), tokenizer, 16)
    assert example["labels"] == [IGNORED, IGNORED, tokenizer("d")["input_ids"][0]]
    assert example["input_ids"] == tokenizer("abd")["input_ids"]
    assert example["length"] == 3


def test_a_long_prompt_loses_its_start(tokenizer: Any):
    example = training_example(TaskRow("abcdef", ("g", "h")), tokenizer, 4)
    assert text(tokenizer, example["input_ids"]) == "defg"
    assert example["labels"][:3] == [IGNORED] * 3


def test_a_completion_that_leaves_no_room_for_a_prompt_is_refused(tokenizer: Any):
    row = TaskRow("ab", ("cdef", "x"), where="rows.jsonl, line 7")
    with pytest.raises(
        DataError, match=r"rows\.jsonl, line 7: the completion has 4 tokens.*into 4"
    ):
        training_example(row, tokenizer, 4)


def test_a_token_across_the_border_counts_as_predicted():
    class Merging:
        """One token per word, the space in front of it included."""

        bos_token_id, eos_token_id, eos_token = None, 0, "<eos>"

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [len(word) for word in text.split(" ")]}

    # "aa bbb" + "b cc" reads 2 4 2, the prompt alone 2 3: only the 2 is common.
    encoded = encode_completion(TaskRow("aa bbb", ("b cc", "x")), Merging())
    assert (encoded.ids, encoded.start) == ([2, 4, 2], 1)


def test_an_empty_prompt_starts_with_the_first_special_token(tokenizer: Any):
    encoded = encode_completion(TaskRow("", ("ab", "c")), tokenizer)
    assert encoded.ids[0] == tokenizer.bos_token_id
    assert encoded.start == 1


def test_an_empty_completion_is_refused(tokenizer: Any):
    with pytest.raises(DataError, match="line 1 has nothing to predict"):
        encode_choices(TaskRow("ab", ("", "c"), where="line 1"), tokenizer)


def test_a_chat_row_is_rendered_by_the_template_and_stops_at_the_end(tokenizer: Any):
    tokenizer.chat_template = TEMPLATE
    row = TaskRow("", ("Hello",), messages=({"role": "user", "content": "Hi"},))
    encoded = encode_completion(row, tokenizer)
    assert text(tokenizer, encoded.ids) == "<user>Hi<eos>\n<assistant>Hello<eos>"
    assert text(tokenizer, encoded.targets) == "Hello<eos>"
    (asked,) = encode_choices(row, tokenizer)
    assert text(tokenizer, asked.targets) == "Hello"


def test_a_chat_row_without_a_template_is_refused(tokenizer: Any):
    row = TaskRow("", ("Hello",), messages=({"role": "user", "content": "Hi"},), where="line 1")
    with pytest.raises(DataError, match=r"line 1 holds chat messages, but .* no chat template"):
        encode_completion(row, tokenizer)


def test_a_chat_row_that_the_template_refuses_is_named(tokenizer: Any):
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    )
    row = TaskRow("", ("Hello",), messages=({"role": "system", "content": "Hi"},), where="line 1")
    with pytest.raises(DataError, match=r"line 1: .* refuses .* roles system: No system role\."):
        encode_choices(row, tokenizer)


@pytest.mark.parametrize("after", ["", " <eos>"])
def test_a_prompt_starts_with_the_leading_token_once(after: str):
    tokenizer = leading_tokenizer(after)
    row = TaskRow("ab", ("c", "d"), 1)
    assert [e.ids[:1] for e in encode_choices(row, tokenizer)] == [[BOS], [BOS]]
    encoded = encode_completion(row, tokenizer)
    assert (encoded.ids, encoded.start) == ([BOS, *byte_tokenizer()("abd")["input_ids"]], 3)
    asked = encode_completion(TaskRow("", ("ab", "c")), tokenizer)
    assert (asked.ids[0], asked.start) == (BOS, 1)


@pytest.mark.parametrize("written", ["", "{{ bos_token }}"])
def test_a_chat_row_starts_with_the_leading_token_once(written: str):
    tokenizer = leading_tokenizer()
    tokenizer.chat_template = written + TEMPLATE
    row = TaskRow("", ("Hello",), messages=({"role": "user", "content": "Hi"},))
    ids = encode_completion(row, tokenizer).ids
    assert text(tokenizer, ids) == "<bos><user>Hi<eos>\n<assistant>Hello<eos>"


def test_a_long_prompt_keeps_its_leading_token():
    tokenizer = leading_tokenizer()
    example = training_example(TaskRow("abcdef", ("g", "h")), tokenizer, 4)
    assert text(tokenizer, example["input_ids"]) == "<bos>efg"
    assert example["labels"][:3] == [IGNORED] * 3
    with pytest.raises(DataError, match="has 3 tokens, which do not fit into 4 after a prompt"):
        training_example(TaskRow("ab", ("cde", "x")), tokenizer, 4)


def test_a_reply_without_text_is_asked_for_up_to_its_end(tokenizer: Any):
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}",
    )
    call = {"function": {"name": "look_up", "arguments": {}}}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = TaskRow("", ("",), messages=({"role": "user", "content": "Hi"},), reply=reply)
    (asked,) = encode_choices(row, tokenizer)
    assert text(tokenizer, asked.targets) == "look_up"
    assert text(tokenizer, encode_completion(row, tokenizer).targets) == "look_up<eos>"


def test_a_turn_ends_where_the_template_ends_it(tokenizer: Any):
    # Gemma's turns end with a token that is not the tokenizer's end of sequence.
    tokenizer.chat_template = TEMPLATE.replace("<eos>", "<pad>")
    row = TaskRow("", ("Hello",), messages=({"role": "user", "content": "Hi"},))
    assert text(tokenizer, encode_completion(row, tokenizer).targets) == "Hello<pad>"


def test_half_of_a_surrogate_pair_is_refused(tokenizer: Any):
    with pytest.raises(DataError, match="line 3 holds half of a surrogate pair"):
        encode_completion(TaskRow("a\ud800", ("b",), where="line 3"), tokenizer)


def test_a_tokenizer_that_ends_every_text_does_not_end_the_completion_early():
    class Ending:
        bos_token_id, eos_token_id, eos_token = None, 0, "<eos>"

        def __call__(
            self, text: str, add_special_tokens: bool, **_: object
        ) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text] + [0] * add_special_tokens}

    encoded = encode_completion(TaskRow("ab", ("c", "d")), Ending())
    assert (encoded.ids, encoded.start) == ([97, 98, 99], 2)
