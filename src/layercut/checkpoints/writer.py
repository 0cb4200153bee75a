"""Writes the pruned checkpoint at file level, checks it, and puts it in place whole.

Kept tensors are copied byte for byte under their new names and only patched ones are encoded;
config.json keeps its own spelling but for the edited values. The folder is built beside its
destination and renamed into place once the reloaded model has reproduced the one in memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layercut.checkpoints import quantization
from layercut.checkpoints.config_check import prune_config
from layercut.checkpoints.folder import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    list_weight_files,
    read_json_object,
)
from layercut.checkpoints.json_edit import replace_values
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.patch import encode_patch
from layercut.checkpoints.preflight import COPIED, list_matching_files, read_stored_tensors
from layercut.checkpoints.safetensors_file import Content, keep_slices, read_shard
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import PlanError
from layercut.types import PruningPlan, WeightPatch


def write_checkpoint(
    source: Path, layout: Layout, plan: PruningPlan, patch: WeightPatch, folder: Path
) -> None:
    """Write the pruned checkpoint into an empty folder, shard by shard.

    Args:
        source: the input model's folder.
        layout: where its layers are.
        plan: which layers go.
        patch: replacements, named as in the source; stored in the source's dtype.
        folder: an empty folder.

    Raises:
        PlanError: plan or patch do not fit the source.
        ModelError: the configuration cannot be edited so that every kept layer stays as it is.
        OSError: the disk is full.
    """
    changed = encode_patch(source, layout, plan, patch)
    _write_config(source, layout, plan, folder)
    written: dict[str, dict[str, Content]] = {}
    for path in list_weight_files(source):
        shard = read_shard(path)
        entries: dict[str, Content] = {
            name: changed[old] if old in changed else keep_slices(layout, plan, old, stored)
            for old, stored in shard.tensors.items()
            if (name := layout.new_stored_name(old, plan.new_index)) is not None
        }
        if entries:
            write_shard(folder / path.name, list(entries.items()), shard.metadata)
            written[path.name] = entries
    if (source / INDEX_FILE).exists():
        _write_index(source / INDEX_FILE, written, folder)
    for path in list_matching_files(source, quantization.CONFIG_FILES):
        content = read_json_object(path)
        new = quantization.renumber_layers(
            content, layout, plan.new_index, read_stored_tensors(source)
        )
        _write_edited(path, _changes(content, new), folder)
    for path in list_matching_files(source, COPIED):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _write_config(source: Path, layout: Layout, plan: PruningPlan, folder: Path) -> None:
    path = source / "config.json"
    if layout.n_layers != plan.n_layers:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, {path} says {layout.n_layers}. "
            "Load the model that the plan was made for."
        )
    config = read_json_object(path)
    edited = prune_config(source, layout, plan.kept)
    for section in (edited, *(part for part in edited.values() if isinstance(part, dict))):
        for key in quantization.CONFIG_KEYS & section.keys():
            names = read_stored_tensors(source)
            section[key] = quantization.renumber_layers(section[key], layout, plan.new_index, names)
    _write_edited(path, _changes(config, edited), folder)


def _write_edited(path: Path, changes: Mapping[str, Any], folder: Path) -> None:
    """Copy a JSON file with some values changed, its line ends as they are."""
    text = replace_values(path.read_bytes().decode(), changes)
    (folder / path.name).write_bytes(text.encode())


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in after.items() if before.get(key, ...) != value}


def _write_index(index: Path, written: Mapping[str, Mapping[str, Content]], folder: Path) -> None:
    content = read_json_object(index, max_bytes=MAX_INDEX_BYTES)
    kept = {name: entry for entries in written.values() for name, entry in entries.items()}
    metadata = dict(content.get("metadata") or {})
    metadata["total_size"] = sum(entry.nbytes for entry in kept.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(entry.shape) for entry in kept.values())
    files = {name: file for file, entries in written.items() for name in entries}
    content |= {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
    (folder / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
