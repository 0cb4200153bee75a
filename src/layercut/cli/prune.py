"""``layercut prune``: a checkpoint and a plan in, a pruned checkpoint out, by files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.errors import PlanError

if TYPE_CHECKING:
    from layercut.pipeline.prune_gguf import PrunedGguf

MAX_LAYERS = 10_000


def prune(
    context: typer.Context,
    model: options.ModelArgument,
    output_dir: options.OutputDirOption,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="plan.json of a run without recovery.")
    ] = None,
    drop: Annotated[
        str | None, typer.Option("--drop", metavar="LAYERS", help="Or these layers: 13-17,28.")
    ] = None,
    revision: options.RevisionOption = None,
    overwrite: options.OverwriteOption = False,
    offline: options.OfflineOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Drop layers of MODEL by copying its files: no scores, no recovery, nothing loaded.

    Works on quantised checkpoints (GPTQ, AWQ, FP8, bitsandbytes): score the original once, then
    apply its plan to every sibling. Plans of runs with a recovery are refused. A .gguf file as
    MODEL and as --output-dir stays GGUF, and quantised as it is.

    Example: layercut prune org/model-AWQ --plan out/layercut/plan.json -o out-awq
    """
    if (plan is None) == (drop is None):
        raise typer.BadParameter("give one of --plan and --drop", param_hint="--plan")
    layers = None if drop is None else parse_layers(drop)
    set_up_libraries(offline=offline)
    from layercut.cli.progress_display import progress_display
    from layercut.cli.tables import print_result
    from layercut.pipeline.prune_files import prune as by_files
    from layercut.pipeline.prune_gguf import is_gguf_to_gguf, prune_gguf

    if is_gguf_to_gguf(model, output_dir):
        with progress_display(quiet=quiet):
            pruned = prune_gguf(model, output_dir, plan=plan, drop=layers, overwrite=overwrite)
        _print_pruned(pruned, quiet=quiet)
        return
    command = options.join_command(context)
    with progress_display(quiet=quiet):
        result = by_files(
            model,
            output_dir,
            plan=plan,
            drop=layers,
            revision=revision,
            overwrite=overwrite,
            command=command,
        )
    print_result(result, output_dir, quiet=quiet)


def describe(pruned: PrunedGguf) -> Iterator[tuple[str, str]]:
    """What was done to a GGUF file, as (label, value)."""
    dropped = pruned.plan.dropped
    numbers = ", ".join(map(str, dropped)) or "none"
    yield "Layers", f"dropped {len(dropped)} of {pruned.plan.n_layers} layers ({numbers})"
    for key, (before, after) in pruned.edited.items():
        yield "Edited", f"{key}: {before} -> {after}"
    yield "Checked", f"{pruned.n_tensors:,} tensors have the sha256 that they had, every key too"
    yield "Size", f"{pruned.source_bytes / 1e6:,.1f} MB -> {pruned.n_bytes / 1e6:,.1f} MB"


def _print_pruned(pruned: PrunedGguf, *, quiet: bool) -> None:
    from layercut.cli.tables import print_fields, print_warnings

    print_warnings(pruned.warnings)
    if not quiet:
        print_fields(str(pruned.output), list(describe(pruned)))


def parse_layers(text: str) -> list[int]:
    """``13-17,28`` → the layers it names, in that order.

    Raises:
        PlanError: it is not a list of numbers and ascending ranges.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", part)
        first, last = (
            (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (1, 0)
        )
        if last < first or last > MAX_LAYERS:
            raise PlanError(
                f"--drop '{text}' should name layers like 13-17,28, counted from 0 at the "
                "embedding."
            )
        layers += range(first, last + 1)
    return layers
