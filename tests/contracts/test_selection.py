"""What holds for every selection: a new file of selection/methods joins by existing."""

from __future__ import annotations

import pytest

from contract_models import FAMILIES, cheap_call, open_family
from layercut.errors import ModelError, PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.registry import available, describe
from layercut.selection.select import (
    Request,
    check_scoring,
    choose_layers,
    plan_sizes,
    resolve_request,
)
from layercut.training.resume import model_hash
from layercut.types import CalibrationBatches

METHODS = available("selection")


def request_of(view: DecoderView, strategy: str, **settings: object) -> Request:
    scoring = describe("selection", strategy).needs_scoring or "block-influence"
    call = cheap_call("scoring", scoring)
    return resolve_request(view, scoring=call, strategy=strategy, **settings)


@pytest.fixture(scope="module", params=FAMILIES)
def family_view(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return open_family(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("strategy", METHODS)
def test_plans_are_pure_repeatable_and_of_the_size_asked_for_or_refused(
    family_view: DecoderView, batches: CalibrationBatches, strategy: str
):
    view, family = family_view, family_view.layout.model_type
    before = model_hash(view)
    request = request_of(view, strategy, drop_layers=2, protect=[3])
    try:
        plan, evidence = choose_layers(view, batches, request)
    except (ModelError, PlanError) as error:
        assert family in str(error) or "layers" in str(error)
        assert model_hash(view) == before
        return
    again, _ = choose_layers(view, batches, request)
    assert plan == again
    assert model_hash(view) == before and not view.skipped
    assert len(plan.dropped) == 2 and 3 not in plan.dropped
    assert plan.rounds and len(evidence.scores) == len(plan.rounds)
    assert plan.fingerprint == evidence.scores[-1].fingerprint


@pytest.mark.parametrize("strategy", METHODS)
def test_sizes_share_what_is_computed_and_agree_with_single_ones(
    view: DecoderView, batches: CalibrationBatches, strategy: str
):
    plan_of_size = plan_sizes(view, batches, request_of(view, strategy, search_size=True))
    for size in (3, 1):
        alone, _ = choose_layers(view, batches, request_of(view, strategy, drop_layers=size))
        assert plan_of_size(size)[0].dropped == alone.dropped


@pytest.mark.parametrize("strategy", METHODS)
def test_a_score_that_a_strategy_cannot_use_is_refused_by_name(strategy: str):
    needed = describe("selection", strategy).needs_scoring
    if needed is None:
        check_scoring(strategy, "gradmap")
        return
    with pytest.raises(
        RecipeError, match=rf"{strategy} needs scoring.method {needed}, not gradmap"
    ):
        check_scoring(strategy, "gradmap")
