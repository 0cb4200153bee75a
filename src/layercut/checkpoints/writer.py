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

from layercut.checkpoints.config_check import prune_config
from layercut.checkpoints.config_edit import read_config, section_path
from layercut.checkpoints.folder import (
    INDEX_FILE,
    MAX_INDEX_BYTES,
    list_weight_files,
    read_json_object,
)
from layercut.checkpoints.json_edit import remove_key, replace_values
from layercut.checkpoints.layer_names import LayerNames
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.patch import encode_patch
from layercut.checkpoints.preflight import COPIED, list_matching_files, read_models
from layercut.checkpoints.quantization import CONFIG_FILES
from layercut.checkpoints.safetensors_file import (
    Content,
    keep_slices,
    read_shard,
    read_stored_tensors,
)
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import ModelError, PlanError
from layercut.types import PruningPlan, WeightPatch

Json = dict[str, Any]

NAMELESS = frozenset({"_name_or_path", "architectures", "auto_map", "model_type"})
"""Keys of a configuration whose values are never names of layers."""
LAYER_NUMBERS = ("assistant_early_exit", "dola_layers")
"""Keys of generation_config.json that count layers."""


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
    stored = read_stored_tensors(source)
    names = LayerNames(layout, plan.new_index, stored, lambda: read_models(source))
    _write_config(source, layout, plan, names, folder)
    written: dict[str, dict[str, Content]] = {}
    for path in list_weight_files(source):
        shard = read_shard(path)
        entries: dict[str, Content] = {
            name: changed[old] if old in changed else keep_slices(layout, plan, old, content)
            for old, content in shard.tensors.items()
            if (name := layout.new_stored_name(old, plan.new_index)) is not None
        }
        if entries:
            metadata = names.renumber_metadata(shard.metadata)
            write_shard(folder / path.name, list(entries.items()), metadata)
            written[path.name] = entries
    if (source / INDEX_FILE).exists():
        _write_index(source / INDEX_FILE, written, folder)
    for path, (before, after) in _renumber_files(source, names).items():
        _write_edited(path, before, after, folder)
    for path in list_matching_files(source, COPIED):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def check_named_layers(source: Path, layout: Layout, plan: PruningPlan) -> None:
    """Refuse names and numbers of layers beside the weights that cannot follow a drop.

    Args:
        source: the input model's folder.
        layout: where its layers are.
        plan: which layers go.

    Raises:
        ModelError: says which name, and where it stands.
    """
    names = LayerNames(
        layout, plan.new_index, read_stored_tensors(source), lambda: read_models(source)
    )
    _renumber_config(read_json_object(source / "config.json"), names)
    _renumber_files(source, names)
    for path in list_weight_files(source):
        names.renumber_metadata(read_shard(path).metadata)
    settings = source / "generation_config.json"
    content = _read_any_object(settings) if settings.exists() else {}
    for key in LAYER_NUMBERS:
        value = content.get(key)
        if isinstance(value, int | list) and value not in (0, [], False):
            raise ModelError(
                f"{settings} sets {key} = {value}, which counts layers of the {layout.n_layers} "
                "before the drop. Remove that key."
            )


def _renumber_files(source: Path, names: LayerNames) -> dict[Path, tuple[Json, Json]]:
    """Further JSON files that say something of single layers: path → content before and after."""
    copied = {path.name for path in list_matching_files(source, COPIED)}
    found: dict[Path, tuple[Json, Json]] = {}
    for path in list_matching_files(source, ("*.json",)):
        is_index = path.name.endswith(".index.json")
        if path.name in copied or path.name == "config.json" or is_index:
            continue
        is_quantisation = path.name in CONFIG_FILES
        before = read_json_object(path) if is_quantisation else _read_any_object(path)
        try:
            after = names.walk(before, every_pattern=is_quantisation)
        except ModelError as error:
            raise ModelError(f"{path.name}: {error}") from error
        if after != before or is_quantisation or names.mentions_layers(before):
            found[path] = before, after
    return found


def _read_any_object(path: Path) -> Json:
    """The content of a JSON file that may hold anything; nothing if it is no object."""
    try:
        return read_json_object(path)
    except ModelError:
        return {}


def _renumber_config(config: Json, names: LayerNames) -> Json:
    """A parsed config.json whose names of layers follow the drop."""
    read = read_config(config)
    # Names in another part's section are that part's own.
    others = set(read.sub_configs) - set(section_path(read)[:1])
    new = dict(config)
    for key in config.keys() - NAMELESS - others:
        new[key] = names.walk({key: config[key]}).get(key)
    return new


def _write_config(
    source: Path, layout: Layout, plan: PruningPlan, names: LayerNames, folder: Path
) -> None:
    path = source / "config.json"
    if layout.n_layers != plan.n_layers:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, {path} says {layout.n_layers}. "
            "Load the model that the plan was made for."
        )
    edited = _renumber_config(prune_config(source, layout, plan.kept), names)
    edited.pop("auto_map", None)  # the code that it names is not copied
    _write_edited(path, read_json_object(path), edited, folder)


def _write_edited(path: Path, before: Json, after: Json, folder: Path) -> None:
    """Copy a JSON file with some values changed or gone, its line ends as they are."""
    changes = {key: value for key, value in after.items() if before.get(key, ...) != value}
    text = replace_values(path.read_bytes().decode(), changes)
    for key in before.keys() - after.keys():
        text = remove_key(text, key)
    (folder / path.name).write_bytes(text.encode())


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
