"""Checkpoints that are converted once and kept in the user's cache."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import platformdirs

from layercut import progress
from layercut.checkpoints.json_edit import replace_values
from layercut.checkpoints.output_dir import staged_folder
from layercut.errors import OutputError

Convert = Callable[[Path], None]
"""Writes a checkpoint into an empty folder."""


def cache_conversion(name: str, stage: str, prepare: Callable[[], Convert]) -> Path:
    """The checkpoint ``name`` in the cache, converted if it is not there yet.

    Args:
        name: of its folder; another name whenever the conversion writes something else.
        stage: what the progress display calls the conversion.
        prepare: refuses what cannot be converted, before any folder is made, or returns what
            converts it.

    Raises:
        OutputError: the cache folder cannot be written to.
        ResourceError: the disk is full.
    """
    cache = Path(os.environ.get("LAYERCUT_CACHE") or platformdirs.user_cache_dir("layercut"))
    folder = cache.expanduser() / name
    if (folder / "config.json").exists():
        return folder
    convert = prepare()
    progress.stage(stage)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache folder {folder.parent} cannot be made ({error.strerror}). "
            "Set LAYERCUT_CACHE to a folder you can write to."
        ) from error
    try:
        with staged_folder(folder, overwrite=False) as partial:
            convert(partial)
            _spell_rope_theta(partial / "config.json")
    except OutputError:
        # Another process may have put the same conversion in place first.
        if not (folder / "config.json").exists():
            raise
    return folder


def _spell_rope_theta(path: Path) -> None:
    """Add the key by which readers other than transformers 5 know the rotary base.

    Without it mlx-lm and transformers 4 fall back to 10,000, without a word.
    """
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in config:
        path.write_text(replace_values(text, {"rope_theta": theta}), encoding="utf-8")
