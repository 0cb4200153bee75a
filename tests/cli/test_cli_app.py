"""The command line as a user meets it: a process, its two streams and its exit code."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from safetensors import SafetensorError

from layercut import __version__
from layercut.cli import app as cli_app
from layercut.cli import main
from layercut.cli.recipe import template
from layercut.errors import LayercutError
from layercut.recipe.recipe import Recipe, load_recipe


def layercut(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "layercut", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
        timeout=60,
        check=False,
    )


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text("model: ./nowhere\nselection: {drop_layers: 2}\n")
    return str(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["recipe", "--help"],
        ["prune", "--help"],
        ["inspect", "--help"],
        ["export-check", "--help"],
        ["compare", "--help"],
        ["compare", "-m", "none", "-o", "none", "--methods", "shortgtp"],
        ["recipe"],
        ["run", "none.yaml", "-o", "x"],
    ],
)
def test_help_and_recipe_mistakes_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from layercut.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'layercut.pipeline.run'};"
        "sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"layercut {__version__}\n"


def test_recipe_prints_a_template_that_is_the_default_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe"]) == 0
    path = tmp_path / "template.yaml"
    path.write_text(capsys.readouterr().out)
    default = load_recipe({"model": "embedded:smollm2-135m"}, environ={})
    assert load_recipe(path, environ={}) == default


def test_template_explains_every_key_above_it() -> None:
    lines = [line.strip() for line in template().splitlines()]
    for section in (Recipe, *(type(v) for v in vars(Recipe(model="m")).values())):
        for key in getattr(section, "model_fields", {}):
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
            assert lines[at - 1].startswith("# ")


def test_recipe_help_lists_keys_with_their_sections() -> None:
    shown = layercut("recipe", "--help").stdout
    assert "  calibration.seq_len: tokens per window\n" in shown
    assert shown.isascii()


def test_print_config_shows_the_resolved_recipe(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", recipe_file, "--print-config", "--set", "seed=7"]) == 0
    shown = capsys.readouterr().out
    assert shown == load_recipe(recipe_file, ["seed=7"], {}).to_yaml()
    assert "seed: 7\n" in shown
    assert "  drop_layers: 2\n" in shown


def test_environment_reaches_the_recipe(recipe_file: str) -> None:
    done = layercut("run", recipe_file, "--print-config", LAYERCUT__CALIBRATION__SEQ_LEN="99")
    assert "  seq_len: 99\n" in done.stdout


def test_recipe_errors_exit_2_and_list_everything_without_a_traceback(recipe_file: str) -> None:
    done = layercut(
        "run", recipe_file, "-o", "out", "--set", "sede=1", "--set", "selection.drop_layers=0"
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: {recipe_file} has 2 problems:\n"
        "  selection.drop_layers: should be greater than or equal to 1, got 0 "
        "(from --set selection.drop_layers)\n"
        "  sede: unknown key; did you mean 'seed'? (from --set sede)\n"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Missing argument 'RECIPE|MODEL'"),
        (["run", "r.yaml"], "Invalid value for --output-dir: missing"),
        (["run", "r.yaml", "--ouput-dir", "x"], "No such option: --ouput-dir"),
        (["rnu"], "No such command 'rnu'"),
    ],
)
def test_usage_errors_exit_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_messages_keep_brackets_and_long_lines(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[bold]" + "x" * 200 + ".yaml"
    assert main(["run", name, "-o", "x"]) == 2
    assert f"the recipe {name} does not exist" in capsys.readouterr().err


def test_names_that_the_terminal_cannot_show_are_escaped() -> None:
    done = layercut("run", "ü.yaml", "-o", "x", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert done.stderr.startswith("error: the recipe \\xfc.yaml does not exist")


class TestExceptions:
    """What the body of a command raises; the body stands in for the pipeline."""

    @staticmethod
    def run(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
        def body() -> None:
            raise error

        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(body)
        monkeypatch.setattr(cli_app, "app", app)
        return main([])

    @pytest.mark.parametrize("kind", LayercutError.__subclasses__())
    def test_each_error_has_its_exit_code(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        kind: type[LayercutError],
    ) -> None:
        assert self.run(monkeypatch, kind("what, where, remedy")) == kind.exit_code
        assert capsys.readouterr().err == "error: what, where, remedy\n"

    @pytest.mark.parametrize(
        ("error", "message"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
            (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
            (MemoryError(), r"memory ran out. Lower calibration.micro_batch"),
            (torch.OutOfMemoryError("CUDA out of memory"), "memory ran out"),
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory ran out"),
            (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        ],
    )
    def test_shortages_exit_7_with_a_remedy(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: Exception,
        message: str,
    ) -> None:
        assert self.run(monkeypatch, error) == 7
        assert message in capsys.readouterr().err

    def test_ctrl_c_exits_130(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.run(monkeypatch, KeyboardInterrupt()) == 130

    @pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), OSError("bug")])
    def test_bugs_stay_visible(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        with pytest.raises(type(error), match="bug"):
            self.run(monkeypatch, error)


def test_sigterm_unwinds_and_exits_143() -> None:
    code = (
        "import os, signal, sys; import typer; from layercut.cli import app\n"
        "def body():\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); signal.pause()\n"
        "    finally: print('cleaned up')\n"
        "app.app = typer.Typer(add_completion=False); app.app.command()(body)\n"
        "sys.exit(app.main([]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (143, "cleaned up\n", "")


def test_main_restores_the_signal_handler() -> None:
    before = signal.getsignal(signal.SIGTERM)
    main(["--version"])
    assert signal.getsignal(signal.SIGTERM) is before
