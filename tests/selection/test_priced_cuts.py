"""Prices and plans: the shortest path against brute force, planted redundancy, the search."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from layercut.engine.residual_stream import ResidualStream
from layercut.errors import PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.models.writers import find_writers
from layercut.scoring.score import score
from layercut.selection import cut_prices
from layercut.selection.methods import priced_cuts
from layercut.selection.select import select
from layercut.types import CalibrationBatches, PruningPlan

N = 8


def random_prices(longest: int) -> cut_prices.Prices:
    generator = torch.Generator().manual_seed(longest)
    return {
        (start, length): float(torch.rand(1, generator=generator)) * length
        for start in range(1, N)
        for length in range(1, min(longest, N - start) + 1)
    }


@pytest.mark.parametrize("longest", [1, 3, 7])
@pytest.mark.parametrize("protect", [frozenset({0}), frozenset({0, 3})])
def test_cheapest_plans_equal_brute_force(longest: int, protect: frozenset[int]):
    prices = random_prices(longest)
    curve = cut_prices.find_cheapest_plans(prices, N, protect)
    for n_dropped in range(1, N):
        free = [layer for layer in range(N) if layer not in protect]
        costs = {
            plan: sum(prices[cut] for cut in PruningPlan("", N, plan, "").cuts)
            for plan in itertools.combinations(free, n_dropped)
            if prices.keys() >= set(PruningPlan("", N, plan, "").cuts)
        }
        assert (n_dropped in curve) == bool(costs)
        if costs:
            cost, plan = curve[n_dropped]
            assert cost == pytest.approx(min(costs.values()))
            assert costs[plan] == pytest.approx(cost)


def test_neighbours_differ_in_one_layer():
    plans = priced_cuts.list_neighbours((2, 3), 6, frozenset({0}))
    assert set(plans) == {(1, 3), (3, 4), (3, 5), (1, 2), (2, 4), (2, 5)}


def test_a_plan_costs_its_cuts():
    prices = {(1, 2): 5.0, (4, 1): 2.0}
    assert priced_cuts.plan_price((1, 2, 4), prices) == 7.0


@pytest.mark.parametrize("planted", [2, 4])
def test_planted_redundancy_is_priced_lowest(
    view: DecoderView, batches: CalibrationBatches, planted: int
):
    view.layers[planted].input_layernorm.weight.data.zero_()
    view.layers[planted].post_attention_layernorm.weight.data.zero_()
    dense = ResidualStream(view, batches, remember=True)
    slopes, _ = cut_prices.sensitivities(view, batches, dense)
    prices = cut_prices.price_cuts(view, batches, dense, slopes, 3, find_writers(view))
    assert prices[planted, 1] == 0.0
    assert cut_prices.find_cheapest_plans(prices, 6, frozenset({0}))[1] == (0.0, (planted,))


def test_price_by_hand(view: DecoderView, batches: CalibrationBatches):
    # A silent MLP before the cut leaves D = 0: the price is Σ‖∇h_3‖·‖h_3 − h_2‖ on held-out tokens.
    view.layers[1].post_attention_layernorm.weight.data.zero_()
    dense = ResidualStream(view, batches, remember=True)
    slopes, _ = cut_prices.sensitivities(view, batches, dense)
    prices = cut_prices.price_cuts(view, batches, dense, slopes, 1, find_writers(view))
    change = (dense.history[3].rows - dense.history[2].rows).norm(dim=1)
    expected = float((slopes[3] * change)[-batches.seq_len :].sum())
    assert prices[2, 1] == pytest.approx(expected, rel=1e-5)


def test_evidence_holds_the_residual_sensitivity(view: DecoderView, batches: CalibrationBatches):
    plan, evidence = select(
        view, batches, strategy="priced-cuts", scoring="residual-sensitivity", drop_layers=2
    )
    expected = score(view, batches, method="residual-sensitivity")
    assert evidence.scores[0].values == pytest.approx(expected.values, rel=1e-4)
    assert set(plan.curve) == {1, 2, 3, 4, 5}
    assert 0 not in plan.dropped


def test_selection_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    select(view, batches, strategy="priced-cuts", scoring="residual-sensitivity", drop_layers=2)
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def test_the_search_never_returns_a_worse_plan(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(priced_cuts, "PLANS_TRIED", 4)
    dense = ResidualStream(view, batches, remember=True)
    for layer in range(view.n_layers):
        dense.advance(layer)
    prices = {(i, n): 1.0 for i in range(1, 6) for n in range(1, 7 - i)}
    loss_of = partial(priced_cuts.plan_loss, view, batches, dense, find_writers(view))
    best, losses = priced_cuts.search(loss_of, 6, [(1, 2)], prices, frozenset({0}))
    assert losses[best] == min(losses.values())
    assert len(losses) == 4


def test_another_score_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match=r"needs scoring\.method residual-sensitivity"):
        select(view, batches, strategy="priced-cuts", scoring="gradmap", drop_layers=2)


def test_protected_layers_that_leave_no_plan_are_an_error(
    view: DecoderView, batches: CalibrationBatches
):
    with pytest.raises(PlanError, match="no plan drops 4 of 6 layers"):
        select(
            view,
            batches,
            strategy="priced-cuts",
            scoring="residual-sensitivity",
            drop_layers=4,
            protect=[3, 5],
        )
