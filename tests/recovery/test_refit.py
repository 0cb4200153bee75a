"""The refit: its promise never to make things worse, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.engine.loss import mean_loss
from layercut.errors import DataError, PlanError, RecipeError
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.layer_fit import mask_held_out_rows
from layercut.recovery.methods import refit
from layercut.types import CalibrationBatches


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([5.0, 4.0, 3.0, 3.5], 0.85),  # a part of the change is better than all of it
        ([5.0, 4.0, 4.5], 1.0),
        ([5.0, 6.0, 5.5, 5.7], 0.0),  # none of it is better than any
    ],
)
def test_the_step_is_the_one_with_the_lowest_held_out_loss(
    view: DecoderView,
    batches: CalibrationBatches,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    step: float,
):
    given = iter(losses)
    monkeypatch.setattr(refit, "mean_loss", lambda *_: next(given))
    walked: dict[str, torch.Tensor] = {}
    walk = refit.refit_layers

    def remember(*arguments, **how):
        refitted = walk(*arguments, **how)
        walked.update(refitted.tensors)
        return refitted

    monkeypatch.setattr(refit, "refit_layers", remember)
    options = {"held_out_every": 4, "gradient_steps": 0}
    patch = fit(view, plan_of(2, 3), None, batches, method="refit", **options)
    assert next(given, None) is None
    assert patch.notes["shrinkage"] == step
    assert bool(patch.tensors) == (step > 0)
    assert walked
    for name, tensor in patch.tensors.items():
        weight = view.model.get_parameter(name)
        assert torch.allclose(tensor, weight + step * (walked[name] - weight), atol=1e-6)


@pytest.mark.parametrize("layers", ["cuts", "following"])
@pytest.mark.parametrize("modules", ["down", "both"])
def test_refit_lowers_the_held_out_loss_or_is_dropped(
    view: DecoderView, batches: CalibrationBatches, layers: str, modules: str
):
    patch = fit(view, plan_of(2, 3), None, batches, method="refit", layers=layers, modules=modules)
    notes = patch.notes
    assert notes["accepted"] == (notes["held_out_loss_with"] < notes["held_out_loss_without"])
    assert bool(patch.tensors) == notes["accepted"]


def test_reported_loss_is_that_of_the_pruned_and_patched_model(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    # Accept every patch, so that there is one to apply on this random model.
    losses = iter([9.0, 1.0, 2.0])
    monkeypatch.setattr(refit, "mean_loss", lambda *_: next(losses))
    plan = plan_of(2, 3)
    patch = fit(view, plan, None, batches, method="refit", held_out_every=4)
    monkeypatch.undo()
    held = mask_held_out_rows(batches, 4)
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        expected = mean_loss(view, batches.input_ids[held[:: batches.seq_len]], 2)
        skipped = view.model(batches.input_ids, use_cache=False).logits
    apply(view, plan, patch)
    assert mean_loss(view, batches.input_ids[3:], 2) == pytest.approx(expected)
    assert torch.equal(view.model(batches.input_ids, use_cache=False).logits, skipped)


def test_fitting_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    fit(view, plan_of(2, 3), None, batches, method="refit")
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def test_a_cut_without_a_preceding_layer_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(PlanError, match="layer 0 is dropped"):
        fit(view, plan_of(0, 3), None, batches, method="refit")


def test_one_sequence_cannot_be_held_out(view: DecoderView, batches: CalibrationBatches):
    one = CalibrationBatches(batches.input_ids[:1], 1, 1, "test", "0")
    with pytest.raises(DataError, match="too few to hold any out"):
        fit(view, plan_of(2), None, one, method="refit")


def test_holding_out_every_sequence_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match=r"recovery\.options\.held_out_every"):
        fit(view, plan_of(2), None, batches, method="refit", held_out_every=1)
