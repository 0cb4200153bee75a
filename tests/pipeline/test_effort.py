"""Minutes → counts, before any work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import layercut
from conftest import save_tiny
from layercut.engine.file_journal import encode_mark
from layercut.errors import RecipeError
from layercut.models.ranks import ALONE
from layercut.pipeline.effort import RUNGS, apply_rung, describe_efforts, settle_effort
from layercut.recipe.recipe import EFFORT_MINUTES, Recipe
from toy_estimates import RATES, SHAPE, recipe_of, seconds_of


def minutes_of(recipe: Recipe) -> float:
    return sum(seconds_of(SHAPE, recipe).values()) / 60


def settle(recipe: Recipe, folder: Path) -> Recipe:
    return settle_effort(recipe, SHAPE, RATES, folder / "out", ALONE)


def test_the_largest_rung_that_fits_is_taken(tmp_path: Path) -> None:
    rungs = [apply_rung(recipe_of(minutes=1.0), rung) for rung in RUNGS]
    costs = [minutes_of(rung) for rung in rungs]
    assert costs == sorted(costs)
    for i, (cost, rung) in enumerate(zip(costs, rungs, strict=True)):
        assert settle(recipe_of(minutes=cost * 1.0001), tmp_path) == rung
        if i:
            assert settle(recipe_of(minutes=cost * 0.9999), tmp_path) == rungs[i - 1]
    with pytest.raises(RecipeError, match=r"minutes are too few: .* Allow at least"):
        settle(recipe_of(minutes=costs[0] / 2), tmp_path)


def test_what_comes_out_holds_counts_and_replays_equal(tmp_path: Path) -> None:
    settled = settle(recipe_of(effort="thorough"), tmp_path)
    assert (settled.effort, settled.minutes) == (None, None)
    again = Recipe.model_validate(settled.model_dump(mode="json"))
    assert settle(again, tmp_path) == again
    assert minutes_of(again) <= EFFORT_MINUTES["thorough"]
    n_tokens = settled.calibration.n_sequences * settled.calibration.seq_len
    assert n_tokens == RUNGS[-1].fitted + RUNGS[-1].learned
    assert settled.recovery.options == {"gradient_steps": 16, "step_share": 0.5}


@pytest.mark.parametrize(
    ("sections", "n_sequences", "options"),
    [
        ({"calibration": {"n_sequences": 7}}, 7, {"gradient_steps": 2}),
        ({"calibration": {"n_sequences": 80}}, 80, {"gradient_steps": 10, "step_share": 0.5}),
        ({"recovery": {"options": {"gradient_steps": 0}}}, 1024, {"gradient_steps": 0}),
        (
            {"recovery": {"options": {"step_share": 0.25}}},
            1024,
            {"gradient_steps": 16, "step_share": 0.25},
        ),
        ({"recovery": {"method": "none"}}, 1024, {}),
        ({"calibration": {"seq_len": 512}}, 1024, {"gradient_steps": 16, "step_share": 0.5}),
    ],
)
def test_what_is_set_stays(
    sections: dict[str, Any], n_sequences: int, options: dict[str, Any]
) -> None:
    settled = apply_rung(recipe_of(effort="thorough", **sections), RUNGS[-1])
    assert settled.calibration.n_sequences == n_sequences
    assert settled.recovery.options == options


def test_a_run_that_goes_on_has_the_counts_that_it_began_with(tmp_path: Path) -> None:
    asked = recipe_of(effort="thorough")
    begun = apply_rung(asked, RUNGS[2])
    folder = tmp_path / "out.progress"
    folder.mkdir()
    identity = {"recipe": begun.model_dump(mode="json", exclude={"heal", "finetune"})}
    (folder / "layercut-run.json").write_text(encode_mark(identity))
    assert settle(asked, tmp_path) == begun
    other = recipe_of(effort="thorough", seed=3)
    assert settle(other, tmp_path) == apply_rung(other, RUNGS[-1])


def test_effort_and_minutes_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="effort and minutes are set together"):
        recipe_of(effort="quick", minutes=3.0)


def test_a_run_records_what_its_minutes_became(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=8)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    recipe = {
        "model": str(model),
        "minutes": 30.0,
        "calibration": {"data": str(tmp_path / "text.txt"), "seq_len": 32},
        "selection": {"drop_parameters": 0.1},
        "recovery": {"options": {"gradient_steps": 2}},
        "evaluation": {"text": {}, "seq_len": 32},
    }
    result = layercut.run(recipe, tmp_path / "out")
    assert any("fewer" in warning for warning in result.warnings)  # the text is short
    assert result.recipe["minutes"] is None
    assert result.recipe["calibration"]["n_sequences"] > 1000
    assert result.recipe["recovery"]["options"]["step_share"] > 0


def test_efforts_are_described_by_what_they_take() -> None:
    told = describe_efforts(SHAPE, RATES)
    assert list(told) == ["quick", "standard", "thorough"]
    thorough = apply_rung(recipe_of(effort="thorough"), RUNGS[-1])
    assert told["thorough"] == f"{RUNGS[-1]}: about {minutes_of(thorough):.1f} minutes of 60"
    slow = replace(RATES, product=RATES.product / 1e9)
    assert describe_efforts(SHAPE, slow)["quick"].startswith(f"{RUNGS[0]}: about ")
