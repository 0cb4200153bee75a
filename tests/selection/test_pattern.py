from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from transformers import AutoConfig

from conftest import save_tiny
from layercut.checkpoints.layer_types import derive_layer_types, read_layer_types
from layercut.errors import PlanError, RecipeError
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.selection.cut_prices import find_cheapest_plans
from layercut.selection.methods.lowest import choose_lowest
from layercut.selection.pattern import choose_lowest_in_pattern, keeps_pattern, pattern_to_keep
from layercut.selection.select import select
from layercut.types import CalibrationBatches

# Two local layers, then a global one, as Gemma 3 has five and one.
LAYER_TYPES = (("local",), ("local",), ("global",)) * 3
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}


def all_that_fit(n_drop: int, protect: frozenset[int] = frozenset()) -> list[tuple[int, ...]]:
    choices = itertools.combinations(sorted(set(range(len(LAYER_TYPES))) - protect), n_drop)
    return [dropped for dropped in choices if keeps_pattern(LAYER_TYPES, dropped)]


def test_what_keeps_a_pattern() -> None:
    assert keeps_pattern(LAYER_TYPES, (0, 1, 2))  # a whole period
    assert keeps_pattern(LAYER_TYPES, (1, 2, 3))  # and any shift of it: local, | local, global, …
    assert keeps_pattern(LAYER_TYPES, (8,))  # the end follows from the start
    assert not keeps_pattern(LAYER_TYPES, (2,))
    assert not keeps_pattern(LAYER_TYPES, (0, 3))
    assert keeps_pattern(None, (2,))


@pytest.mark.parametrize("n_drop", range(1, 7))
@pytest.mark.parametrize("protect", [frozenset(), frozenset({0, 7})])
def test_the_cheapest_choice_is_found(n_drop: int, protect: frozenset[int]) -> None:
    values = [random.Random(n_drop).random() for _ in LAYER_TYPES]
    possible = all_that_fit(n_drop, protect)
    if not possible:
        with pytest.raises(PlanError, match="preserves the pattern of unlike layers"):
            choose_lowest_in_pattern(values, LAYER_TYPES, n_drop, protect)
        return
    best = min(possible, key=lambda dropped: sum(values[i] for i in dropped))
    assert choose_lowest_in_pattern(values, LAYER_TYPES, n_drop, protect) == best


def test_without_a_pattern_the_lowest_scores_go() -> None:
    values = [3.0, 1.0, 2.0, 0.5, 4.0]
    alike = (("same",),) * 5
    assert list(choose_lowest_in_pattern(values, alike, 2, frozenset({3}))) == [1, 2]
    assert choose_lowest(values, 2, protect=frozenset({3}))[0] == [1, 2]


def test_priced_plans_keep_the_pattern() -> None:
    generator = random.Random(3)
    prices = {(i, n): generator.random() for i in range(1, 9) for n in range(1, 9 - i + 1)}
    curve = find_cheapest_plans(prices, 9, frozenset({0}), LAYER_TYPES)
    free = find_cheapest_plans(prices, 9, frozenset({0}))
    for n_drop in free:
        possible = all_that_fit(n_drop, frozenset({0}))
        assert (n_drop in curve) == bool(possible)
        if possible:
            cost, plan = curve[n_drop]
            assert plan in possible
            assert cost >= free[n_drop][0]


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "smollm3", "cohere2", "gpt_oss"])
def test_patterns_by_position_are_told_from_shifted_ones(model_type: str) -> None:
    settings = {"num_hidden_layers": 12}
    config = AutoConfig.for_model(model_type, **settings)
    layer_types = read_layer_types(config)
    assert len(set(layer_types)) > 1
    assert derive_layer_types(config) == layer_types
    shifted = {k: v[1:] for k in ("layer_types", "no_rope_layers") if (v := getattr(config, k, 0))}
    config = AutoConfig.for_model(model_type, num_hidden_layers=11, **shifted)
    assert derive_layer_types(config) != read_layer_types(config)


def test_llama_has_no_pattern_to_keep(view: DecoderView, batches: CalibrationBatches) -> None:
    assert pattern_to_keep(view, 2) is None
    options = {"strategy": "lowest", "scoring": "reverse-order", "drop_layers": 2}
    kept = select(view, batches, preserve_pattern=True, **options)[0]
    assert kept.dropped == select(view, batches, **options)[0].dropped


def test_counts_of_layers_follow_any_drop(tmp_path: Path) -> None:
    view = load(str(save_tiny(tmp_path, "qwen2", **WINDOWS)))
    assert len(set(read_layer_types(view.model.config))) == 2
    assert pattern_to_keep(view, 2, rounds="each") is None


def test_patterns_that_engines_do_not_derive_cannot_be_preserved(tmp_path: Path) -> None:
    types = ["sliding_attention", "full_attention"] * 3
    view = load(str(save_tiny(tmp_path, "qwen2", **WINDOWS, layer_types=types)))
    with pytest.raises(PlanError, match="itself has another pattern than engines derive"):
        pattern_to_keep(view, 2)


@pytest.fixture
def patterned(view: DecoderView, monkeypatch: pytest.MonkeyPatch) -> DecoderView:
    """The tiny Llama as if its layers were local, global, local, global …"""
    layer_types = (("local",), ("global",)) * 3
    monkeypatch.setattr("layercut.selection.pattern._types_by_position", lambda _: layer_types)
    return view


@pytest.mark.parametrize(
    "how",
    [
        {"strategy": "lowest", "scoring": "gradmap"},
        {"strategy": "priced-cuts", "scoring": "residual-sensitivity"},
        {"strategy": "block", "scoring": "angular-distance"},
    ],
)
def test_all_strategies_keep_the_pattern(
    patterned: DecoderView, batches: CalibrationBatches, how: dict[str, str]
) -> None:
    for n_drop in (1, 2, 3, 4):
        plan, _ = select(patterned, batches, drop_layers=n_drop, preserve_pattern=True, **how)
        assert len(plan.dropped) == n_drop
        assert keeps_pattern((("local",), ("global",)) * 3, plan.dropped)


def test_settings_that_cannot_keep_a_pattern_are_refused(
    patterned: DecoderView, batches: CalibrationBatches
) -> None:
    with pytest.raises(PlanError, match="whole periods"):
        select(patterned, batches, drop=[2], preserve_pattern=True)
    with pytest.raises(PlanError, match="no plan drops 1 of 6 layers"):
        pattern_to_keep(patterned, 1, protect=[5])
    with pytest.raises(RecipeError, match=r"selection.rounds: each cannot preserve"):
        pattern_to_keep(patterned, 2, rounds="each")
    with pytest.raises(RecipeError, match=r"selection.max_perplexity_ratio cannot preserve"):
        pattern_to_keep(patterned, None)
