"""``layercut run``: a recipe in, a pruned and verified checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.launcher import find_place
from layercut.recipe.recipe import load_recipe


def run(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A YAML file; `layercut recipe` prints a template."),
    ],
    output_dir: Annotated[Path | None, options.OUTPUT_DIR] = None,
    settings: options.SettingsOption = None,
    overwrite: options.OverwriteOption = False,
    offline: options.OfflineOption = False,
    quiet: options.QuietOption = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and stop.")
    ] = False,
) -> None:
    """Prune the model that RECIPE names and write the result to OUTPUT_DIR.

    Precedence: --set, then environment (LAYERCUT__SECTION__KEY), then RECIPE, then defaults.

    Example: layercut run recipes/demo.yaml --set selection.drop_layers=4 --output-dir runs/four
    """
    if output_dir is None and not print_config:
        raise typer.BadParameter("missing; name the checkpoint's folder", param_hint="--output-dir")
    resolved = load_recipe(recipe, settings or ())
    if output_dir is None or print_config:
        typer.echo(resolved.to_yaml(), nl=False)
        return
    set_up_libraries(offline=offline)
    # Imported here: --help and a recipe's mistakes must not wait for torch, and the libraries
    # read their variables when they are imported.
    from layercut.cli.progress_display import progress_display
    from layercut.cli.tables import print_result
    from layercut.pipeline.run import run as run_recipe

    command = options.join_command(context)
    place = find_place()
    speaks = place is None or place.rank == 0
    with progress_display(quiet=quiet or not speaks):
        result = run_recipe(resolved, output_dir, overwrite=overwrite, command=command)
    if speaks:
        print_result(result, output_dir, quiet=quiet)
