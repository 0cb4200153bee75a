"""Folders beside the output that hold work in progress: marked as ours, and removed only if so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercut.errors import OutputError

RUN_FILE = "layercut-run.json"
"""In a folder that layercut made for work in progress: what that belongs to."""


def folder_beside(output_dir: Path, kind: str) -> Path:
    """``OUTPUT_DIR.kind``, whatever links lead to the output."""
    home = output_dir.resolve()
    return home.with_name(f"{home.name}.{kind}")


def check_claimed(folder: Path, purpose: str) -> None:
    """Refuse a folder that holds something else than layercut's work in progress.

    Args:
        folder: it need not exist.
        purpose: what it is the place for, e.g. ``the checkpoints of the training``.

    Raises:
        OutputError: it is a file, or has content and no ``RUN_FILE``.
    """
    if (folder / RUN_FILE).is_file() or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise OutputError(
            f"{folder}, the place for {purpose}, was not made by "
            "layercut. Move it away, or choose another output folder."
        )


def remove_claimed(folder: Path) -> None:
    """Remove a folder that layercut marked; leave any other."""
    if (folder / RUN_FILE).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def encode_mark(contents: Any) -> str:
    """Content of ``RUN_FILE``."""
    return json.dumps(contents) + "\n"


def find_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "", *, strict: bool = False
) -> list[str]:
    """``key old value there, new value now`` for every key whose value differs in both.

    Args:
        old: nested mappings of JSON values.
        new: others.
        prefix: in front of every key.
        strict: a key that only one of both has differs as well; the other's value is ``None``.
    """
    differences = []
    for key in old.keys() | new.keys() if strict else old.keys() & new.keys():
        before, now, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            differences += find_differences(before, now, f"{name}.", strict=strict)
        elif before != now:
            differences.append(f"{name} {before} there, {now} now")
    return sorted(differences)
