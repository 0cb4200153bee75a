"""Operations at the cuts: references, planted maps, and the model they give while they apply."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.errors import PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.recovery.runtime_maps import fit_unfoldable, ghost, hadamard, linear_patch, unfolded
from layercut.spool import Spool
from layercut.types import CalibrationBatches


def spool(rows: torch.Tensor) -> Spool:
    filled = Spool(*rows.shape)
    filled.write(0, rows)
    return filled


def random_rows(n: int = 400, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator)
    planted = torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator)
    return x, planted


@pytest.mark.parametrize("width", [1, 2, 8, 12, 16, 24, 576])
def test_hadamard_is_orthogonal_and_even(width: int):
    matrix = hadamard(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), rtol=0, atol=1e-5)
    largest = max(2**i for i in range(11) if width % 2**i == 0)
    values = set(matrix.abs().flatten().tolist())
    assert max(values) == pytest.approx(largest**-0.5)
    assert int((matrix != 0).sum()) == width * largest


def test_hadamard_by_hand():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * hadamard(4)).tolist() == expected
    # 6 = 3 blocks of 2
    assert (2**0.5 * hadamard(6)[2]).tolist() == pytest.approx([0, 0, 1, 1, 0, 0])


def test_ghost_equals_stacked_least_squares():
    x, planted = random_rows()
    target = x @ planted + 0.2 * torch.randn(x.shape, generator=torch.manual_seed(1))
    ridge = (0.1 * float(x.double().square().sum()) / 8) ** 0.5
    rows = torch.cat([x.double(), ridge * torch.eye(8, dtype=torch.float64)])
    sides = torch.cat([(target - x).double(), torch.zeros(8, 8, dtype=torch.float64)])
    expected = torch.eye(8) + torch.linalg.lstsq(rows, sides).solution.float()
    torch.testing.assert_close(ghost(spool(x), spool(target), 0.1), expected, rtol=1e-4, atol=1e-5)


def test_ghost_finds_a_planted_map():
    x, planted = random_rows()
    found = ghost(spool(x), spool(x @ planted), 1e-9)
    torch.testing.assert_close(found, planted, rtol=1e-4, atol=1e-4)


def test_linear_patch_finds_a_planted_gain():
    x, _ = random_rows()
    rotation = hadamard(8)
    gains = torch.linspace(0.5, 2, 8)
    planted = rotation @ torch.diag(gains) @ rotation.T
    found = linear_patch(spool(x), spool(x @ planted), 50)
    torch.testing.assert_close(found, planted, rtol=1e-4, atol=1e-5)


def test_linear_patch_by_hand():
    # d = 2: x = (1, 0), target = (0, 2): x·H = (1, 1)/√2, target·H = (2, −2)/√2: r = (2, 2)
    found = linear_patch(spool(torch.tensor([[1.0, 0.0]])), spool(torch.tensor([[0.0, 2.0]])), 1)
    torch.testing.assert_close(found, 2 * torch.eye(2))


@pytest.mark.parametrize("method", ["linear-patch", "ghost"])
def test_nothing_to_repair_changes_nothing(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    view.layers[2].input_layernorm.weight.data.zero_()
    view.layers[2].post_attention_layernorm.weight.data.zero_()
    (matrix,) = fit_unfoldable(view, plan_of(2), batches, method).values()
    torch.testing.assert_close(matrix, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["linear-patch", "ghost"])
def test_operations_act_on_the_stream_at_every_cut(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    plan = plan_of(1, 3, 4)
    operations = fit_unfoldable(view, plan, batches, method)
    assert list(operations) == [0, 2]
    inputs = view.embed(batches.input_ids)
    hidden = inputs.hidden
    with torch.no_grad():
        for layer in plan.kept:
            hidden = view.run_layer(layer, hidden, inputs)
            if layer in operations:
                hidden = hidden @ operations[layer]
        expected = view.model.lm_head(view.model.model.norm(hidden))
        before = view.model(batches.input_ids, use_cache=False).logits
        with view.skipping(plan.dropped), unfolded(view, plan, operations):
            found = view.model(batches.input_ids, use_cache=False).logits
        torch.testing.assert_close(found, expected)
        assert torch.equal(view.model(batches.input_ids, use_cache=False).logits, before)


def test_ghosts_are_fitted_in_the_model_repaired_so_far(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(1, 3, 4)
    operations = fit_unfoldable(view, plan, batches, "ghost", epsilon=1e-3)
    states = view.model(batches.input_ids, output_hidden_states=True, use_cache=False).hidden_states
    target = states[5].flatten(0, 1).double()
    first = {0: operations[0]}
    with view.skipping(plan.dropped), unfolded(view, plan, first):
        pruned = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    x = pruned.hidden_states[3].flatten(0, 1).double()
    ridge = (1e-3 * x.square().sum() / 16) ** 0.5
    rows = torch.cat([x, ridge * torch.eye(16, dtype=torch.float64)])
    sides = torch.cat([target - x, torch.zeros(16, 16, dtype=torch.float64)])
    expected = torch.eye(16) + torch.linalg.lstsq(rows, sides).solution.float()
    torch.testing.assert_close(operations[2], expected, rtol=1e-3, atol=1e-4)


def test_the_stream_keeps_its_precision_under_autocast(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        view.skipping(range(6)),
        unfolded(view, plan, {1: torch.eye(16)}),
    ):
        hidden = view.embed(batches.input_ids).hidden
        assert torch.equal(view.layers[1](hidden), hidden)


@pytest.mark.parametrize("method", ["linear-patch", "ghost"])
def test_a_cut_without_a_preceding_layer_is_refused(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    with pytest.raises(PlanError, match=f"{method} needs a kept layer before every cut"):
        fit_unfoldable(view, plan_of(0, 1), batches, method)


def test_unknown_methods_and_penalties_are_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match="unknown method 'ghots'; did you mean 'ghost'"):
        fit_unfoldable(view, plan_of(2), batches, "ghots")
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match="must be a number above 0"):
            fit_unfoldable(view, plan_of(2), batches, "ghost", epsilon=epsilon)


def test_operations_of_another_plan_are_refused(view: DecoderView):
    with (
        pytest.raises(PlanError, match="behind layer 3, where the plan has no cut"),
        unfolded(view, plan_of(2), {3: torch.eye(16)}),
    ):
        raise AssertionError("the block must not run")
