"""ReplaceMe's map: by hand, against least squares, on planted data, cut after cut."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.errors import NumericsError, PlanError, RecipeError
from layercut.models.hooks import capture
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.layer_fit import mean_squared_errors
from layercut.recovery.methods.linear_map import _map_outputs, fit_linear_map
from layercut.spool import Spool
from layercut.types import CalibrationBatches
from spools import spool


def repair(
    outputs: Spool, mlp: Spool, targets: Spool, alpha: float
) -> tuple[torch.Tensor, tuple[float, float]]:
    """What a fit does at one cut; ``outputs``, y + m, are changed to y + m·T."""
    missing = spool(targets.rows - outputs.rows)
    projection = fit_linear_map(missing, mlp, alpha)
    errors = mean_squared_errors(missing, mlp, projection)
    _map_outputs(outputs, mlp, projection)
    return projection, errors


def random_rows(n: int = 400, width: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    m, y = (torch.randn(n, width, generator=generator) for _ in range(2))
    planted = torch.randn(width, width, generator=generator)
    return m, y, y + m @ planted, planted


def test_map_by_hand():
    # d = 1: m = (1, 1), target − y = (3, 3): Σmm = 2, Σm(target − y) = 6;
    # α = 0: T = 3; α = 0.5: α̂ = 0.5·2/1 = 1, T = 6/(2 + 1) = 2
    ones = torch.ones(2, 1)
    for alpha, expected in ((0.0, 3.0), (0.5, 2.0)):
        assert float(fit_linear_map(spool(2 * ones), spool(ones), alpha)) == pytest.approx(expected)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_map_equals_stacked_least_squares(alpha: float):
    m, y, target, _ = random_rows()
    target = target + 0.3 * torch.randn(target.shape, generator=torch.manual_seed(1))
    ridge = (alpha * float(m.double().square().sum()) / 8) ** 0.5
    # ‖target − y − m·T‖² + ridge²·‖T‖² is plain least squares with ridge·I below m.
    rows = torch.cat([m.double(), ridge * torch.eye(8, dtype=torch.float64)])
    sides = torch.cat([(target - y).double(), torch.zeros(8, 8, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, sides).solution.T
    solved = fit_linear_map(spool(target - y - m), spool(m), alpha)
    torch.testing.assert_close(solved, expected, rtol=1e-4, atol=1e-5)


def test_planted_map_is_found_and_its_output_follows():
    m, y, target, planted = random_rows()
    outputs = spool(y + m)
    projection, (before, after) = repair(outputs, spool(m), spool(target), 0.0)
    torch.testing.assert_close(projection.float(), planted.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.rows, target, rtol=1e-4, atol=1e-4)
    assert after < 1e-6 * before


def test_the_penalty_does_not_depend_on_tokens_or_scale():
    m, y, target, _ = random_rows()
    missing = target - y - m
    once = fit_linear_map(spool(missing), spool(m), 0.3)
    twice = fit_linear_map(spool(torch.cat([missing] * 2)), spool(torch.cat([m] * 2)), 0.3)
    scaled = fit_linear_map(spool(10 * missing), spool(10 * m), 0.3)
    torch.testing.assert_close(twice, once, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scaled, once, rtol=1e-5, atol=1e-6)


def test_a_strong_penalty_removes_the_mlp():
    m, y, target, _ = random_rows()
    assert float(fit_linear_map(spool(target - y - m), spool(m), 1e9).abs().max()) < 1e-6


def test_a_silent_mlp_changes_nothing():
    zeros = torch.zeros(10, 3)
    assert torch.equal(
        fit_linear_map(spool(torch.ones(10, 3)), spool(zeros), 0.0),
        torch.eye(3, dtype=torch.float64),
    )


def test_fewer_tokens_than_dimensions_still_have_a_solution():
    m, y, target, _ = random_rows(n=5)
    outputs = spool(y + m)
    repair(outputs, spool(m), spool(target), 0.0)
    torch.testing.assert_close(outputs.rows, target, rtol=1e-3, atol=1e-3)


def test_activations_that_are_not_finite_are_an_error():
    with pytest.raises(NumericsError, match="not finite"):
        fit_linear_map(spool(torch.ones(4, 2)), spool(torch.full((4, 2), float("nan"))), 0.0)


def test_every_cut_is_fitted_in_the_model_repaired_so_far(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(1, 3, 4)
    patch = fit(view, plan, None, batches, method="linear-map", alpha=0.01)
    assert [cut["layer"] for cut in patch.notes["cuts"]] == [0, 2]
    assert set(patch.tensors) == {f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 2)}
    # The second map once more, from plain forward passes of the model with the first one.
    dense = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    target = dense.hidden_states[5].flatten(0, 1).double()
    first = "model.layers.0.mlp.down_proj.weight"
    seen: list[torch.Tensor] = []
    with (
        view.skipping(plan.dropped),
        view.patched({first: patch.tensors[first]}),
        capture(view.layers[2].mlp, lambda _, output: seen.append(output)),
        capture(view.layers[2], lambda _, output: seen.append(output)),
    ):
        view.model(batches.input_ids, use_cache=False)
    m, output = (rows.flatten(0, 1).double() for rows in seen)
    ridge = (0.01 * m.square().sum() / 16) ** 0.5
    rows = torch.cat([m, ridge * torch.eye(16, dtype=torch.float64)])
    sides = torch.cat([target - (output - m), torch.zeros(16, 16, dtype=torch.float64)])
    expected = (
        torch.linalg.lstsq(rows, sides).solution.T @ view.layers[2].mlp.down_proj.weight.double()
    )
    found = patch.tensors["model.layers.2.mlp.down_proj.weight"].double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_reported_error_is_that_of_the_patched_model(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(1, 3, 4)
    patch = fit(view, plan, None, batches, method="linear-map")
    dense = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        pruned = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    for cut in patch.notes["cuts"]:
        layer = cut["layer"]
        gap = dense.hidden_states[plan.target_of(layer)] - pruned.hidden_states[layer + 1]
        error = float(gap.square().sum(dim=-1).mean())
        assert cut["squared_error"] == pytest.approx(error, rel=1e-3)
        assert cut["squared_error"] < cut["squared_error_before"]


def test_fitting_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    fit(view, plan_of(2, 3), None, batches, method="linear-map")
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def test_a_cut_without_a_preceding_layer_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(PlanError, match="linear-map needs a kept layer before every cut"):
        fit(view, plan_of(0), None, batches, method="linear-map")


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf"), "held-out"])
def test_penalties_that_are_none_are_refused(
    view: DecoderView, batches: CalibrationBatches, alpha: object
):
    with pytest.raises(RecipeError, match=r"recovery\.options\.alpha"):
        fit(view, plan_of(2), None, batches, method="linear-map", alpha=alpha)
