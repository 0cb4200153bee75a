"""Hybrids need a layer with keys and values: refused before work, and kept out of every plan."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from family_configs import FAMILIES, HYBRID, LINEAR, ROTARY, Family
from layercut.errors import ModelError, PlanError
from layercut.models.load import load
from layercut.pipeline.inspect import inspect
from layercut.pipeline.prune_files import prune
from layercut.registry import resolve
from layercut.scoring.score import score_layers
from layercut.selection.cut_prices import find_cheapest_plans
from layercut.selection.methods.block import find_closest_block
from layercut.selection.methods.lowest import plan as plan_lowest
from layercut.selection.pattern import choose_lowest_in_pattern
from layercut.selection.select import Request, resolve_request
from layercut.types import CalibrationBatches, LayerScores
from saved_families import save_family

RANDOM = resolve("scoring", "random")
ONE_OF = frozenset({2, 4, 7})
N = 8


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention in layers 2, 4 and 7 of 8."""
    family = Family("qwen3_5_text", ROTARY | LINEAR | {"layer_types": HYBRID})
    return save_family(tmp_path_factory.mktemp("hybrid"), family)


def test_dropping_all_of_them_is_refused_before_work(hybrid: Path, tmp_path: Path) -> None:
    why = r"layers 2, 4, 7 cannot be dropped together: .*length of what it has cached"
    with pytest.raises(ModelError, match=why):
        prune(str(hybrid), tmp_path / "out", drop=[2, 4, 7])
    view = load(str(hybrid), dtype="float32")
    with pytest.raises(ModelError, match=why):
        resolve_request(view, scoring=RANDOM, strategy="lowest", drop=[1, 2, 4, 7])
    assert not (tmp_path / "out").exists()


def test_a_single_one_is_pinned(tmp_path: Path) -> None:
    types = ["linear_attention"] * 7 + ["full_attention"]
    family = Family("qwen3_5_text", ROTARY | LINEAR | {"layer_types": types})
    source = save_family(tmp_path / "source", family)
    assert "no other layer has any" in inspect(str(source)).layers[7].pinned
    with pytest.raises(
        ModelError, match="layer 7 cannot be dropped: transformers reads the length"
    ):
        prune(str(source), tmp_path / "out", drop=[7])


@pytest.mark.parametrize("name", ["jamba", "granitemoehybrid", "lfm2", "recurrent_gemma", "mamba"])
def test_every_hybrid_says_which_layers_count(tmp_path: Path, name: str) -> None:
    layout = load(str(save_family(tmp_path / "source", FAMILIES[name])), dtype="float32").layout
    expected = {
        "jamba": {1, 5, 9},
        "granitemoehybrid": {1, 4},
        "lfm2": {2, 4, 7},
        "recurrent_gemma": {2, 5},
        "mamba": set(),
    }
    assert layout.keep_one_of == expected[name]


def scored(values: list[float], *, rounds: str = "one-shot", n_drop: int = 3) -> tuple[int, ...]:
    request = Request(
        scoring=RANDOM,
        strategy="lowest",
        rounds=rounds,  # type: ignore[arg-type]
        n_drop=n_drop,
        keep_one_of=ONE_OF,
        scorer=lambda view, batches, call: LayerScores(
            tuple(None if i in view.skipped else v for i, v in enumerate(values))
        ),
    )

    class View:
        name, n_layers, skipped = "tiny", N, frozenset[int]()

        def skipping(self, dropped: list[int]) -> torch.no_grad:
            self.skipped = frozenset(dropped)
            return torch.no_grad()

    plan = plan_lowest(View(), None, request)  # type: ignore[arg-type]
    return plan(n_drop)[0].dropped


@pytest.mark.parametrize("rounds", ["one-shot", "each"])
def test_lowest_keeps_the_best_of_them(rounds: str) -> None:
    values = [8.0, 7.0, 1.0, 6.0, 3.0, 5.0, 4.0, 2.0]
    assert scored(values, rounds=rounds, n_drop=2) == (2, 7)
    assert scored(values, rounds=rounds, n_drop=3) == (2, 6, 7)
    assert scored(values, rounds=rounds, n_drop=4) == (2, 5, 6, 7)


def test_a_pattern_and_one_of_them_are_kept_together() -> None:
    types = (("a",), ("a",), ("b",)) * 3
    values = [random.Random(1).random() for _ in types]
    one_of = frozenset({2, 5, 8})
    fits = [
        dropped
        for dropped in itertools.combinations(range(9), 6)
        if not one_of <= set(dropped)
        and [types[i] for i in range(9) if i not in dropped] == list(types[:3])
    ]
    best = min(fits, key=lambda dropped: sum(values[i] for i in dropped))
    assert choose_lowest_in_pattern(values, types, 6, frozenset(), one_of) == best
    with pytest.raises(PlanError, match="no plan drops 7 of 9"):
        choose_lowest_in_pattern(values, types, 7, frozenset(), one_of)


def test_priced_plans_keep_one_of_them() -> None:
    generator = random.Random(3)
    prices = {(i, n): generator.random() for i in range(1, N) for n in range(1, N - i + 1)}
    for layer in ONE_OF:
        prices[layer, 1] = 0.0
    curve = find_cheapest_plans(prices, N, frozenset({0}), None, ONE_OF)
    free = find_cheapest_plans(prices, N, frozenset({0}))
    assert free[3][1] == (2, 4, 7)
    for cost, plan in curve.values():
        assert not set(plan) >= ONE_OF
        assert cost >= free[len(plan)][0]
    assert sorted(curve) == list(range(1, N - 1))


def test_a_block_does_not_hold_all_of_them() -> None:
    request = Request(scoring=RANDOM, strategy="block", keep_one_of=ONE_OF)
    assert find_closest_block([9.0, 9.0, 0.0], 6, request) == tuple(range(1, 7))
    with pytest.raises(PlanError, match="no block of 7 of 8"):
        find_closest_block([9.0, 9.0], 7, Request(scoring=RANDOM, keep_one_of=frozenset({2, 4})))


def test_a_request_that_leaves_none_of_them_is_impossible(hybrid: Path) -> None:
    view = load(str(hybrid), dtype="float32")
    with pytest.raises(PlanError, match="cannot drop 4 of 8 layers: 5 are protected"):
        resolve_request(
            view, scoring=RANDOM, strategy="lowest", drop_layers=4, protect=[0, 1, 3, 5]
        )


def test_a_search_never_tries_to_drop_them_all(
    hybrid: Path, batches: CalibrationBatches, tmp_path: Path
) -> None:
    view = load(str(hybrid), dtype="float32")
    request = resolve_request(view, scoring=RANDOM, strategy="lowest", search_size=True)
    assert request.keep_one_of == ONE_OF
    assert request.scorer is score_layers
    plan = plan_lowest(view, batches, request)
    for n_drop in range(1, 7):
        assert not set(plan(n_drop)[0].dropped) >= ONE_OF
    (tmp_path / "plan.json").write_text(json.dumps({"n_layers": 8, "dropped": [0, 2, 4]}))
    checks = prune(str(hybrid), tmp_path / "out", plan=tmp_path / "plan.json").checks
    assert checks[1] == "Cached logits equal uncached ones, and tokens are generated."
