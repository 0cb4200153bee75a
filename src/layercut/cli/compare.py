"""``layercut compare``: many methods on one model, text and budget, side by side."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.errors import RecipeError


def compare(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-m", help=options.MODEL_HELP)],
    output_dir: options.OutputDirOption,
    data: Annotated[
        list[str] | None,
        typer.Option("--data", help="Calibration text; may be repeated.  [default: embedded:docs]"),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 48,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per calibration window.")] = 256,
    drop_layers: Annotated[
        str, typer.Option("--drop-layers", metavar="SIZES", help="Sizes to compare at.")
    ] = "3,6,9,12",
    names: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAMES",
            help="Presets, SCORE+RECOVERY pairs, published, or all, with commas in between.",
        ),
    ] = None,
    text: options.TextOption = None,
    task: options.TaskOption = None,
    harness: options.HarnessOption = None,
    harness_limit: options.HarnessLimitOption = None,
    harness_batch_size: options.HarnessBatchOption = 8,
    max_tokens: options.MaxTokensOption = 8192,
    window: options.WindowOption = 512,
    layer_losses: Annotated[
        bool, typer.Option(help="Also measure the loss without each layer, a pass each.")
    ] = True,
    heal_minutes: Annotated[
        float | None, typer.Option(min=0.01, help="Also heal each for so long, and dense with it.")
    ] = None,
    heal_steps: Annotated[
        int | None, typer.Option(min=1, help="Or for so many optimiser steps.")
    ] = None,
    heal_label_weight: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of a heal's loss that the text's own next token gets."
        ),
    ] = 0.0,
    heal_methods: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Heal these alone.")
    ] = None,
    speed: options.SpeedOption = False,
    seed: Annotated[int, typer.Option(min=0, help="Of every random choice.")] = 0,
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Discard an earlier comparison in the folder.")
    ] = False,
    offline: options.OfflineOption = False,
    quiet: options.NoProgressOption = False,
) -> None:
    """Prune MODEL by many methods at many sizes and measure each; no checkpoint is written.

    Writes compare.csv, compare.json and report.html. The same command goes on after an
    interruption; further methods, sizes, texts and tasks are added to what is there.

    Example: layercut compare -m embedded:smollm2-135m --methods ours,gradmap,shortgpt
    --drop-layers 6,9 -o runs/compare
    """
    texts = options.parse_sources(text, "--text")
    content: dict[str, Any] = {
        "model": model,
        "revision": revision,
        "seed": seed,
        "dtype": dtype,
        "calibration": {"n_sequences": sequences, "seq_len": seq_len},
        "drop_layers": parse_sizes(drop_layers),
        "evaluation": {
            "tasks": options.parse_sources(task, "--task"),
            "harness": harness or (),
            "harness_limit": harness_limit,
            "harness_batch_size": harness_batch_size,
            "seq_len": window,
            "max_tokens": max_tokens,
        },
        "layer_losses": layer_losses,
        "speed": speed,
    }
    if data:
        content["calibration"]["data"] = data if len(data) > 1 else data[0]
    if texts:
        content["evaluation"]["text"] = texts
    if names is not None:
        content["methods"] = [name.strip() for name in names.split(",")]
    if heal_minutes is not None or heal_steps is not None or heal_label_weight:
        budget = {"minutes": heal_minutes, "steps": heal_steps}
        content["heal"] = {**budget, "label_weight": heal_label_weight}
    if heal_methods is not None:
        content["heal_methods"] = [name.strip() for name in heal_methods.split(",")]
    from layercut.comparison.config import ComparisonConfig
    from layercut.recipe.validation import validate

    settings = validate(ComparisonConfig, content, "compare")
    set_up_libraries(offline=offline)
    from layercut.cli.comparison_table import print_comparison
    from layercut.cli.progress_display import progress_display
    from layercut.comparison.run import compare as run_all

    command = options.join_command(context)
    with progress_display(quiet=quiet):
        result = run_all(settings, output_dir, overwrite=overwrite, command=command)
    print_comparison(result, output_dir)


def parse_sizes(text: str) -> list[int]:
    """``3,6,9`` → the numbers.

    Raises:
        RecipeError: it is not a list of numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RecipeError(f"--drop-layers '{text}' should list numbers of layers, like 3,6,9.")
    return [int(part) for part in parts]
