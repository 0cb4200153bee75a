"""Names of methods, and what they stand for."""

from __future__ import annotations

from typing import get_args

import pytest

from layercut.comparison.entries import (
    CHOICES,
    DEFAULT,
    PRESETS,
    UNFOLDABLE,
    parse_methods,
    recoveries,
)
from layercut.errors import RecipeError
from layercut.recovery.runtime_maps import Unfoldable
from layercut.registry import available, load_method
from layercut.selection.select import check_scoring


def test_every_choice_and_preset_names_methods_that_exist():
    for choice in CHOICES.values():
        assert choice.scoring in available("scoring")
        check_scoring(choice.strategy, choice.scoring)
    for preset in PRESETS.values():
        assert preset.recovery in recoveries()
        assert parse_methods([preset.pair])[0].choice == preset.choice
    assert set(DEFAULT) <= set(PRESETS)


def test_every_scoring_and_recovery_takes_part():
    assert {choice.scoring for choice in CHOICES.values()} == set(available("scoring"))
    in_all = {contestant.recovery for contestant in parse_methods(["all"])}
    assert in_all == {*available("recovery"), *UNFOLDABLE}
    assert set(UNFOLDABLE) == set(get_args(Unfoldable))


def test_all_holds_every_pair_once():
    pairs = [contestant.pair for contestant in parse_methods(["all", "ours"])]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) >= {f"{c}+{r}" for c in CHOICES for r in recoveries()}


def test_a_pair_and_its_preset_are_one_contestant_under_the_first_name():
    (only,) = parse_methods(["block-influence+none", "shortgpt"])
    assert only.name == "block-influence+none"


def test_a_plus_in_a_scores_name_is_no_separator():
    preset, pair = parse_methods(["magnitude+", "taylor++none"])
    assert (preset.pair, preset.choice.keep_first) == ("magnitude++none", 4)
    assert (pair.chooser, pair.recovery) == ("taylor+", "none")


def test_the_first_four_and_last_two_layers_are_protected():
    assert CHOICES["taylor+"].protect(8) == {0, 1, 2, 3, 6, 7}
    assert CHOICES["sleb"].protect(8) == {0, 7}


def test_rounds_can_be_asked_for():
    (each,) = parse_methods(["block-influence@each+none"])
    assert each.choice.rounds == "each"
    assert load_method("scoring", each.choice.scoring)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shortgtp", "unknown method 'shortgtp'; did you mean 'shortgpt'"),
        ("gradmpa+none", "unknown score 'gradmpa'; did you mean 'gradmap'"),
        ("gradmap+reft", "unknown recovery 'reft'; did you mean 'refit'"),
        ("priced-cuts@each+refit", "only behind a score whose lowest layers go"),
        ("gradmap@twice+none", "each or one-shot"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(name: str, message: str):
    with pytest.raises(RecipeError, match=message):
        parse_methods([name])
