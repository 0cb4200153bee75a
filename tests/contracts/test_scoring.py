"""What holds for every scoring: a new file of scoring/methods joins by existing."""

from __future__ import annotations

import re

import pytest
import torch

from contract_models import FAMILIES, cheap_call, open_family
from layercut.errors import ModelError
from layercut.models.check_method import check_method
from layercut.models.view import DecoderView
from layercut.registry import available, describe
from layercut.scoring.score import score_layers
from layercut.training.resume import model_hash
from layercut.types import CalibrationBatches
from pretended_gpu import pretended_gpu

METHODS = available("scoring")


@pytest.fixture(scope="module", params=FAMILIES)
def family_view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return open_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_pure_repeatable_and_complete_or_refused_early(
    family_view: DecoderView, batches: CalibrationBatches, method: str
):
    view, call = family_view, cheap_call("scoring", method)
    before = model_hash(view)
    try:
        check_method(call, view, batches, 2)
    except ModelError as error:
        assert re.search(rf"{call.name}|this {view.layout.model_type} model", str(error))
        assert model_hash(view) == before
        return
    first = score_layers(view, batches, call)
    if not call.method.needs_tasks or view.layout.model_type == "llama":  # training takes seconds
        assert score_layers(view, batches, call).values == first.values
    assert model_hash(view) == before
    assert len(first.values) == view.n_layers
    assert all(isinstance(value, float) for value in first.values)
    assert (first.method, first.options) == (method, call.options.model_dump(mode="json"))
    assert len(first.fingerprint) == 64
    assert not view.skipped


@pytest.mark.parametrize("method", METHODS)
def test_a_skipped_layer_has_no_score(view: DecoderView, batches: CalibrationBatches, method: str):
    with view.skipping([1, 4]):
        values = score_layers(view, batches, cheap_call("scoring", method)).values
    assert [layer for layer, value in enumerate(values) if value is None] == [1, 4]


@pytest.mark.parametrize("method", [m for m in METHODS if not describe("scoring", m).needs_tasks])
def test_nothing_of_the_machines_memory_meets_a_gpu(
    view: DecoderView, batches: CalibrationBatches, method: str
):
    call = cheap_call("scoring", method)
    expected = score_layers(view, batches, call)
    with pretended_gpu() as gpu:
        gpu.put(view.model)
        assert score_layers(view, batches, call).values == expected.values


@pytest.mark.parametrize("method", [m for m in METHODS if not describe("scoring", m).needs_tasks])
def test_micro_batches_do_not_matter(view: DecoderView, ids: torch.Tensor, method: str):
    call = cheap_call("scoring", method)
    whole, parts = (CalibrationBatches(ids, 4, n, "test", "0") for n in (4, 1))
    expected = score_layers(view, whole, call).values
    assert score_layers(view, parts, call).values == pytest.approx(expected, rel=1e-4)
