"""``layercut compare`` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from layercut.cli import main
from layercut.cli.compare import parse_sizes
from layercut.errors import RecipeError


@pytest.fixture
def command(tiny_llama: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    flags = ["--data", str(text), "--sequences", "4", "--seq-len", "32", "--window", "32"]
    flags += ["--text", f"fox={text}", "--max-tokens", "128", "--no-layer-losses", "-q"]
    return ["compare", "-m", str(tiny_llama), *flags]


def test_the_table_has_dense_and_every_method_by_size(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    flags = ["--drop-layers", "2,1", "--methods", "shortgpt, reverse-order", "-o", str(out)]
    assert main([*command, *flags]) == 0
    shown = capsys.readouterr().out
    names = [line.split()[0] for line in shown.splitlines() if "±" in line or "+/-" in line]
    assert names[0] == "dense"
    assert sorted(names[1:3]) == sorted(names[3:5]) == ["reverse-order", "shortgpt"]
    assert str(out / "report.html") in shown
    assert {"compare.csv", "compare.json", "report.html"} < {path.name for path in out.iterdir()}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "shortgtp"], "did you mean 'shortgpt'"),
        (["--methods", "gradmap+reft"], "did you mean 'refit'"),
        (["--drop-layers", "3-6"], "like 3,6,9"),
        (["--drop-layers", "0"], "drop_layers"),
        (["--drop-layers", "6"], "cannot drop 6 of 6 layers"),
        (["--heal-minutes", "1", "--heal-steps", "5"], "minutes"),
        (["--heal-label-weight", "0.5"], "give either minutes or steps"),
        (["--heal-methods", "reverse-order"], "heal has no minutes or steps"),
        (["--heal-steps", "5", "--heal-methods", "sleb"], "sleb is not among the methods"),
    ],
)
def test_mistakes_end_with_2_before_anything_is_written(
    command: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
):
    out = tmp_path / "out"
    assert main([*command, *flags, "-o", str(out)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_missing_data_ends_with_4(command: list[str], tmp_path: Path):
    flags = ["--drop-layers", "1", "--text", "b=none.txt", "-o", str(tmp_path / "out")]
    assert main([*command, *flags]) == 4
    assert not (tmp_path / "out").exists()


def test_other_settings_need_overwrite(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--methods", "reverse-order", "--drop-layers", "1", "-o", str(tmp_path / "out")]
    assert main([*command, *flags]) == 0
    assert main([*command, *flags, "--seed", "1"]) == 2
    assert "seed 0 there, 1 now" in " ".join(capsys.readouterr().err.split())
    assert main([*command, *flags, "--seed", "1", "--overwrite"]) == 0


def test_sizes_are_numbers_with_commas_in_between():
    assert parse_sizes("9, 3,6") == [9, 3, 6]
    with pytest.raises(RecipeError, match="like 3,6,9"):
        parse_sizes("3;6")
