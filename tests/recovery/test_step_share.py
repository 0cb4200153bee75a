"""Text that gradient steps alone learn from."""

from __future__ import annotations

import pytest
import torch

from conftest import VOCABULARY, plan_of
from layercut.errors import RecipeError
from layercut.models.view import DecoderView
from layercut.recovery import gradient_steps
from layercut.recovery.fit import fit
from layercut.recovery.methods import refit
from layercut.recovery.methods.refit import mark_fresh
from layercut.types import CalibrationBatches


@pytest.mark.parametrize(
    ("n", "share", "fresh"),
    [
        (8, 0.0, []),
        (8, 0.25, [3, 7]),
        (8, 0.5, [1, 3, 5, 7]),
        (5, 0.4, [2, 4]),
        (10, 0.3, [3, 6, 9]),
        (3, 0.9999, [1, 2]),
    ],
)
def test_the_sequences_of_the_steps_are_spread(n: int, share: float, fresh: list[int]) -> None:
    assert mark_fresh(n, share).nonzero().squeeze(1).tolist() == fresh


@pytest.fixture
def text() -> CalibrationBatches:
    ids = torch.randint(3, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(5))
    return CalibrationBatches(ids, 2, 2, "test", "0")


def test_every_step_learns_from_its_own_part_that_no_fit_sees(
    view: DecoderView, text: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, learned, judged = [], [], []
    walk, find = refit.refit_layers, gradient_steps.find_directions
    search = gradient_steps.search_length

    def walk_and_note(view: DecoderView, plan: object, batches: CalibrationBatches, *rest, **how):
        fitted.append(batches.input_ids)
        return walk(view, plan, batches, *rest, **how)

    def find_and_note(view: DecoderView, plan: object, tensors: object, ids: torch.Tensor, n: int):
        learned.append(ids)
        return find(view, plan, tensors, ids, n)

    def search_and_note(*arguments, **how):
        judged.append(arguments[4])
        return search(*arguments, **how)

    monkeypatch.setattr(refit, "refit_layers", walk_and_note)
    monkeypatch.setattr(gradient_steps, "find_directions", find_and_note)
    monkeypatch.setattr(gradient_steps, "search_length", search_and_note)
    options = {"held_out_every": 2, "gradient_steps": 3, "step_share": 0.5}
    fit(view, plan_of(2, 3), None, text, method="refit", **options)
    fresh = text.input_ids[mark_fresh(12, 0.5)]
    assert torch.equal(fitted[0], text.input_ids[~mark_fresh(12, 0.5)])
    assert [rows.tolist() for rows in learned] == [fresh[i::3].tolist() for i in range(3)]
    held_out = {tuple(row) for row in fitted[0][1::2].tolist()}
    assert all({tuple(row) for row in rows.tolist()} <= held_out for rows in judged)


def test_text_that_cannot_be_shared_out_is_refused(
    view: DecoderView, text: CalibrationBatches
) -> None:
    with pytest.raises(RecipeError, match=r"step_share .* leaves 11 of 12"):
        fit(view, plan_of(2), None, text, method="refit", step_share=0.95)


def test_there_are_no_more_steps_than_sequences_for_them(
    view: DecoderView, text: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned = []
    find = gradient_steps.find_directions

    def find_and_note(*arguments):
        learned.append(len(arguments[3]))
        return find(*arguments)

    monkeypatch.setattr(gradient_steps, "find_directions", find_and_note)
    options = {"step_share": 0.25, "gradient_steps": 7, "held_out_every": 2}
    with pytest.warns(UserWarning, match="3 gradient steps are taken instead of 7"):
        fit(view, plan_of(2), None, text, method="refit", **options)
    assert learned == [1, 1, 1]
