"""``layercut run``: a recipe or a model in, a pruned and verified checkpoint out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.launcher import find_place
from layercut.recipe.recipe import load_recipe
from layercut.recipe.selection import AMOUNTS

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
DEFAULT_EFFORT = "standard"


def run(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|MODEL",
            help="A YAML file (`layercut recipe` prints a template); or a model: a folder, a Hub "
            "name, or embedded:smollm2-135m.",
        ),
    ],
    output_dir: Annotated[Path | None, options.OUTPUT_DIR] = None,
    drop: Annotated[
        str | None,
        typer.Option(metavar="N|P%", help="How many layers go, or which share of them."),
    ] = None,
    drop_parameters: Annotated[
        str | None,
        typer.Option(metavar="P%", help="Or: which share of all parameters goes, at least."),
    ] = None,
    max_perplexity_ratio: Annotated[
        float | None,
        typer.Option(metavar="R", help="Or: as many as keep perplexity within R times the dense."),
    ] = None,
    effort: Annotated[
        Literal["quick", "standard", "thorough"] | None,
        typer.Option(
            help="2, 20 or 60 minutes in all, on any machine. Default: standard for a MODEL, what "
            "it says for a RECIPE."
        ),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="N", help="Or: N minutes in all.")
    ] = None,
    settings: options.SettingsOption = None,
    overwrite: options.OverwriteOption = False,
    offline: options.OfflineOption = False,
    quiet: options.QuietOption = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the recipe and stop.")
    ] = False,
) -> None:
    """Prune a model, by a RECIPE or with the defaults, and write the result to OUTPUT_DIR.

    Precedence: options, then --set, then environment (LAYERCUT__SECTION__KEY), then RECIPE, then
    defaults.

    Example: layercut run ./my-model --drop 25% -o runs/quarter

    Example: layercut run recipes/demo.yaml --drop 4 --output-dir runs/four
    """
    if output_dir is None and not print_config:
        raise typer.BadParameter("missing; name the checkpoint's folder", param_hint="--output-dir")
    flags = list_flags(drop, drop_parameters, max_perplexity_ratio, effort, minutes)
    resolved = load_recipe(read_source(source, flags, settings or ()), [*(settings or ()), *flags])
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


def list_flags(
    drop: str | None,
    drop_parameters: str | None,
    max_perplexity_ratio: float | None,
    effort: str | None,
    minutes: float | None,
) -> list[str]:
    """The options that spell a recipe's key, as ``KEY=VALUE``."""
    amounts = []
    if drop is not None and drop.endswith("%"):
        amounts.append(f"selection.drop_fraction={read_share(drop, '--drop')}")
    elif drop is not None:
        if not drop.isdecimal():
            raise typer.BadParameter(
                f"'{drop}' should be a number of layers, as 6, or a share, as 25%",
                param_hint="--drop",
            )
        amounts.append(f"selection.drop_layers={drop}")
    if drop_parameters is not None:
        share = read_share(drop_parameters, "--drop-parameters")
        amounts.append(f"selection.drop_parameters={share}")
    if max_perplexity_ratio is not None:
        amounts.append(f"selection.max_perplexity_ratio={max_perplexity_ratio}")
    if len(amounts) > 1:
        raise typer.BadParameter(
            "--drop, --drop-parameters and --max-perplexity-ratio say the same thing; give one"
        )
    if effort is not None and minutes is not None:
        raise typer.BadParameter("--effort and --minutes say the same thing; give one")
    time = [f"effort={effort}", "minutes=null"] if effort else []
    time = [f"minutes={float(minutes)}", "effort=null"] if minutes is not None else time
    return amounts + time


def read_share(text: str, flag: str) -> float:
    """``25%`` → 0.25."""
    try:
        share = float(text.removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not text.endswith("%") or not 0 < share < 1:
        raise typer.BadParameter(
            f"'{text}' should be a percentage, as 25%, between 0% and 100%", param_hint=flag
        )
    return share


def read_source(
    source: str, flags: Sequence[str], settings: Sequence[str]
) -> str | Mapping[str, Any]:
    """The recipe's file, or the content of one for a model."""
    suffix = Path(source).suffix.lower()
    if suffix in WEIGHT_SUFFIXES and _is_file(source):
        raise typer.BadParameter(
            f"{source} holds weights, and is no recipe. A model is a folder, a Hub name, or "
            "embedded:smollm2-135m; `layercut prune` takes a .gguf",
            param_hint="RECIPE|MODEL",
        )
    if suffix in RECIPE_SUFFIXES or _is_file(source):
        return source
    given = [setting.partition("=")[0].strip() for setting in (*flags, *settings)]
    if not any(key.removeprefix("selection.") in AMOUNTS for key in given):
        raise typer.BadParameter("missing: how many layers go, as 6 or 25%", param_hint="--drop")
    has_time = any(key in ("effort", "minutes") for key in given)
    return {"model": source} if has_time else {"model": source, "effort": DEFAULT_EFFORT}


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False
