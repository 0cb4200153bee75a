"""The program: its commands, its signals, and what an exception becomes."""

from __future__ import annotations

import contextlib
import errno
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, TextIO

import typer
from rich.console import Console
from safetensors import SafetensorError

from layercut.cli import (
    adapter,
    compare,
    evaluate,
    export_check,
    finetune,
    inspect,
    prune,
    recipe,
    run,
)
from layercut.cli.libraries import set_up_libraries
from layercut.cli.literal import literal
from layercut.errors import LayercutError, RecipeError, ResourceError
from layercut.launcher import find_place
from layercut.version import __version__

TERMINATED = 143
REMEDY = {
    "disk": "the disk is full. Free space, or choose another --output-dir; no output was kept.",
    "memory": "memory ran out. Lower calibration.micro_batch, calibration.seq_len or "
    "finetune.batch_size, set dtype: bfloat16, or refit with options: {gradient_steps: 0}.",
}

app = typer.Typer(
    name="layercut",
    help="Prune whole layers of causal language models, guided by gradients.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Plain help and usage errors: they read the same in a log, a pipe and a narrow terminal.
    rich_markup_mode=None,
)
app.command(name="run")(run.run)
app.command(name="inspect")(inspect.inspect)
app.command(name="prune")(prune.prune)
app.command(name="adapter")(adapter.adapter)
app.command(name="finetune")(finetune.finetune)
app.command(name="export-check")(export_check.export_check)
app.command(name="eval")(evaluate.measure)
app.command(name="compare")(compare.compare)
app.command(name="recipe", epilog=recipe.fields_help())(recipe.recipe)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"layercut {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Prune whole layers of causal language models, guided by gradients."""
    if (place := find_place()) is not None and context.invoked_subcommand != "run":
        raise RecipeError(
            f"layercut {context.invoked_subcommand} runs in one process, and {place.world} were "
            "started. Only `layercut run` shares its work: start this without a launcher."
        )


@contextlib.contextmanager
def _among_ranks(arguments: Sequence[str]) -> Iterator[None]:
    """Share the run with the processes that a launcher started beside this one, if it did.

    Rank 0 alone shows anything; which rank tells of an error is decided among them.
    """
    place = find_place()
    if place is None:
        yield
        return
    set_up_libraries(offline="--offline" in arguments)
    from layercut.pipeline.join_ranks import joined_ranks  # torch: only where it is needed

    with joined_ranks(), contextlib.ExitStack() as stack:
        if place.rank:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; default: the process's own.

    Returns:
        The exit code: 0, an exception's own (see errors.py), 130 after Ctrl-C, 143 after SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        _never_fail_to_encode(stream)
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with _among_ranks(arguments):
            app(arguments, prog_name="layercut", obj=arguments)
    except SystemExit as stop:  # how typer ends, also after Ctrl-C
        return stop.code if isinstance(stop.code, int) else 0
    except LayercutError as error:
        return _fail(str(error), error.exit_code)
    except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
        shortage = _shortage(error)
        if shortage is None:
            raise
        return _fail(REMEDY[shortage], ResourceError.exit_code)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    """SIGTERM as an exception, so that temporary folders are removed on the way out."""
    raise SystemExit(TERMINATED)


def _never_fail_to_encode(stream: TextIO) -> None:
    """Show what the terminal cannot encode as an escape instead of crashing on it."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def _shortage(error: BaseException) -> str | None:
    """``disk`` or ``memory`` if that is what ``error`` is about."""
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return "disk"
    # torch's class and message by name: torch itself is not imported for this.
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or number == errno.ENOMEM or "can't allocate memory" in text:
        return "memory"
    return None


def _fail(message: str, exit_code: int) -> int:
    console = Console(stderr=True)
    console.print(literal("error: ", "bold red"), literal(message), sep="", soft_wrap=True)
    return exit_code
