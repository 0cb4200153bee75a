"""The refit: against least squares, on planted data, and its promise never to make things worse."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.engine.loss import mean_loss
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import DataError, PlanError, RecipeError
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.methods import refit
from layercut.spool import Spool
from layercut.types import CalibrationBatches


def spool(rows: torch.Tensor) -> Spool:
    filled = Spool(*rows.shape)
    filled.write(0, rows)
    return filled


def planted(n: int = 600, width: int = 6, out: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, width, generator=generator)
    change = torch.randn(out, width, generator=generator)
    outputs = torch.randn(n, out, generator=generator)
    return a, outputs, outputs + a @ change.T, change


CPU = torch.device("cpu")
EVERY_FOURTH = torch.arange(600) % 4 == 3


def test_planted_change_is_found():
    a, outputs, targets, change = planted()
    solved = refit.solve(spool(a), spool(outputs), spool(targets), EVERY_FOURTH, CPU)
    assert solved is not None
    torch.testing.assert_close(solved.float(), change, rtol=0, atol=0.02)


def test_solution_equals_weighted_least_squares(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refit, "PENALTY_GRID", (0.1,))
    a, outputs, targets, _ = planted()
    targets = targets + 0.1 * torch.randn(targets.shape, generator=torch.manual_seed(1))
    weight = 1 / targets[~EVERY_FOURTH].double().norm(dim=1, keepdim=True)
    rows = a[~EVERY_FOURTH].double() * weight
    errors = (targets - outputs)[~EVERY_FOURTH].double() * weight
    ridge = (0.1 * float(rows.square().sum()) / 6) ** 0.5 * torch.eye(6, dtype=torch.float64)
    stacked = torch.cat([errors, torch.zeros(6, 4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([rows, ridge]), stacked).solution.T
    solved = refit.solve(spool(a), spool(outputs), spool(targets), EVERY_FOURTH, CPU)
    torch.testing.assert_close(solved, expected, rtol=1e-3, atol=1e-4)


def test_one_massive_token_does_not_decide_the_fit():
    # Its own relation contradicts all others; with weights 1/‖target‖² it counts as one token.
    a, outputs, targets, change = planted()
    a[0] *= 1000
    targets[0] = outputs[0] - a[0] @ change.T
    solved = refit.solve(spool(a), spool(outputs), spool(targets), EVERY_FOURTH, CPU)
    assert solved is not None
    assert float((solved.float() - change).norm() / change.norm()) < 0.5


def test_noise_is_not_fitted():
    a, outputs, _, _ = planted(n=40)
    targets = outputs + torch.randn(outputs.shape, generator=torch.manual_seed(3))
    held_out = torch.arange(40) % 2 == 1
    a = torch.randn(40, 30, generator=torch.manual_seed(4))
    solved = refit.solve(spool(a), spool(outputs), spool(targets), held_out, CPU)
    gains = (targets - outputs)[held_out]
    weight = 1 / targets[held_out].norm(dim=1, keepdim=True)
    before = float((gains * weight).square().sum())
    if solved is not None:
        after = float(((gains - a[held_out] @ solved.float().T) * weight).square().sum())
        assert after < before


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
    walk = refit.walk

    def remember(*arguments):
        walked.update(walk(*arguments))
        return walked

    monkeypatch.setattr(refit, "walk", remember)
    options = {"held_out_every": 4, "gradient_steps": 0}
    patch = fit(view, plan_of(2, 3), None, batches, method="refit", **options)
    assert next(given, None) is None
    assert patch.notes["step"] == step
    assert bool(patch.tensors) == (step > 0)
    assert walked
    for name, tensor in patch.tensors.items():
        weight = view.model.get_parameter(name)
        assert torch.allclose(tensor, weight + step * (walked[name] - weight), atol=1e-6)


def test_nothing_to_learn_changes_nothing():
    a, outputs, _, _ = planted()
    assert refit.solve(spool(a), spool(outputs), spool(outputs), EVERY_FOURTH, CPU) is None


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
    held = refit.held_out_rows(batches, 4)
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        expected = mean_loss(view, batches.input_ids[held[:: batches.seq_len]], 2)
        skipped = view.model(batches.input_ids, use_cache=False).logits
    apply(view, plan, patch)
    assert mean_loss(view, batches.input_ids[3:], 2) == pytest.approx(expected)
    assert torch.equal(view.model(batches.input_ids, use_cache=False).logits, skipped)


def test_walk_moves_the_stream_as_the_patched_model_does(
    view: DecoderView, batches: CalibrationBatches
):
    # The down-projection's change is added to the stream without a second pass: compare with one.
    held = refit.held_out_rows(batches, 4)
    dense = ResidualStream(view, batches)
    dense.advance(0)
    pruned = dense.fork()
    for layer in range(1, 4):
        dense.advance(layer)
    options = refit.Options()
    tensors = refit._refit_layer(view, 1, dense, pruned, held, options)
    assert tensors
    again = ResidualStream(view, batches)
    again.advance(0)
    with view.patched(tensors):
        again.advance(1)
    torch.testing.assert_close(pruned.states.rows, again.states.rows, rtol=1e-4, atol=1e-4)


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
