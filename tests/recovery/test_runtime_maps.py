"""Operations at the cuts: both recoveries that fit them, and the model while they apply."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.errors import PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.runtime_maps import applied_maps
from layercut.registry import available, describe
from layercut.types import CalibrationBatches, RuntimeMaps
from repairs import fitted_maps

METHODS = ["linear-patch", "ghost"]


def test_these_are_all_that_no_checkpoint_holds():
    stored = {name for name in available("recovery") if describe("recovery", name).stores}
    assert {*available("recovery")} - stored == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_a_fit_that_is_to_be_stored_refuses_them(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    with pytest.raises(RecipeError, match=f"'{method}' adds an operation at run time that no"):
        fit(view, plan_of(2), None, batches, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_repair_changes_nothing(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    view.layers[2].input_layernorm.weight.data.zero_()
    view.layers[2].post_attention_layernorm.weight.data.zero_()
    (matrix,) = fitted_maps(view, plan_of(2), batches, method).maps.values()
    torch.testing.assert_close(matrix, torch.eye(16), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_operations_act_on_the_stream_at_every_cut(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    plan = plan_of(1, 3, 4)
    repair = fitted_maps(view, plan, batches, method)
    assert list(repair.maps) == [0, 2]
    inputs = view.embed(batches.input_ids)
    hidden = inputs.hidden
    with torch.no_grad():
        for layer in plan.kept:
            hidden = view.run_layer(layer, hidden, inputs)
            if layer in repair.maps:
                hidden = hidden @ repair.maps[layer]
        expected = view.model.lm_head(view.model.model.norm(hidden))
        before = view.model(batches.input_ids, use_cache=False).logits
        with view.skipping(plan.dropped), applied_maps(view, plan, repair):
            found = view.model(batches.input_ids, use_cache=False).logits
        torch.testing.assert_close(found, expected)
        assert torch.equal(view.model(batches.input_ids, use_cache=False).logits, before)


def test_the_stream_keeps_its_precision_under_autocast(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        view.skipping(range(6)),
        applied_maps(view, plan, RuntimeMaps({1: torch.eye(16)}, "by hand")),
    ):
        hidden = view.embed(batches.input_ids).hidden
        assert torch.equal(view.layers[1](hidden), hidden)


@pytest.mark.parametrize("method", METHODS)
def test_a_cut_without_a_preceding_layer_is_refused(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    with pytest.raises(PlanError, match=f"{method} needs a kept layer before every cut"):
        fitted_maps(view, plan_of(0, 1), batches, method)


def test_operations_of_another_plan_are_refused(view: DecoderView):
    with (
        pytest.raises(PlanError, match="behind layer 3, where the plan has no cut"),
        applied_maps(view, plan_of(2), RuntimeMaps({3: torch.eye(16)}, "by hand")),
    ):
        raise AssertionError("the block must not run")
