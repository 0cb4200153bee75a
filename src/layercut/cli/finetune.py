"""``layercut finetune``: a checkpoint and a task in, a tuned and verified checkpoint out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layercut.cli.libraries import set_up_libraries
from layercut.cli.options import TaskOption, TextOption, named_sources
from layercut.recipe.recipe import load_recipe


def finetune(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a Hub name, or embedded:smollm2-135m.")
    ],
    data: Annotated[
        str, typer.Option("--data", help="Training rows: a table, hub:…, embedded:reviews@train.")
    ],
    output_dir: Annotated[
        Path, typer.Option("--output-dir", "-o", help="The tuned checkpoint's folder.")
    ],
    mode: Annotated[
        Literal["lora", "full"] | None, typer.Option("--mode", help="LoRA, merged, or full.")
    ] = None,
    text: TextOption = None,
    task: TaskOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A recipe key, as finetune.epochs=1; repeatable."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier output.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never ask the Hub; use its cache only.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")
    ] = False,
) -> None:
    """Fine-tune MODEL on the rows of DATA, with the loss on the completions alone.

    The defaults are GradPruner's: LoRA on every linear sub-layer, merged at the end; `layercut
    recipe` lists every key of the section finetune. The same command goes on after an interruption.

    Example: layercut finetune out/pruned --data train.jsonl --task t=test.jsonl -o out/tuned
    """
    section: dict[str, Any] = {"data": data} | ({"mode": mode} if mode else {})
    content = {
        "model": model,
        "finetune": section,
        "evaluation": {
            "text": named_sources(text, "--text"),
            "tasks": named_sources(task, "--task"),
        },
    }
    recipe = load_recipe(content, settings or ())
    set_up_libraries(offline=offline)
    from layercut.cli.progress_display import progress_display
    from layercut.cli.tables import print_result
    from layercut.pipeline.finetune_run import finetune_checkpoint

    command = shlex.join(["layercut", *context.obj])
    with progress_display(quiet=quiet):
        result = finetune_checkpoint(recipe, output_dir, overwrite=overwrite, command=command)
    print_result(result, output_dir, quiet=quiet)
