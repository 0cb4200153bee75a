"""Odd names, sizes and encodings through the real program: shown as they are, or refused."""

from __future__ import annotations

import codecs
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from layercut.cli import main
from layercut.data.tasks import read_rows
from layercut.errors import DataError

TEXT = "The quick brown fox jumps over the lazy dog. " * 100
NAME = "[red]x[bold] <b>&amp; `t` *s* \x1b[31m\u202e\n# $1$ {{7*7}}"
SHOWN = r"[red]x[bold] <b>&amp; `t` *s* \x1b[31m\u202e\n# $1$ {{7*7}}"
Program = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Program:
    """Runs the program: its exit code, its output and its errors."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        code = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return run


def test_names_with_markup_are_shown_as_they_are(
    program: Program, model: Path, tmp_path: Path
) -> None:
    folder = model.rename(tmp_path / NAME)
    for command in (
        ["inspect", folder],
        ["export-check", folder],
        ["inspect", tmp_path / f"{NAME}?"],
    ):
        code, out, err = program(*command)
        assert SHOWN in out + err
        assert "\x1b" not in out + err
    recipe = tmp_path / f"{NAME}.yaml"
    recipe.write_text("modle: x")
    code, _, err = program("run", recipe, "-o", tmp_path / "out")
    assert (code, SHOWN in err) == (2, True)


def test_names_with_markup_are_literal_in_what_a_run_writes(
    program: Program, model: Path, tmp_path: Path
) -> None:
    folder = model.rename(tmp_path / NAME)
    (tmp_path / "text.txt").write_text(TEXT)
    data = str(tmp_path / "text.txt")
    recipe = {
        "model": str(folder),
        "calibration": {"data": data, "n_sequences": 2, "seq_len": 32},
        "selection": {"drop_layers": 1},
        "recovery": {"method": "none"},
        "evaluation": {"text": {f"[/red]{NAME}": data}, "seq_len": 32, "max_tokens": 64},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out = tmp_path / f"out {NAME}"
    code, shown, err = program("run", tmp_path / "recipe.yaml", "-o", out)
    assert code == 0, err
    assert "\x1b" not in shown + err
    assert SHOWN in shown
    html = (out / "layercut" / "report.html").read_text()
    assert "<b>&amp;amp;" not in html
    assert "&lt;b&gt;&amp;amp;" in html
    card = (out / "README.md").read_text()
    _, front_matter, body = card.split("---\n", 2)
    assert yaml.safe_load(front_matter)["library_name"] == "transformers"
    heading = next(line for line in body.splitlines() if line.startswith("# "))
    assert r"\[red\]x\[bold\] \<b\>\&amp; \`t\` \*s\* \x1b\[31m" in heading.replace("\\\\", "\\")
    result = json.loads((out / "layercut" / "result.json").read_text())
    assert result["model"] == str(folder)


def test_names_that_are_not_utf8_are_refused_or_spelled_out(
    program: Program, model: Path, tmp_path: Path
) -> None:
    folder = model.rename(tmp_path / os.fsdecode(b"bad\xff"))
    for command in (["inspect", folder], ["prune", folder, "--drop", "1", "-o", tmp_path / "out"]):
        code, _, err = program(*command)
        assert code == 3
        assert "has a name that is not UTF-8" in err
    (tmp_path / os.fsdecode(b"odd\xff.yaml")).write_text("modle: x")
    assert program("run", tmp_path / os.fsdecode(b"odd\xff.yaml"), "-o", tmp_path / "out")[0] == 2


@pytest.mark.parametrize("name", ["x" * 300, "a/" + "b" * 300, "/" + "y" * 5000, "loop"])
def test_names_that_no_file_can_have_are_refused(
    program: Program, model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    path = tmp_path / name
    assert program("inspect", path)[0] == 3
    assert program("export-check", path)[0] == 3
    assert program("run", path, "-o", tmp_path / "out")[0] == 2
    assert program("prune", model, "--plan", path, "-o", tmp_path / "out")[0] == 2
    assert program("prune", model, "--drop", "1", "-o", path)[0] == 2
    assert program("eval", model, "--text", f"a={path}", "--no-speed")[0] == 4
    assert program("inspect", model, "--json", path / "file.json")[0] == 2


@pytest.mark.parametrize("name", ["a\0b", "~nobody-of-this-name/x"])
def test_null_characters_and_unknown_homes_are_no_paths(
    program: Program, model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    cut = {"n_sequences": 2, "seq_len": 32}
    for changes, expected in (
        ({"model": name}, 3),
        ({"calibration": {"data": name, **cut}}, 4),
        ({"evaluation": {"text": {"a": name}, "seq_len": 32}}, 4),
        ({"evaluation": {"text": {}, "tasks": {"a": f"{name}@test"}, "seq_len": 32}}, 4),
    ):
        usable = {"data": str(tmp_path / "text.txt"), **cut}
        recipe = {"model": str(model), "selection": {"drop_layers": 1}, "calibration": usable}
        recipe |= {"evaluation": {"text": {}, "seq_len": 32}} | changes
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        code, _, err = program("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
        assert code == expected, err


def test_rows_beyond_any_context_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 8_000_001, "completion": "b"}))
    with pytest.raises(DataError, match=r"line 1: 'prompt' holds 8,000,001 characters"):
        read_rows(str(tmp_path / "rows.jsonl"))


def test_a_name_too_long_for_the_folder_beside_it_is_refused_early(
    program: Program, model: Path, tmp_path: Path
) -> None:
    code, _, err = program("prune", model, "--drop", "1", "-o", tmp_path / ("x" * 250))
    assert (code, "cannot be written to (File name too long)" in err) == (2, True), err


def test_a_tokenizer_that_cannot_encode_text_is_refused(
    program: Program, model: Path, tmp_path: Path
) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
    (model / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text(TEXT)
    row = {"prompt": "The fox", "completion": " jumps"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    for source in (("--text", "a=text.txt"), ("--task", "a=rows.jsonl")):
        flag, named = source[0], source[1].replace("=", f"={tmp_path}/")
        code, _, err = program("eval", model, flag, named, "--no-speed", "--seq-len", "64")
        assert code in (3, 4)
        assert "the tokenizer cannot encode" in err
        assert "[UNK]" in err


@pytest.mark.parametrize(
    "changes",
    [{"max_position_embeddings": "x"}, {"architectures": {"a": 1}}, {"num_hidden_layers": [6]}],
)
def test_values_of_another_type_are_described_with_the_reason(
    program: Program, model: Path, changes: dict
) -> None:
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(content | changes))
    code, out, _ = program("inspect", model)
    assert (code, "Prunable" in out) == (0, True)


def large(path: Path) -> None:
    path.write_text("{")
    os.truncate(path, 100_000_000)


def encoded(encoding: str, mark: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(mark + path.read_text().encode(encoding))


CONFIGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "large": (large, "holds 100 MB, and no such file has more than 16 MB"),
    "byte order mark": (encoded("utf-8", codecs.BOM_UTF8), "byte order mark of UTF-8"),
    "UTF-16": (encoded("utf-16-le", codecs.BOM_UTF16_LE), "byte order mark of UTF-16"),
    "UTF-32": (encoded("utf-32-be", codecs.BOM_UTF32_BE), "byte order mark of UTF-32"),
    "Latin-1": (lambda path: path.write_bytes(b'{"a": "\xe9"}'), "is not UTF-8 at byte 7"),
    "deep": (lambda path: path.write_text('{"a":' * 150 + "1" + "}" * 150), "100 deep"),
    "too deep": (lambda path: path.write_text("[" * 10**5), "is not valid JSON"),
    "a list": (lambda path: path.write_text("[]"), "does not hold a JSON object"),
    "empty": (lambda path: path.write_text(""), "is not valid JSON"),
    "a billion layers": (
        lambda path: path.write_text(json.dumps({"model_type": "llama", "n_layers": 10**9})),
        "config.json says n_layers = 1000000000",
    ),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_unreadable_configurations_exit_3(
    program: Program, model: Path, tmp_path: Path, fault: str
) -> None:
    damage, message = CONFIGS[fault]
    damage(model / "config.json")
    for command in (
        ["prune", model, "--drop", "1", "-o", tmp_path / "out"],
        ["export-check", model],
        ["eval", model, "--text", "embedded:docs"],
    ):
        code, _, err = program(*command)
        assert (code, message in err, "config.json" in err) == (3, True, True), err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", b"\xef\xbb\xbf{}", "starts with the byte order mark"),
        ("generation_config.json", b'{"eos_token_id": 0', "is not valid JSON"),
        ("generation_config.json", b'{"cache_implementation": "none such"}', "none such"),
        ("tokenizer_config.json", b"\xef\xbb\xbf{}", "starts with the byte order mark"),
    ],
)
def test_small_files_that_transformers_passes_over_or_stumbles_over_later_are_refused(
    program: Program, model: Path, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (model / name).write_bytes(content)
    code, _, err = program("prune", model, "--drop", "1", "-o", tmp_path / "out")
    assert (code, message in err, name in err) == (3, True, True), err
    assert not (tmp_path / "out").exists()
