from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from layercut import progress
from layercut.cli.progress_display import LiveDisplay, progress_display
from layercut.cli.tables import print_result, result_table
from layercut.results import Estimate, Evaluation, Provenance, RunResult
from layercut.types import PruningPlan


@pytest.fixture
def result() -> RunResult:
    return RunResult(
        model="embedded:smollm2-135m",
        recipe={},
        provenance=Provenance("0.1.0", {}, {}, "layercut run"),
        plan=PruningPlan("m", 30, (12, 13, 14), "gradmap"),
        stages={
            "dense": Evaluation(
                30, 134_515_008, {"speeches": Estimate(17.5, 0.3, 8176)}, {}, 600.0
            ),
            "pruned": Evaluation(
                27, 123_894_720, {"speeches": Estimate(35.0, 0.9, 8176)}, {}, 660.0
            ),
        },
        seconds={"load": 1.25, "total": 61.0},
        warnings=["the text holds 3 windows [of 256]"],
    )


def rendered(result: RunResult, *, ascii_only: bool = False) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(result_table(result, ascii_only=ascii_only))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]


def test_table_compares_dense_with_pruned_and_lists_seconds(result: RunResult) -> None:
    lines = rendered(result)
    assert lines[0] == "embedded:smollm2-135m: dropped 3 of 30 layers (12, 13, 14)"
    assert "Layers 30 27 −3" in lines
    assert "Parameters 134,515,008 123,894,720 −7.9 %" in lines
    assert "Perplexity, speeches 17.50 ± 0.30 35.00 ± 0.90 × 2.00" in lines
    assert "Prefill, tokens per second 600.0 660.0 × 1.10" in lines
    assert "Seconds, load 1.2" in lines
    assert "Seconds, total 61.0" in lines


def test_table_without_a_plan_or_a_stage_still_prints(result: RunResult) -> None:
    result.plan = None
    del result.stages["pruned"]
    lines = rendered(result)
    assert lines[0] == "embedded:smollm2-135m"
    assert "Layers 30" in lines


def test_result_goes_to_stdout_and_warnings_to_stderr(
    result: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    print_result(result, Path("runs/demo"))
    shown = capsys.readouterr()
    assert "Perplexity, speeches" in shown.out
    assert shown.out.endswith("Checkpoint: runs/demo  Report: runs/demo/layercut/report.html\n")
    assert shown.err == "warning: the text holds 3 windows [of 256]\n"


def test_quiet_prints_warnings_only(result: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result, Path("runs/demo"), quiet=True)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "warning: the text holds 3 windows [of 256]\n")


@pytest.mark.parametrize("columns", ["20", "100"])
def test_output_is_ascii_where_the_terminal_is(
    result: RunResult, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    monkeypatch.setenv("COLUMNS", columns)
    print_result(result, Path("runs/demo"))
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "17.50 +/- 0.30" in text
    assert "x 2.00" in text


def test_narrow_terminals_get_lines_instead_of_a_table(
    result: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_result(result, Path("out"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "Dense / Pruned / Change"
    assert "Perplexity, speeches: 17.50 ± 0.30 / 35.00 ± 0.90 / × 2.00" in lines


def work() -> None:
    progress.stage("score")
    for i in progress.track(range(3), 3):
        progress.status(f"perplexity {i}")
    progress.stage("save")


def test_progress_without_a_terminal_is_one_line_per_stage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_display():
        work()
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["score ... 0.0 s, perplexity 2", "save ... 0.0 s"]


def test_a_failing_stage_still_ends_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError, match="division"), progress_display():
        progress.stage("score")
        raise ZeroDivisionError("division")
    assert capsys.readouterr().err == "score ... 0.0 s\n"


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_display(quiet=True):
        work()
    assert capsys.readouterr() == ("", "")


def test_terminals_get_a_bar_per_stage_with_its_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_display():
        work()
    shown = capsys.readouterr().err
    assert "\x1b[" in shown
    assert "0.0 s, perplexity 2" in shown


def test_no_color_is_respected(
    result: RunResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    print_result(result, Path("out"), quiet=True)
    assert "\x1b[33m" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    print_result(result, Path("out"), quiet=True)
    assert "\x1b[3" not in capsys.readouterr().err


def test_a_loop_that_starts_again_restarts_the_bar() -> None:
    live = LiveDisplay(Console(file=io.StringIO(), force_terminal=True))
    live.step(0, 5)  # before any stage: nothing to move
    live.stage("score")
    task = live.bars.tasks[0]
    assert task.total is None
    live.step(0, 5)
    live.step(5, 5)
    assert task.finished
    live.step(0, 4)
    live.step(1, 4)
    assert (task.completed, task.total, task.finished) == (1, 4, False)
    live.stage("save")
    assert task.finished
