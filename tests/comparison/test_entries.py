"""Names of methods, and what they stand for."""

from __future__ import annotations

import pytest

from layercut.comparison.entries import (
    DEFAULT,
    PRESETS,
    LayerChoice,
    layer_choices,
    parse_methods,
)
from layercut.errors import RecipeError
from layercut.registry import available, describe
from layercut.selection.select import check_scoring


def test_every_choice_and_preset_names_methods_that_exist():
    for choice in layer_choices().values():
        assert choice.scoring in available("scoring")
        check_scoring(choice.strategy, choice.scoring)
    for name, preset in PRESETS.items():
        (entry,), (pair,) = parse_methods([name]), parse_methods([preset.pair])
        assert entry.recovery in available("recovery")
        assert (entry.name, entry.pair, entry.source) == (name, preset.pair, preset.source)
        assert pair.choice == entry.choice
    assert set(DEFAULT) <= set(PRESETS)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        ("random", LayerChoice(scoring="random")),
        ("magnitude", LayerChoice(scoring="magnitude")),
        ("perplexity", LayerChoice(scoring="perplexity")),
        ("angular-distance", LayerChoice(scoring="angular-distance", strategy="block")),
        ("gradmap", LayerChoice(scoring="gradmap", rounds="each")),
        ("residual-sensitivity", LayerChoice(scoring="residual-sensitivity")),
        ("priced-cuts", LayerChoice(scoring="residual-sensitivity", strategy="priced-cuts")),
        ("magnitude+", LayerChoice(scoring="magnitude", keep_first=4, keep_last=2)),
        ("sleb", LayerChoice(scoring="perplexity", rounds="each", keep_first=1, keep_last=1)),
    ],
)
def test_a_choice_is_what_the_methods_files_declare(name: str, choice: LayerChoice):
    assert layer_choices()[name] == choice


def test_every_scoring_and_recovery_takes_part():
    assert {choice.scoring for choice in layer_choices().values()} == set(available("scoring"))
    in_all = {entry.recovery for entry in parse_methods(["all"])}
    assert in_all == {*available("recovery")} >= {"ghost", "linear-patch"}


def test_all_holds_every_pair_once():
    pairs = [entry.pair for entry in parse_methods(["all", "ours"])]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) >= {f"{c}+{r}" for c in layer_choices() for r in available("recovery")}


def test_a_pair_and_its_preset_are_one_entry_under_the_first_name():
    (only,) = parse_methods(["block-influence+none", "shortgpt"])
    assert only.name == "block-influence+none"


def test_a_plus_in_a_scores_name_is_no_separator():
    preset, pair = parse_methods(["magnitude+", "taylor++none"])
    assert (preset.pair, preset.choice.keep_first) == ("magnitude++none", 4)
    assert (pair.choice_name, pair.recovery) == ("taylor+", "none")


def test_the_first_four_and_last_two_layers_are_protected():
    assert layer_choices()["taylor+"].protect(8) == {0, 1, 2, 3, 6, 7}
    assert layer_choices()["sleb"].protect(8) == {0, 7}


def test_rounds_can_be_asked_for():
    (each,) = parse_methods(["block-influence@each+none"])
    assert each.choice.rounds == "each"
    assert describe("scoring", each.choice.scoring).rounds == "one-shot"


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
