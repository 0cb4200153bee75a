"""Damaged, hostile and unsuitable checkpoints and outputs through the real program."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import save_tiny
from layercut.cli import main
from quantised_siblings import edit_config, quantised

TEXT = "The quick brown fox jumps over the lazy dog. " * 100
Damage = Callable[[Path], object]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs ``layercut prune``, or another command, and returns its code and its error line."""

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        return code, next((line for line in errors.splitlines() if line.startswith("error: ")), "")

    return run


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def overwrite(content: bytes, name: str = "model.safetensors") -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def config(**changes: object) -> Damage:
    return lambda folder: edit_config(folder, **changes)


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        # A socket's address is short: bind it by a name relative to its folder.
        before = Path.cwd()
        os.chdir(path.parent)
        opened.bind(path.name)
        os.chdir(before)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def evil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / "evil")))


def index(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        content = {"weight_map": {"model.norm.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def stale_index(folder: Path) -> None:
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"")
    content = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


REFUSED: dict[str, tuple[Damage, str]] = {
    "1 no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "2 cut config": (overwrite(b'{"model_type": "ll', "config.json"), "config.json is not valid"),
    "3 unknown type": (config(model_type="llama9"), "does not know the model type 'llama9'"),
    "4 encoder-decoder": (config(model_type="t5", is_encoder_decoder=True), "causal language"),
    "5 remote code": (config(auto_map={"AutoModelForCausalLM": "x.M"}), "own code (auto_map)"),
    "6, 7 pickle": (evil_pickle, "only pickle weights (pytorch_model.bin)"),
    "8 cut shard": (
        lambda f: os.truncate(f / "model.safetensors", 5000),
        "model.safetensors is damaged or truncated",
    ),
    "9 empty shard": (overwrite(b""), "model.safetensors is damaged or truncated: 0 bytes"),
    "10 header length": (overwrite((1 << 40).to_bytes(8, "little") + b"{}"), "1099511627776 bytes"),
    "11 git-lfs": (
        overwrite(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "git-lfs pointer, not the file itself. Run `git lfs pull`",
    ),
    "13 missing tensor": (
        tensors(lambda s: s.pop("model.layers.2.mlp.up_proj.weight")),
        "lack model.layers.2.mlp.up_proj.weight",
    ),
    "14 surplus layers": (config(num_hidden_layers=5), "= 5, the weights hold 6 layers"),
    "15 missing layers": (config(num_hidden_layers=7), "= 7, the weights hold 6 layers"),
    "16 shape": (
        tensors(lambda s: s.update({"model.norm.weight": torch.zeros(8)})),
        "model.norm.weight has shape [8]",
    ),
    "17 traversal": (index("../secret.safetensors"), "security: "),
    "17 absolute": (index("/etc/passwd"), "security: "),
    "18 missing shard": (index("model-00001-of-00002.safetensors"), "which is missing from"),
    "19 stale": (stale_index, "one of them is stale"),
    "82 licence pipe": (lambda f: os.mkfifo(f / "LICENSE"), "LICENSE is a named pipe"),
    "82 config pipe": (instead("config.json", os.mkfifo), "config.json is a named pipe"),
    "82 weights folder": (instead("model.safetensors", Path.mkdir), "is a folder where a file"),
    "82 weights socket": (instead("model.safetensors", bind), "is a socket where a file"),
    "82 weights device": (
        instead("model.safetensors", lambda p: p.symlink_to("/dev/null")),
        "is a device where a file",
    ),
}


@pytest.mark.parametrize("command", ["prune", "inspect"])
@pytest.mark.parametrize("fault", REFUSED)
def test_unsuitable_checkpoints_exit_3(
    program: Callable[..., tuple[int, str]],
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
    command: str,
) -> None:
    damage, message = REFUSED[fault]
    damage(model)
    if command == "inspect":
        code = main(["inspect", str(model)])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        # What cannot even be described is an error; the rest is described with the reason.
        assert code == 3 or "Prunable" in shown.out
        assert message in shown.out + shown.err
    else:
        code, error = program("prune", str(model), "--drop", "1", "-o", str(tmp_path / "out"))
        assert (code, message in error) == (3, True), error
    assert not (tmp_path / "out").exists()
    assert not (model / "evil").exists()


def run_recipe(tmp_path: Path, model: Path, **sections: object) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    data = str(tmp_path / "text.txt")
    recipe = {
        "model": str(model),
        "calibration": {"data": data, "n_sequences": 2, "seq_len": 32},
        "selection": {"drop_layers": 1},
        "recovery": {"method": "none"},
        "evaluation": {"text": {}, "seq_len": 32},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | sections))
    return ["run", str(tmp_path / "recipe.yaml"), "-q"]


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8", "bnb"])
def test_quantised_models_are_not_scored_but_sent_to_prune(
    program: Callable[..., tuple[int, str]], tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    # Rows 58 to 60, also where only the types of the tensors tell.
    source = quantised(tiny_llama, tmp_path / "source", kind)
    for hidden in (False, True):
        if hidden:
            edit_config(source, quantization_config=None)
        code, error = program(*run_recipe(tmp_path, source), "-o", str(tmp_path / "out"))
        assert code == 3
        assert "quantised" in error
        assert "`layercut prune MODEL --plan plan.json`" in error


def test_tied_heads_stay_off_the_disk(
    program: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    source = save_tiny(tmp_path / "source", tie_word_embeddings=True)
    code, _ = program("prune", str(source), "--drop", "1", "-o", str(tmp_path / "out"), "-q")
    assert code == 0
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in after
    assert len(after) == len(before) - sum(".layers.1." in name for name in before)


@pytest.mark.parametrize("fraction", ["0", "1", "1.5", "-0.1", ".nan", "'0,3'", "0.01", "0.99"])
def test_impossible_fractions_exit_2(
    program: Callable[..., tuple[int, str]], model: Path, tmp_path: Path, fraction: str
) -> None:
    command = run_recipe(tmp_path, model, selection={})
    setting = f"selection.drop_fraction={fraction}"
    code, error = program(*command, "--set", setting, "-o", str(tmp_path / "out"))
    assert code == 2, error
    assert not (tmp_path / "out").exists()


def test_pruning_again_counts_from_the_pruned_model_and_keeps_its_lineage(
    program: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    once, twice, thrice = (tmp_path / name for name in ("once", "twice", "thrice"))
    assert program("prune", str(model), "--drop", "1", "-o", str(once), "-q")[0] == 0
    assert program("prune", str(once), "--drop", "5", "-o", str(twice))[0] == 2
    assert program("prune", str(once), "--drop", "0", "-o", str(twice), "-q")[0] == 0
    command = run_recipe(tmp_path, twice, selection={"drop": [3]})
    assert program(*command, "-o", str(thrice))[0] == 0
    lineage = json.loads((thrice / "layercut" / "plan.json").read_text())["lineage"]
    assert lineage == [
        {"model": str(model), "n_layers": 6, "dropped": [1]},
        {"model": str(once), "n_layers": 5, "dropped": [0]},
    ]
    assert json.loads((thrice / "layercut" / "result.json").read_text())["lineage"] == lineage
    state, new = (load_file(f / "model.safetensors") for f in (model, thrice))
    # Of layers 0 … 5: 1 went, then 0, then the last; 2, 3, 4 stay.
    for old, name in (("2", "0"), ("3", "1"), ("4", "2")):
        key = "model.layers.{}.mlp.up_proj.weight"
        assert torch.equal(state[key.format(old)], new[key.format(name)])


def test_an_invalid_generation_config_is_copied_as_it_is(
    program: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    content = '{"temperature": 0.3, "do_sample": false}'
    (model / "generation_config.json").write_text(content)
    for name, command in (
        ("run", run_recipe(tmp_path, model)),
        ("prune", ["prune", str(model), "--drop", "1", "-q"]),
    ):
        out = tmp_path / name
        assert program(*command, "-o", str(out))[0] == 0
        assert (out / "generation_config.json").read_text() == content


def test_unusable_outputs_exit_2_and_the_source_stays(
    program: Callable[..., tuple[int, str]], model: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for out, message in [
        (tmp_path / "file", "is a file"),
        (tmp_path / "pipe", "is a file"),
        (tmp_path / "none" / "out", "does not exist"),
        (model, "source model's folder"),
        (model / "inside", "source model's folder"),
        (tmp_path, "source model's folder"),
        (tmp_path / "mine", "is not an earlier output of layercut"),
    ]:
        code, error = program("prune", str(model), "--drop", "1", "-o", str(out), "--overwrite")
        assert (code, message in error) == (2, True), error
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused_as_text(
    program: Callable[..., tuple[int, str]], model: Path, tmp_path: Path, make: Callable
) -> None:
    make(tmp_path / "odd.txt")
    data = {"data": str(tmp_path / "odd.txt"), "n_sequences": 2, "seq_len": 32}
    command = run_recipe(tmp_path, model, calibration=data)
    code, error = program(*command, "-o", str(tmp_path / "out"))
    assert (code, "odd.txt" in error) == (4, True), error
