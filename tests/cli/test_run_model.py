"""`layercut run MODEL`: what the options become in the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from layercut.cli.app import main


def resolve(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["run", *arguments, "--print-config"]) == 0
    recipe: dict[str, object] = yaml.safe_load(capsys.readouterr().out)
    return recipe


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--drop", "25%"], "drop_fraction", 0.25),
        (["--drop", "4"], "drop_layers", 4),
        (["--drop-parameters", "12.5%"], "drop_parameters", 0.125),
        (["--max-perplexity-ratio", "1.3"], "max_perplexity_ratio", 1.3),
        (["--set", "selection.drop=[3, 4]"], "drop", [3, 4]),
        (["--set", "selection.fit_memory={gb: 8, context: 4096}"], "fit_memory", None),
    ],
)
def test_a_model_and_an_amount_are_enough(
    capsys: pytest.CaptureFixture[str], options: list[str], key: str, value: object
) -> None:
    recipe = resolve(capsys, "owner/name", *options)
    assert recipe["model"] == "owner/name"
    assert recipe["effort"] == "standard"
    selection = recipe["selection"]
    assert isinstance(selection, dict)
    wanted = {"gb": 8, "context": 4096, "batch": 1} if key == "fit_memory" else value
    assert selection[key] == wanted
    assert selection["drop_layers"] is None or key == "drop_layers"


def test_minutes_take_the_place_of_effort(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = resolve(capsys, "owner/name", "--drop", "2", "--minutes", "5")
    assert (recipe["effort"], recipe["minutes"]) == (None, 5.0)


def test_options_win_over_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("model: m\nminutes: 3\nselection: {drop_fraction: 0.5}\n")
    assert resolve(capsys, str(path))["effort"] is None
    recipe = resolve(capsys, str(path), "--drop", "3", "--effort", "quick")
    assert (recipe["effort"], recipe["minutes"]) == ("quick", None)
    assert recipe["selection"]["drop_layers"] == 3  # type: ignore[index]
    assert recipe["selection"]["drop_fraction"] is None  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m"], "--drop: missing: how many layers go, as 6 or 25%"),
        (["m", "--drop", "120%"], "'120%' should be a percentage"),
        (["m", "--drop-parameters", "0.2"], "'0.2' should be a percentage, as 25%"),
        (["m", "--drop", "2", "--max-perplexity-ratio", "2"], "say the same thing; give one"),
        (["m", "--drop", "2", "--effort", "quick", "--minutes", "3"], "give one"),
        (["m", "--drop", "many"], "'many' should be a number of layers, as 6, or a share, as 25%"),
        (["m", "--drop", "2", "--minutes", "0"], "minutes"),
    ],
)
def test_bad_amounts_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments, "-o", "out"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_recipe_may_have_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe"
    path.write_text("model: m\nselection: {drop_layers: 3}\n")
    recipe = resolve(capsys, str(path))
    assert (recipe["model"], recipe["effort"]) == ("m", None)


def test_a_file_of_weights_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert main(["run", str(path), "--drop", "2", "-o", "out"]) == 2
    assert "holds weights, and is no recipe" in " ".join(capsys.readouterr().err.split())
