"""GradMAP's projection: hand-worked, against references, on planted data, on both layouts."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.engine.loss import mean_loss
from layercut.errors import DataError, NumericsError, PlanError, RecipeError
from layercut.models.output_projections import down_projection
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.layer_fit import mean_squared_errors
from layercut.recovery.mean_shift import Size, find_largest_mean_shift, walk_shifts
from layercut.recovery.methods.projection import (
    solve_closed_form,
    solve_gradient_descent,
)
from layercut.types import CalibrationBatches
from spools import spool


def all_of_them(size: Size) -> bool:
    return True


def random_rows(n: int = 400, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(n, width, generator=generator)
    noise = 0.1 * torch.randn(n, width, generator=generator)
    return m @ torch.randn(width, width, generator=generator) + noise, m


def test_closed_form_by_hand():
    # d = 1: r = (2, 2), m = (1, 1): Σrm = 4, Σmm = 2, λ̂ = 0.5·2/1 = 1 → P = 1 + 4/(2 + 1) = 7/3
    ones = torch.ones(2, 1)
    solved = solve_closed_form(spool(2 * ones), spool(ones), 0.5)
    assert float(solved) == pytest.approx(7 / 3)


def test_closed_form_equals_stacked_least_squares():
    r, m = random_rows()
    penalty = 0.3
    ridge = penalty * float(m.double().square().sum()) / 8
    # ‖r − m·Dᵀ‖² + ridge·‖D‖² is plain least squares with √ridge·I below m.
    stacked = torch.cat([m.double(), ridge**0.5 * torch.eye(8, dtype=torch.float64)])
    targets = torch.cat([r.double(), torch.zeros(8, 8, dtype=torch.float64)])
    change = torch.linalg.lstsq(stacked, targets).solution.T
    solved = solve_closed_form(spool(r), spool(m), penalty)
    torch.testing.assert_close(solved, torch.eye(8, dtype=torch.float64) + change)


def test_closed_form_equals_gradient_descent():
    r, m = (spool(rows) for rows in random_rows())
    closed, descended = solve_closed_form(r, m, 0.1), solve_gradient_descent(r, m, 0.1)
    assert float((closed - descended).norm() / closed.norm()) < 1e-5


def test_planted_projection_is_found_exactly():
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(200, 8, generator=generator)
    planted = torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator)
    r = m @ (planted - torch.eye(8)).T
    solved = solve_closed_form(spool(r), spool(m), 1e-12)
    torch.testing.assert_close(solved.float(), planted, rtol=1e-4, atol=1e-4)
    before, after = mean_squared_errors(spool(r), spool(m), solved)
    assert after < 1e-6 * before


def test_a_strong_penalty_changes_nothing():
    r, m = random_rows()
    solved = solve_closed_form(spool(r), spool(m), 1e9)
    torch.testing.assert_close(solved, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-6)


def test_singular_equations_are_an_error():
    zeros = torch.zeros(4, 3)
    with pytest.raises(NumericsError, match="singular"):
        solve_closed_form(spool(zeros), spool(zeros), 0.0)


def test_the_shift_is_the_largest_over_kept_layers(view: DecoderView, batches: CalibrationBatches):
    plan = plan_of(2, 3)
    dense = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    with view.skipping(plan.dropped):
        # hidden_states[i + 1] is layer i's output, but for the last one, which is normed.
        pruned = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    shifts = {
        layer: float(
            (
                pruned.hidden_states[layer + 1].flatten(0, 1).mean(0)
                - dense.hidden_states[plan.target_of(layer)].flatten(0, 1).mean(0)
            ).norm()
        )
        for layer in (0, 1, 4)
    }
    found = find_largest_mean_shift(view, plan, batches)
    if found.size.layer in shifts:
        assert found.size.norm == pytest.approx(max(shifts.values()), rel=1e-4)
    assert found.size.norm >= max(shifts.values()) * (1 - 1e-4)


def test_rows_of_the_shift_add_up_to_the_target(view: DecoderView, batches: CalibrationBatches):
    plan = plan_of(1)
    shift = find_largest_mean_shift(view, plan, batches)
    mean = shift.residual.rows.mean(dim=0)
    assert float(mean.norm()) == pytest.approx(shift.size.norm, rel=1e-4)


def test_projection_reduces_the_error_it_was_fitted_to(
    view: DecoderView, batches: CalibrationBatches
):
    patch = fit(view, plan_of(2, 3), None, batches, method="projection", penalty=0.01)
    assert patch.notes["squared_error_after"] < patch.notes["squared_error_before"]
    layer = patch.notes["layer"]
    assert list(patch.tensors) == [f"model.layers.{layer}.mlp.down_proj.weight"]


def test_projection_moves_the_pruned_model_as_predicted(
    view: DecoderView, batches: CalibrationBatches
):
    # The error after the fit, measured on the patched model itself.
    plan = plan_of(2, 3)
    patch = fit(view, plan, None, batches, method="projection", penalty=0.01)
    target = find_largest_mean_shift(view, plan, batches)
    dense_target = target.residual.rows.clone()
    name = f"model.layers.{target.size.layer}.mlp.down_proj.weight"
    weight = view.model.get_parameter(name)
    change = patch.tensors[name] - weight
    remaining = []
    for ids, rows in zip(
        batches.micro_batches(), dense_target.split(2 * batches.seq_len), strict=True
    ):
        inner: list[torch.Tensor] = []
        _, module = down_projection(view, target.size.layer)
        handle = module.register_forward_hook(
            lambda m, args, out, inner=inner: inner.append(args[0])
        )
        with view.skipping(plan.dropped):
            view.model.base_model(ids, use_cache=False)
        handle.remove()
        remaining.append(rows - inner[0].flatten(0, 1) @ change.T)
    after = float(torch.cat(remaining).square().sum(dim=1).mean())
    assert after == pytest.approx(patch.notes["squared_error_after"], rel=1e-3)


def test_held_out_penalty_comes_from_the_grid(view: DecoderView, batches: CalibrationBatches):
    patch = fit(view, plan_of(2), None, batches, method="projection", penalty="held-out")
    assert patch.notes["penalty"] in (0.01, 0.03, 0.1, 0.3, 1.0)


def test_too_few_sequences_to_hold_out(view: DecoderView, batches: CalibrationBatches):
    few = CalibrationBatches(batches.input_ids[:3], 2, 2, "test", "0")
    with pytest.raises(DataError, match="3 calibration sequences are too few"):
        fit(view, plan_of(2), None, few, method="projection", penalty="held-out")


def test_none_changes_nothing(view: DecoderView, batches: CalibrationBatches):
    patch = fit(view, plan_of(2), None, batches, method="none")
    assert patch.tensors == {}


def test_fitting_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    fit(view, plan_of(2, 3), None, batches, method="projection")
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def test_patched_model_differs_only_at_the_patched_layer(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2, 3)
    patch = fit(view, plan, None, batches, method="projection")
    before = dict(view.model.state_dict())
    apply(view, plan, patch)
    new = plan.new_index[patch.notes["layer"]]
    for name, tensor in view.model.state_dict().items():
        if name == f"model.layers.{new}.mlp.down_proj.weight":
            assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan"), "automatic"])
def test_penalties_that_are_none_are_refused(
    view: DecoderView, batches: CalibrationBatches, penalty: object
):
    with pytest.raises(RecipeError, match=r"recovery\.options\.penalty"):
        fit(view, plan_of(2), None, batches, method="projection", penalty=penalty)


def test_relative_shifts_are_per_length_of_the_target(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2, 3)
    for shift in walk_shifts(view, plan, batches, None, all_of_them):
        mean_length = float(shift.lengths.mean())
        assert shift.size.relative == pytest.approx(shift.size.norm / mean_length, rel=1e-4)
        assert shift.size.before_cut == (shift.size.layer == 1)
    largest = find_largest_mean_shift(view, plan, batches, relative=True)
    others = [shift.size.relative for shift in walk_shifts(view, plan, batches, None, all_of_them)]
    assert largest.size.relative == pytest.approx(max(others), rel=1e-5)


def test_weights_divide_rows_by_the_length_of_their_target(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2, 3)
    plain, weighed = (next(walk_shifts(view, plan, batches, None, all_of_them)) for _ in range(2))
    weighed.weigh()
    scale = plain.lengths.mean() / plain.lengths
    torch.testing.assert_close(weighed.output.rows, plain.output.rows * scale)
    torch.testing.assert_close(weighed.residual.rows, plain.residual.rows * scale)


def test_a_named_place_is_taken_or_refused(view: DecoderView, batches: CalibrationBatches):
    patch = fit(view, plan_of(2, 3), None, batches, method="projection", place=4)
    assert patch.notes["layer"] == 4
    for place in (2, 0):  # dropped; in front of what the cuts change
        with pytest.raises(PlanError, match=f"place names layer {place}"):
            fit(view, plan_of(2, 3), None, batches, method="projection", place=place)


@pytest.mark.parametrize("place", ["largest-shift", "largest-relative-shift", "cuts", 4])
def test_a_guarded_projection_lowers_the_held_out_loss_or_is_not_done(
    view: DecoderView, batches: CalibrationBatches, place: str | int
):
    plan = plan_of(1, 3)
    options = {"place": place, "guard": True, "weights": "inverse-norm", "penalty": 0.1}
    patch = fit(view, plan, None, batches, method="projection", **options)
    notes = patch.notes
    judges = batches.input_ids[3:]
    with view.skipping(plan.dropped):
        assert mean_loss(view, judges, 2) == pytest.approx(notes["held_out_loss_without"])
        with view.patched(patch.tensors):
            assert mean_loss(view, judges, 2) == pytest.approx(notes["held_out_loss_with"])
    assert notes["accepted"] == bool(patch.tensors)
    assert notes["accepted"] == (notes["held_out_loss_with"] < notes["held_out_loss_without"])
    if notes["accepted"] and place == "cuts":
        assert notes["layer"] in (0, 2)


def test_cuts_without_a_guard_are_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match="needs guard: true"):
        fit(view, plan_of(2), None, batches, method="projection", place="cuts")
