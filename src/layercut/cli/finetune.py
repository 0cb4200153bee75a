"""``layercut finetune``: a checkpoint and a task in, a tuned and verified checkpoint out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.recipe.recipe import load_recipe


def finetune(
    context: typer.Context,
    model: options.ModelArgument,
    data: Annotated[
        str, typer.Option("--data", help="Training rows: a table, hub:…, embedded:reviews@train.")
    ],
    output_dir: options.OutputDirOption,
    mode: Annotated[
        Literal["lora", "full"] | None, typer.Option("--mode", help="LoRA, merged, or full.")
    ] = None,
    text: options.TextOption = None,
    task: options.TaskOption = None,
    settings: options.SettingsOption = None,
    overwrite: options.OverwriteOption = False,
    offline: options.OfflineOption = False,
    quiet: options.QuietOption = False,
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
            "text": options.parse_sources(text, "--text"),
            "tasks": options.parse_sources(task, "--task"),
        },
    }
    recipe = load_recipe(content, settings or ())
    set_up_libraries(offline=offline)
    from layercut.cli.progress_display import progress_display
    from layercut.cli.tables import print_result
    from layercut.pipeline.finetune_run import finetune_checkpoint

    command = options.join_command(context)
    with progress_display(quiet=quiet):
        result = finetune_checkpoint(recipe, output_dir, overwrite=overwrite, command=command)
    print_result(result, output_dir, quiet=quiet)
