from __future__ import annotations

import json
from pathlib import Path

import pytest

from layercut.cli import main
from layercut.cli.prune import parse_layers
from layercut.errors import PlanError
from quantised_siblings import quantised


def test_layers_and_ranges_are_read() -> None:
    assert parse_layers("13-15, 28,2") == [13, 14, 15, 28, 2]
    for text in ("", "3-1", "x", "1;2", "-1", "1.5", "0,3,", "1-99999", "1--2", "٣"):
        with pytest.raises(PlanError, match="should name layers like 13-17,28"):
            parse_layers(text)


def test_the_command_prunes_and_says_what_it_checked(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["prune", str(tiny_llama), "--drop", "1-2,4", "-o", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "dropped 3 of 6 layers (1, 2, 4)" in shown
    assert "names, shapes and sha256" in shown
    assert "Logits are those of the source" in shown
    assert main(["prune", str(tiny_llama), "--drop", "1", "-o", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    arguments = ["prune", str(tiny_llama), "--drop", "0", "-o", str(out), "--overwrite", "-q"]
    assert main(arguments) == 0
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give one of --plan and --drop"),
        (["--plan", "p", "--drop", "1"], 2, "give one of --plan and --drop"),
        (["--plan", "none.json"], 2, "none.json does not exist"),
        (["--drop", "6"], 2, "layers are 0 to 5"),
        (["--drop", "0-5"], 2, "cannot drop 6 of 6 layers"),
    ],
)
def test_impossible_commands_exit_2(
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    command = ["prune", str(tiny_llama), *arguments, "-o", str(tmp_path / "out")]
    assert main(command) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_with_recovery_makes_a_plan_that_siblings_refuse(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    recipe = {
        "model": str(tiny_llama),
        "calibration": {"data": str(tmp_path / "text.txt"), "n_sequences": 8, "seq_len": 32},
        "selection": {"drop_layers": 1},
        "evaluation": {"text": {}, "seq_len": 32},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    sibling = quantised(tiny_llama, tmp_path / "sibling", "gptq")
    for method, code in (("projection", 2), ("none", 0)):
        out = tmp_path / method
        command = ["run", str(tmp_path / "recipe.yaml"), "-o", str(out), "-q"]
        assert main([*command, "--set", f"recovery.method={method}"]) == 0
        plan = out / "layercut" / "plan.json"
        recovery = json.loads(plan.read_text())["recovery"]
        assert recovery == {"method": method, "tensors_changed": int(method != "none")}
        pruned = tmp_path / f"sibling-{method}"
        assert main(["prune", str(sibling), "--plan", str(plan), "-o", str(pruned)]) == code
    assert "recovery 'projection' or a fine-tuning changed kept weights" in capsys.readouterr().err
