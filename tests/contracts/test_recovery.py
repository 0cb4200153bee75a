"""What holds for every recovery: a new file of recovery/methods joins by existing."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from conftest import plan_of
from contract_models import FAMILIES, cheap_call, open_family
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import ModelError, PlanError, RecipeError
from layercut.models.check_method import check_method
from layercut.models.view import DecoderView
from layercut.pipeline.prepare import resolve_methods
from layercut.recipe.recipe import Recipe
from layercut.recovery.fit import fit, fit_repair
from layercut.recovery.runtime_maps import applied_maps
from layercut.registry import available, describe
from layercut.training.resume import model_hash
from layercut.types import CalibrationBatches, RuntimeMaps, WeightPatch
from pretended_gpu import pretended_gpu

METHODS = available("recovery")
PLAN = plan_of(2, 3)


def tensors_of(repair: WeightPatch | RuntimeMaps) -> dict[str, Tensor]:
    if isinstance(repair, RuntimeMaps):
        return {str(layer): matrix for layer, matrix in repair.maps.items()}
    return dict(repair.tensors)


def assert_equal(first: WeightPatch | RuntimeMaps, second: WeightPatch | RuntimeMaps) -> None:
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=0)


@pytest.fixture(scope="module", params=FAMILIES)
def family_view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return open_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("method", METHODS)
def test_repairs_are_pure_repeatable_and_of_kept_weights_or_refused_early(
    family_view: DecoderView, batches: CalibrationBatches, method: str
):
    view, call = family_view, cheap_call("recovery", method)
    before = model_hash(view)
    try:
        check_method(call, view, batches, 2)
    except ModelError as error:
        family = view.layout.model_type
        assert re.search(rf"'{family}'|this {family} model", str(error))
        assert model_hash(view) == before
        return
    repair = fit_repair(view, PLAN, None, batches, call)
    if not call.method.needs_tasks or view.layout.model_type == "llama":  # training takes seconds
        assert_equal(fit_repair(view, PLAN, None, batches, call), repair)
    assert model_hash(view) == before and not view.skipped
    assert isinstance(repair, WeightPatch) == call.method.stores
    assert repair.method == method
    if isinstance(repair, WeightPatch):
        state = view.model.state_dict()
        for name, tensor in repair.tensors.items():
            assert tensor.shape == state[name].shape
            assert view.layout.new_name(name, PLAN.new_index) is not None, "a dropped layer's"
    else:
        assert set(repair.maps) == {1}
        with view.skipping(PLAN.dropped), applied_maps(view, PLAN, repair):
            assert bool(view.token_losses(batches.input_ids).isfinite().all())
    assert model_hash(view) == before


@pytest.mark.parametrize(
    "method", [m for m in METHODS if describe("recovery", m).shares_dense_stream]
)
def test_a_shared_dense_stream_changes_nothing(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    call = cheap_call("recovery", method)
    dense = ResidualStream(view, batches, remember=True)
    alone = fit_repair(view, PLAN, None, batches, call)
    for _ in range(2):
        assert_equal(fit_repair(view, PLAN, None, batches, call, dense=dense), alone)


@pytest.mark.parametrize("method", METHODS)
def test_a_recovery_that_needs_a_layer_before_the_cut_refuses_a_plan_without(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    call = cheap_call("recovery", method)
    if not call.method.needs_previous_layer:
        fit_repair(view, plan_of(0), None, batches, call)
        return
    with pytest.raises(PlanError, match=rf"{method} needs a kept layer before every cut"):
        fit_repair(view, plan_of(0), None, batches, call)


@pytest.mark.parametrize("method", [m for m in METHODS if not describe("recovery", m).stores])
def test_what_no_checkpoint_holds_is_refused_outside_of_compare(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    refusal = rf"recovery '{method}' adds an operation at run time that no checkpoint holds"
    with pytest.raises(RecipeError, match=refusal):
        fit(view, PLAN, None, batches, method=method)
    with pytest.raises(RecipeError, match=refusal):
        resolve_methods(Recipe(model="m", recovery={"method": method}))


@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if not describe("recovery", m).needs_tasks and m != "refit"],
)
def test_nothing_of_the_machines_memory_meets_a_gpu(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    call = cheap_call("recovery", method)
    expected = fit_repair(view, PLAN, None, batches, call)
    with pretended_gpu() as gpu:
        gpu.put(view.model)
        repair = fit_repair(view, PLAN, None, batches, call)
        if isinstance(repair, RuntimeMaps):
            with view.skipping(PLAN.dropped), applied_maps(view, PLAN, repair):
                view.token_losses(batches.input_ids)
    assert_equal(repair, expected)
