"""``layercut export-check``: which engines would mis-run a checkpoint, and why."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries
from layercut.errors import VerificationError


def export_check(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A checkpoint's folder; config.json is enough.")
    ],
    json_file: options.JsonOption = None,
) -> None:
    """Say which engines would mis-run the checkpoint OUT: vLLM, llama.cpp, Ollama, older readers.

    Some engines derive a layer's type from its number, which pruning changes. The exit code is 6 if
    any known engine would mis-run OUT, else 0.

    Example: layercut export-check out
    """
    set_up_libraries(offline=True)
    from layercut.checkpoints.export_check import export_check as check
    from layercut.cli.tables import print_fields

    findings = check(folder)
    options.write_json(
        json_file, {"schema": 1, "findings": [asdict(finding) for finding in findings]}
    )
    if not findings:
        print_fields(str(folder), [("Portable", "no engine is known to mis-run this checkpoint")])
        return
    rows = [(f.engine, f"{f.why}. {f.remedy} [{f.source}]") for f in findings]
    print_fields(str(folder), rows)
    engines = ", ".join(dict.fromkeys(finding.engine for finding in findings))
    raise VerificationError(f"{folder} would be mis-run by {engines}. See above for each reason.")
