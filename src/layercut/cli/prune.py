"""``layercut prune``: a checkpoint and a plan in, a pruned checkpoint out, by files alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.errors import PlanError

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
    apply its plan to every sibling. Plans of runs with a recovery are refused.

    Example: layercut prune org/model-AWQ --plan out/layercut/plan.json -o out-awq
    """
    if (plan is None) == (drop is None):
        raise typer.BadParameter("give one of --plan and --drop", param_hint="--plan")
    layers = None if drop is None else parse_layers(drop)
    set_up_libraries(offline=offline)
    from layercut.cli.progress_display import progress_display
    from layercut.cli.tables import print_result
    from layercut.pipeline.prune_files import prune as by_files

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
