"""Answers against full logits; standard errors and paired changes by hand."""

from __future__ import annotations

import math

import pytest
import torch

from layercut.data.tasks import TaskRow
from layercut.errors import DataError, NumericsError
from layercut.evaluation.accuracy import accuracy, answer, paired_change
from layercut.evaluation.evaluate import add_changes, check_tasks, evaluate
from layercut.models.view import DecoderView
from layercut.results import Estimate, Evaluation

LETTERS = [TaskRow(f"{i} is", ("a", "b", "c"), i % 3, where=f"row {i}") for i in range(12)]
WORDS = [
    TaskRow(f"Row {i}" + "!" * (i % 5), (" yes", " no", " perhaps not"), i % 3) for i in range(9)
]


def likelihood(view: DecoderView, prompt: str, text: str) -> float:
    """Summed log-likelihood of ``text`` after ``prompt``, from the whole sequence's logits."""
    ids = torch.tensor([view.tokenizer(prompt + text)["input_ids"]])
    start = len(view.tokenizer(prompt)["input_ids"])
    scores = view.model(ids, use_cache=False).logits[0].log_softmax(-1)
    return sum(float(scores[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def test_choices_of_one_token_are_compared_at_one_position(view: DecoderView):
    expected = []
    for row in LETTERS:
        scores = [likelihood(view, row.prompt, choice) for choice in row.choices]
        expected.append(scores.index(max(scores)) == row.answer)
    answers = answer(view, LETTERS)
    assert answers.correct == tuple(expected)
    assert 0 < sum(expected) < 12
    assert answers.by_length is None


def test_longer_choices_are_compared_as_a_whole_and_per_character(view: DecoderView):
    plain, per_character = [], []
    for row in WORDS:
        scores = [likelihood(view, row.prompt, choice) for choice in row.choices]
        plain.append(scores.index(max(scores)) == row.answer)
        scaled = [s / n for s, n in zip(scores, (3, 2, 11), strict=True)]  # yes, no, perhaps not
        per_character.append(scaled.index(max(scaled)) == row.answer)
    answers = answer(view, WORDS)
    assert answers.correct == tuple(plain)
    assert answers.by_length == tuple(per_character)
    assert plain != per_character


def test_choices_before_an_ending_are_judged_by_the_ending(view: DecoderView):
    rows = [TaskRow(f"{i}", (" Ann", " Bob"), i % 2, ending=" ran.") for i in range(8)]
    expected = []
    for row in rows:
        scores = [likelihood(view, row.prompt + choice, row.ending) for choice in row.choices]
        expected.append(scores.index(max(scores)) == row.answer)
    answers = answer(view, rows)
    assert answers.correct == tuple(expected)
    assert answers.by_length is None


def test_a_completion_is_right_if_greedy_decoding_gives_it(view: DecoderView):
    letters = view.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    others = [token for token in range(259) if token not in letters]
    view.model.lm_head.weight.data[others] = 0  # so that what is generated is text
    prompt = torch.tensor([view.tokenizer("abc")["input_ids"]])
    new = view.model.generate(prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
    text = view.tokenizer.decode(new[0, 3:])
    assert view.tokenizer("abc" + text)["input_ids"] == new[0].tolist()
    assert answer(view, [TaskRow("abc", (text,))]).correct == (True,)
    assert answer(view, [TaskRow("abc", (text[:-1] + "~",))]).correct == (False,)


def test_batches_change_no_answer(view: DecoderView, monkeypatch: pytest.MonkeyPatch):
    whole = answer(view, WORDS)
    monkeypatch.setattr("layercut.evaluation.accuracy.BATCH_TOKENS", 1)
    monkeypatch.setattr("layercut.evaluation.accuracy.LOGITS_AT_ONCE", 2)
    assert answer(view, WORDS) == whole
    assert answer(view, WORDS[::-1]).correct == whole.correct[::-1]


def test_standard_error_is_the_binomial_one():
    # p = 3/4, se = √(3/4 · 1/4 / 3) = 1/4
    estimate = accuracy([True, True, False, True])
    assert (estimate.value, estimate.stderr, estimate.n) == (0.75, 0.25, 4)
    assert accuracy([True]).stderr == 0


def test_a_paired_change_counts_the_rows_that_changed():
    # d = 0, −1, −1, 1: mean −1/4, variance (1 + 9 + 9 + 25)/16/3 = 11/12, se √(11/12)/2
    estimate = paired_change([True, True, True, False], [True, False, False, True])
    assert estimate.value == -0.25
    assert estimate.stderr == pytest.approx(math.sqrt(11 / 12) / 2)
    assert paired_change([True, False], [True, False]) == Estimate(0.0, 0.0, 2)


def test_evaluations_are_compared_task_by_task():
    def measured(**tasks: list[bool]) -> Evaluation:
        return Evaluation(1, 1, accuracy={name: accuracy(rows) for name, rows in tasks.items()})

    after = add_changes(measured(a=[True, False], b=[True]), measured(a=[True, True]))
    assert after.accuracy_change == {"a": paired_change([True, True], [True, False])}
    content = after.to_json()
    assert content["accuracy_change"]["a"] == {"value": -0.5, "stderr": 0.5, "n_rows": 2}
    assert set(content["accuracy"]["a"]) == {"value", "stderr", "n_rows"}


def test_tasks_are_part_of_an_evaluation(view: DecoderView, tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "ab", "choices": ["c", "def"], "answer": 1}\n' * 3)
    check_tasks(view, {"t": str(path)})
    result = evaluate(view, tasks={"t": str(path)}, speed=False)
    assert set(result.accuracy) == {"t", "t (per character)"}
    assert result.accuracy["t"].n == 3


def test_rows_that_cannot_be_answered_are_refused(view: DecoderView):
    with pytest.raises(DataError, match="no rows to answer"):
        answer(view, [])
    with pytest.raises(DataError, match=r"row 3: a choice of 130 tokens does not fit .* of 128"):
        answer(view, [TaskRow("a", ("b" * 130, "c"), where="row 3")])


def test_a_likelihood_that_is_not_finite_is_an_error(view: DecoderView):
    view.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="row 0: a choice's log-likelihood is not finite"):
        answer(view, LETTERS)
