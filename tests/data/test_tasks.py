"""Task rows from every known kind of file, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from layercut.data.tasks import TaskRow, check_classes, read_rows
from layercut.errors import DataError

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: dict, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


ARC = {"question": "Which is wet?", "choices": ["sand", "water"], "answer": 1}


def test_prompt_and_completion_are_taken_as_they_stand(write: Write):
    source = write({"prompt": "2+2=", "completion": "4"})
    assert read_rows(source) == [TaskRow("2+2=", ("4",), where=f"{source}, line 1")]


def test_a_chat_row_predicts_its_last_reply(write: Write):
    before = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (row,) = read_rows(write({"messages": [*before, {"role": "assistant", "content": "Hello"}]}))
    assert (row.completion, row.messages) == ("Hello", tuple(before))


def test_a_question_with_choices_becomes_a_prompt_and_spaced_choices(write: Write):
    (row,) = read_rows(write(ARC))
    assert row.prompt == "Question: Which is wet?\nAnswer:"
    assert (row.choices, row.answer) == ((" sand", " water"), 1)


def test_a_context_stands_before_the_question(write: Write):
    (row,) = read_rows(write(ARC | {"context": "Rain fell."}))
    assert row.prompt == "Rain fell.\nQuestion: Which is wet?\nAnswer:"


def test_a_file_of_gaps_is_judged_by_what_follows_the_gap(write: Write):
    gap = {"question": "Ann beat Sue as _ ran fast.", "choices": ["Ann", "Sue"], "answer": 0}
    (row,) = read_rows(write(gap))
    assert (row.prompt, row.choices, row.ending) == (
        "Ann beat Sue as",
        (" Ann", " Sue"),
        " ran fast.",
    )
    assert row.completion == " Ann ran fast."


def test_one_row_with_a_gap_does_not_make_a_file_of_gaps(write: Write):
    rows = read_rows(write(ARC | {"question": "A _ is wet?"}, ARC))
    assert rows[0].prompt == "Question: A _ is wet?\nAnswer:"


@pytest.mark.parametrize("answer", [1, "water", " water ", "1"])
def test_an_answer_is_an_index_or_the_choice_itself(write: Write, answer: object):
    assert read_rows(write(ARC | {"answer": answer}))[0].answer == 1


def test_csv_files_give_choices_as_json(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,choices,answer\nIs it?,"["" yes"", "" no""]",1\n')
    assert read_rows(str(path))[0] == TaskRow("Is it?", (" yes", " no"), 1, where=f"{path}, line 2")


def test_a_split_is_chosen_by_its_column(write: Write):
    source = write(ARC | {"split": "train"}, ARC | {"split": "test", "answer": 0})
    assert [row.answer for row in read_rows(f"{source}@test")] == [0]
    with pytest.raises(DataError, match=r"no rows of split 'dev': its splits are test, train\."):
        read_rows(f"{source}@dev")
    with pytest.raises(DataError, match="it has no column 'split'"):
        read_rows(write(ARC, name="other.jsonl") + "@test")


def test_reviews_are_labelled_rows_split_by_film():
    test = read_rows("embedded:reviews@test")
    assert len(test) == 2640
    assert {row.choices for row in test} == {(" positive", " negative")}
    assert sum(row.answer == 0 for row in test) == 1535  # fresh
    assert test[0].prompt.startswith("Review: ")
    assert not {row.prompt for row in test} & {
        row.prompt for row in read_rows("embedded:reviews@train")
    }


CHAT = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"none of the known sets of columns \(columns: text\).*messages; prompt"),
        ({"prompt": "a", "completion": " "}, "line 1: 'completion' should be text, got blank text"),
        ({"prompt": 5, "completion": "a"}, "line 1: 'prompt' should be text, got int"),
        (ARC | {"answer": 2}, "the answer 2 is none of the 2 choices, counted from 0"),
        (ARC | {"answer": "watr"}, r"unknown label 'watr'; did you mean 'water'\? \(choices: sand"),
        (ARC | {"answer": None}, "unknown label None"),
        (ARC | {"answer": True}, "unknown label True"),
        (ARC | {"choices": ["one"]}, "'choices' should be a list of at least two texts"),
        (ARC | {"choices": ["sand", " "]}, r"line 1: 'choices' should be a list of at least two"),
        (ARC | {"choices": "sand, water"}, "'choices' should be a list of at least two texts"),
        ({"messages": []}, "'messages' should be a list"),
        ({"messages": [CHAT]}, "should end with a reply of the role assistant"),
        (
            {"messages": [{"role": "assistant", "content": "Hi"}]},
            "after at least one other message",
        ),
    ],
)
def test_unusable_rows_are_refused_with_their_place(write: Write, row: dict, message: str):
    with pytest.raises(DataError, match=message):
        read_rows(write(row))


def test_a_later_row_that_lacks_a_column_is_named(write: Write):
    with pytest.raises(DataError, match=r"line 2: 'completion' should be text, got NoneType"):
        read_rows(write({"prompt": "a", "completion": "b"}, {"prompt": "a"}))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("embedded:docs", "'embedded:docs' holds no task rows: it is plain text"),
        ("embedded:review@test", "unknown; did you mean 'reviews@test'"),
        ("nowhere.jsonl", "data file nowhere.jsonl does not exist"),
        ("nowhere.jsonl@test", "data file nowhere.jsonl does not exist"),
    ],
)
def test_unusable_sources_are_refused(source: str, message: str):
    with pytest.raises(DataError, match=message):
        read_rows(source)


def test_plain_text_and_empty_files_hold_no_rows(tmp_path: Path, write: Write):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"unknown file type '\.txt'.*known: \.jsonl, \.csv"):
        read_rows(str(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="is empty: 0 rows"):
        read_rows(write())


def test_a_class_that_is_never_right_is_refused():
    rows = [TaskRow("a", (" yes", " no", " maybe"), answer, where="t") for answer in (0, 1, 1)]
    with pytest.raises(
        DataError, match=r"no training row has the answer 'maybe' \(3 rows, from t\)"
    ):
        check_classes(rows)


def test_rows_with_choices_of_their_own_have_no_classes():
    check_classes([TaskRow("a", (" x", " y"), 0), TaskRow("a", (" y", " z"), 0)])
    check_classes([TaskRow("a", (" x",)), TaskRow("b", (" x",))])
