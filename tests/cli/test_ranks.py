"""`layercut run` as several processes: one output, one message, one end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from layercut.cli import app
from layercut.pipeline.run import run
from rank_runs import free_port

RECIPE = """
model: {model}
dtype: float32
calibration: {{data: text.txt, n_sequences: 5, seq_len: 32, gradient_batch: 2, micro_batch: 1}}
selection: {{drop_layers: 2}}
recovery: {{options: {{held_out_every: 2}}}}
evaluation: {{text: {{t: text.txt}}, seq_len: 32, max_tokens: 96}}
"""


def random_text(n_characters: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(string.ascii_lowercase + " ", k=n_characters))


def start_rank(rank: int, folder: Path, port: int, *arguments: str) -> subprocess.Popen[str]:
    """One of two processes, in ``folder``, as a launcher without an agent would start it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    place |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": 1}
    return subprocess.Popen(
        [sys.executable, "-m", "layercut", *arguments],
        cwd=folder,
        env=os.environ | {key: str(value) for key, value in place.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_two(folders: list[Path], *arguments: str) -> list[tuple[int, str]]:
    """Exit code and stderr of both."""
    port = free_port()
    started = [start_rank(rank, folder, port, *arguments) for rank, folder in enumerate(folders)]
    errors = [process.communicate(timeout=300)[1] for process in started]
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


def test_a_run_under_torchrun_writes_what_one_process_writes(tiny_llama: Path, tmp_path: Path):
    # On this text, gradient steps pay.
    text = "".join(chr(97 + i * i % 23) for i in range(4000))
    (folder,) = machines(tmp_path, tiny_llama, text)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launcher += ["--master-port", str(free_port()), "-m", "layercut"]
    done = subprocess.run(
        [sys.executable, *launcher, "run", "recipe.yaml", "--output-dir", "two"],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Checkpoint: ") == 1
    assert done.stderr.count("evaluate the pruned model") == 1
    with contextlib.chdir(folder):
        run("recipe.yaml", "one")
    one, two = (
        json.loads((folder / name / "layercut" / "result.json").read_text(encoding="utf-8"))
        for name in ("one", "two")
    )
    assert (one.get("ranks"), two["ranks"]) == (None, 2)
    assert two["plan"]["dropped"] == one["plan"]["dropped"]
    assert two["recovery"]["steps"] == one["recovery"]["steps"] != []
    for stage, limit in {"dense": 1e-6, "pruned": 1e-5}.items():
        expected, found = (r["stages"][stage]["perplexity"]["t"] for r in (one, two))
        assert found["value"] == pytest.approx(expected["value"], rel=limit)
        assert found["n_tokens"] == expected["n_tokens"]
    weights, others = (load_file(folder / name / "model.safetensors") for name in ("one", "two"))
    assert others.keys() == weights.keys()
    # A step's direction is kept in bfloat16, and raises small parts of a gradient with their noise.
    limit = 1e-6 + 1e-3 * sum(one["recovery"]["steps"])
    for key, tensor in weights.items():
        assert float((others[key] - tensor).norm()) <= limit * float(tensor.norm())


def machines(folder: Path, model: Path, *texts: str | None) -> list[Path]:
    """One folder for each text, all with the same recipe; the text is missing where it is None."""
    folders = []
    for number, text in enumerate(texts):
        folders.append(folder / str(number))
        folders[-1].mkdir()
        recipe = RECIPE.format(model=model)
        (folders[-1] / "recipe.yaml").write_text(recipe, encoding="utf-8")
        if text is not None:
            (folders[-1] / "text.txt").write_text(text, encoding="utf-8")
    return folders


@pytest.mark.slow
def test_other_text_on_another_machine_is_refused_once(tiny_llama: Path, tmp_path: Path):
    folders = machines(tmp_path, tiny_llama, random_text(4000), random_text(4000, seed=1))
    (code, error), (other_code, other) = run_two(folders, "run", "recipe.yaml", "-o", "../out")
    assert (code, other_code) == (4, 4)
    assert (error + other).count("rank 1 has another calibration text than rank 0") == 1
    assert not (tmp_path / "out").exists()


def test_the_rank_that_fails_says_why_and_the_other_ends_in_silence(
    tiny_llama: Path, tmp_path: Path
):
    folders = machines(tmp_path, tiny_llama, random_text(4000), None)
    (code, error), (other_code, other) = run_two(folders, "run", "recipe.yaml", "-o", "../out")
    assert (code, other_code) == (4, 4)
    assert "error: " not in error
    assert other == "error: data file text.txt does not exist\n"


def test_a_killed_rank_ends_the_other_within_a_minute(tiny_llama: Path, tmp_path: Path):
    folders = machines(tmp_path, tiny_llama, random_text(9000), random_text(9000))
    port = free_port()
    arguments = ("run", "recipe.yaml", "-o", "../out", "--set", "calibration.n_sequences=200")
    first, second = (start_rank(rank, folders[rank], port, *arguments) for rank in range(2))
    assert first.stderr is not None
    shown = ""
    while "score the layers" not in shown:
        character = first.stderr.read(1)
        assert character, shown
        shown += character
    os.kill(second.pid, signal.SIGKILL)
    killed = time.monotonic()
    error = first.communicate(timeout=60)[1]
    assert time.monotonic() - killed < 60
    assert first.returncode == 7
    assert error.count("error: ") == 1 and "another rank has ended without a word" in error
    second.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_command_that_does_not_share_its_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(app, "_among_ranks", lambda _: contextlib.nullcontext())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert app.main(["inspect", "nowhere"]) == 2
    assert "layercut inspect runs in one process, and 2 were started" in capsys.readouterr().err
