"""``layercut adapter``: a LoRA adapter of the dense model, renumbered for the pruned one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries


def adapter(
    adapter_dir: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The folder that PEFT saved the adapter to.")
    ],
    output_dir: options.OutputDirOption,
    plan: Annotated[
        Path, typer.Option("--plan", help="plan.json by which the adapter's model was pruned.")
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="The pruned model; default: the checkpoint that --plan lies in."),
    ] = None,
    overwrite: options.OverwriteOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Move ADAPTER, a PEFT adapter of the dense model, to the pruned model; nothing is trained.

    Tensors of dropped layers go, the others are renamed and copied byte for byte. What the
    adapter's configuration says of single layers is renumbered.

    Example: layercut adapter my-lora --plan out/layercut/plan.json -o my-lora-pruned
    """
    set_up_libraries(offline=True)
    from layercut.cli.progress_display import progress_display
    from layercut.cli.tables import print_fields
    from layercut.pipeline.move_adapter import move_adapter

    with progress_display(quiet=quiet):
        moved = move_adapter(adapter_dir, output_dir, plan=plan, base=base, overwrite=overwrite)
    if not quiet:
        fields = [
            ("Fits", moved.base),
            ("Tensors", f"{moved.n_kept:,} copied, {moved.n_dropped:,} of dropped layers left out"),
            ("Edited", ", ".join(moved.edited) or "nothing"),
        ]
        print_fields(str(moved.output), fields)
