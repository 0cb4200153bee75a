"""The commands that tune and measure one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from layercut.cli import main


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": f"{i} is", "completion": "ab"[i % 2]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_tuned_checkpoint_is_written_and_measured(
    tiny_llama: Path, task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    settings = ["max_length=64", "batch_size=4", "accumulation=1", "max_steps=2"]
    flags = [part for setting in settings for part in ("--set", f"finetune.{setting}")]
    command = ["finetune", str(tiny_llama), "--data", task, "--task", f"t={task}", *flags]
    assert main([*command, "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "Accuracy, t" in shown
    assert "Before" in shown
    assert json.loads((out / "layercut/result.json").read_text())["stages"].keys() == {
        "dense",
        "dense_tuned",
    }
    figures = tmp_path / "figures.json"
    command = ["eval", str(out), "--task", task, "--no-speed", "-q", "--json", str(figures)]
    assert main(command) == 0
    assert "Accuracy, task" in capsys.readouterr().out
    content = json.loads(figures.read_text())
    assert content["accuracy"]["task"]["n_rows"] == 8
    assert "prefill_tokens_per_second" not in content


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["eval", "x", "--task", "a="], 2, "should read NAME=SOURCE"),
        (["eval", "x", "--task", "a", "--task", "b"], 2, "with another name each"),
        (["eval", "nowhere/at/all"], 3, "neither an existing folder nor a Hub name"),
        (["eval", "x", "--json", "nowhere/a.json"], 2, "its folder does not exist"),
        (["finetune", "x", "--data", "a.jsonl"], 2, "output-dir"),
        (
            ["finetune", "x", "--data", "a", "-o", "o", "--set", "finetune.rank=1"],
            2,
            "finetune.rank: unknown key",
        ),
    ],
)
def test_mistakes_are_told_with_their_exit_code(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_task_that_is_not_there_is_a_data_error(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["eval", str(tiny_llama), "--task", "t=nowhere.jsonl"]) == 4
    assert "data file nowhere.jsonl does not exist" in capsys.readouterr().err
