"""A run that is killed at any record goes on to the bits of one that was not interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import layercut
from conftest import save_tiny
from layercut.engine import file_journal
from layercut.engine.record_file import write_record
from layercut.errors import NumericsError, OutputError
from layercut.pipeline import run_record
from layercut.pipeline.run_record import summarise
from layercut.recovery import writer_fit

DEFAULT: dict[str, Any] = {"selection": {"drop_layers": 2}}
GIVEN: dict[str, Any] = {"selection": {"drop": [2]}}
ROUNDS: dict[str, Any] = {
    "scoring": {"method": "gradmap"},
    "selection": {"strategy": "lowest", "rounds": "each", "drop_layers": 2},
    "recovery": {"method": "projection"},
}
SEARCH: dict[str, Any] = {
    "scoring": {"method": "block-influence"},
    "selection": {"strategy": "lowest", "max_perplexity_ratio": 1.5},
    "recovery": {"method": "projection"},
}


CLOCKS = {"peak_rss_bytes", "prefill_tokens_per_second", "decode_tokens_per_second"}


class Killed(BaseException):
    """A kill, as far as one process can tell."""


@pytest.fixture(autouse=True)
def no_clocks_and_no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a tiny run's time, and nothing that is recorded step by step."""
    monkeypatch.setattr("layercut.pipeline.run.time_dense_and_pruned", lambda *_: None)
    monkeypatch.setattr("layercut.report.write.render_html", lambda *_, **__: "")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and a folder for the outputs."""
    home = tmp_path_factory.mktemp("runs")
    save_tiny(home / "model")
    (home / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return home


def recipe_of(home: Path, part: dict[str, Any]) -> dict[str, Any]:
    text = str(home / "text.txt")
    return {
        "model": str(home / "model"),
        "calibration": {"data": text, "n_sequences": 16, "seq_len": 32, "gradient_batch": 2},
        "evaluation": {"text": {"fox": text}, "seq_len": 64, "max_tokens": 256},
        **part,
    }


@pytest.fixture(scope="module")
def finished(home: Path) -> Callable[[dict[str, Any]], Path]:
    """The output of a recipe's run that nothing interrupted; each runs once."""
    outputs: dict[str, Path] = {}

    def run(part: dict[str, Any]) -> Path:
        name = json.dumps(part)
        if name not in outputs:
            outputs[name] = home / f"finished-{len(outputs)}"
            layercut.run(recipe_of(home, part), outputs[name])
        return outputs[name]

    return run


def kill_after(patched: pytest.MonkeyPatch, is_last: Callable[[str, int | str], bool]) -> None:
    """Let the run die behind the first record of which ``is_last`` is true of kind and item."""

    def write(stem: Path, key: tuple[str, str, int | str], *rest: Any) -> Any:
        record = write_record(stem, key, *rest)
        if is_last(*key[1:]):
            raise Killed
        return record

    patched.setattr(file_journal, "write_record", write)


def assert_same(out: Path, expected: Path) -> None:
    """The same weights, plan, scores and measurements; clocks and memory apart."""
    name = "model.safetensors"
    assert (out / name).read_bytes() == (expected / name).read_bytes()
    results = [json.loads((f / "layercut/result.json").read_text()) for f in (out, expected)]
    scores = [f / "layercut/scores.json" for f in (out, expected)]
    assert scores[0].exists() == scores[1].exists()
    if scores[0].exists():
        found, wanted = (json.loads(path.read_text()) for path in scores)
        assert found == wanted | {"seconds": found["seconds"]}
    for result in results:
        for key in ("seconds", "estimate", "peak_rss_bytes", "warnings", "command"):
            result.pop(key)
        for stage in result["stages"].values():
            for key in stage.keys() & CLOCKS:
                stage.pop(key)
    assert results[0] == results[1]


@pytest.mark.parametrize("part", [DEFAULT, ROUNDS, SEARCH], ids=["default", "rounds", "search"])
def test_a_run_that_is_killed_at_every_kind_of_record_ends_with_the_same_bits(
    home: Path,
    finished: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: dict[str, Any],
):
    kinds: Counter[str] = Counter()

    def is_new(kind: str, _: int | str) -> bool:
        kinds[kind] += 1
        return kinds[kind] == 1

    kill_after(monkeypatch, is_new)
    n_runs = 0
    while not (tmp_path / "out").exists():
        n_before = len(kinds)
        n_runs += 1
        try:
            layercut.run(recipe_of(home, part), tmp_path / "out")
        except Killed:
            assert len(kinds) == n_before + 1
            assert (tmp_path / "out.progress").is_dir()
    assert n_runs == len(kinds) + 1
    assert {"evaluated", "repairs"} < set(kinds)
    assert kinds["evaluated"] == 2
    if part is DEFAULT:
        assert kinds["prices of cuts at"] == 5
        assert {"sensitivities", "plans tried", "refitted layers", "shrinkage"} < set(kinds)
        assert kinds["gradient steps"] == 2
    assert_same(tmp_path / "out", finished(part))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_walk_goes_on_without_the_solves_that_are_done(
    home: Path,
    finished: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    solve, solved = writer_fit.fit_ridge_update, []

    def count(*arguments: Any) -> Any:
        solved.append(arguments)
        return solve(*arguments)

    monkeypatch.setattr(writer_fit, "fit_ridge_update", count)
    expected = finished(GIVEN)
    solved.clear()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, lambda *found: found == ("refitted layers", 3))
        layercut.run(recipe_of(home, GIVEN), tmp_path / "out")
    assert len(solved) == 4
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, lambda kind, item: kind == "shrinkage")
        layercut.run(recipe_of(home, GIVEN), tmp_path / "out")
    whole = 8  # two weights of each of the layers 1, 3, 4 and 5
    assert len(solved) == whole
    statuses: list[str] = []
    monkeypatch.setattr("layercut.progress.status", statuses.append)
    monkeypatch.setattr("layercut.recovery.layer_fit.paired_walk", None)  # nothing to walk for
    result = layercut.run(recipe_of(home, GIVEN), tmp_path / "out")
    assert len(solved) == whole
    assert statuses[0] == (
        "going on from out.progress: evaluated dense, refitted layers 1 3–5, shrinkage chosen"
    )
    assert any("went on from what it had recorded; its seconds" in w for w in result.warnings)
    assert_same(tmp_path / "out", expected)


def test_a_process_that_is_killed_goes_on(
    home: Path, finished: Callable[[dict[str, Any]], Path], tmp_path: Path
):
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(home, DEFAULT)))
    command = ["run", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    program = (
        "import os, signal, sys\n"
        "from layercut.cli import main\n"
        "from layercut.engine import record_file\n"
        "from layercut.evaluation import evaluate\n"
        "evaluate.prefill_tokens_per_second = lambda view: 1.0\n"
        "evaluate.decode_tokens_per_second = lambda view: 1.0\n"
        "sync = record_file._sync\n"
        "def stop(path):\n"
        "    if path.name.startswith('gradient-steps-1-') and '.record' in path.name:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    sync(path)\n"
        "record_file._sync = stop\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert list((tmp_path / "out.progress").glob("*.partial"))
    layercut.run(recipe_of(home, DEFAULT), tmp_path / "out")
    assert_same(tmp_path / "out", finished(DEFAULT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_another_run_is_refused_by_name_and_replaced_if_asked_for(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = tmp_path / "evaluated.txt"
    text.write_text("The quick brown fox. " * 20)
    recipe = recipe_of(home, ROUNDS)
    recipe["evaluation"]["text"] = {"fox": str(text)}
    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, lambda kind, item: kind == "scores without layers")
        layercut.run(recipe, out)

    other = {**recipe, "scoring": {"method": "gradmap", "options": {"norm": "l2"}}, "seed": 1}
    with pytest.raises(OutputError, match=r"recipe\.scoring\.options\.norm None there, l2 now"):
        layercut.run(other, out)
    with monkeypatch.context() as patched:
        patched.setattr(run_record, "hash_source", lambda: "other")
        with pytest.raises(OutputError, match=r"another run: code\.source \w+ there, other now\. "):
            layercut.run(recipe, out)
    text.write_text("The lazy brown dog. " * 20)
    with pytest.raises(OutputError, match=r"another run: data\.evaluation\.fox \w+ there, \w+ now"):
        layercut.run(recipe, out)
    assert list(tmp_path.glob("out.progress/scores-*.record"))
    result = layercut.run(recipe, out, overwrite=True)
    assert not any("interrupted" in sentence for sentence in result.warnings)
    assert not list(tmp_path.glob("out.*"))


def test_a_damaged_record_is_computed_again_and_another_machine_is_noted(
    home: Path,
    finished: Callable[[dict[str, Any]], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    describe = run_record.describe_machine
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_after(patched, lambda kind, item: kind == "shrinkage")
        layercut.run(recipe_of(home, GIVEN), tmp_path / "out")
    damaged = sorted(tmp_path.glob("out.progress/refitted-layers-*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-5] ^= 64
    damaged.write_bytes(content)
    monkeypatch.setattr(
        run_record, "describe_machine", lambda view: describe(view) | {"threads": 99}
    )
    layercut.run(recipe_of(home, GIVEN), tmp_path / "out")
    result = json.loads((tmp_path / "out/layercut/result.json").read_text())
    assert any("the record of refitted layers" in sentence for sentence in result["warnings"])
    assert any(
        f"computed elsewhere (threads {torch.get_num_threads()} there, 99 now)" in sentence
        and "not bit for bit" in sentence
        for sentence in result["warnings"]
    )
    assert_same(tmp_path / "out", finished(GIVEN))


def test_what_the_same_command_would_meet_again_leaves_no_record(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise NumericsError("not finite")

    monkeypatch.setattr("layercut.recovery.recorded_fit.fit_repair", fail)
    with pytest.raises(NumericsError):
        layercut.run(recipe_of(home, ROUNDS), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_summary_names_spans_and_counts_what_is_many():
    keys = [("", "plans tried", f"{i} 7") for i in range(4)]
    keys += [("a/", "refitted layers", i) for i in (9, 3, 10, 4, 5, 12)]
    keys += [("", "evaluated", "dense"), ("", "evaluated", "pruned")]
    assert summarise(keys) == (
        "evaluated dense and pruned, plans tried 4, refitted layers 3–5 9–10 12"
    )
