"""Writes the pruned checkpoint at file level, checks it, and puts it in place whole.

Kept tensors are copied byte for byte under their new names and only patched ones are encoded;
config.json keeps its own spelling but for the edited values. The folder is built beside its
destination and renamed into place once the reloaded model has reproduced the one in memory.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from layercut.errors import ModelError, PlanError
from layercut.models import quantised, shards
from layercut.models.config_text import replace_values
from layercut.models.destination import check_disk_space, check_output_dir, staged_folder
from layercut.models.families import FamilyRules, edit_config
from layercut.models.preflight import TOKENIZER_FILES, matching_files, quiet, stored_tensors
from layercut.models.shard_writer import write_shard
from layercut.models.shards import StoredTensor
from layercut.models.verification import verify_checkpoint
from layercut.models.view import DecoderView
from layercut.plan_file import lineage_of, plan_content
from layercut.surgery import new_name
from layercut.types import PruningPlan, WeightPatch

__all__ = [
    "check_disk_space",
    "check_output_dir",
    "round_patch",
    "save",
    "staged_folder",
    "tuned_patch",
    "write_checkpoint",
]

COPIED = ("generation_config.json", "LICENSE*", "NOTICE*", *TOKENIZER_FILES)


def save(
    view: DecoderView,
    plan: PruningPlan,
    patch: WeightPatch,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the pruned model; the folder appears complete and verified, or not at all.

    Args:
        view: the model after ``apply``.
        plan: the layers that went.
        patch: the tensors that changed.
        output_dir: a new or empty folder whose parent exists.
        overwrite: replace an earlier output.

    Returns:
        ``output_dir``.

    Raises:
        PlanError: the plan has not been applied, or does not fit the source checkpoint.
        OutputError: the folder cannot be written to.
        ResourceError: the disk is too small.
        VerificationError: the written model differs from the one in memory.
    """
    output_dir = Path(output_dir)
    if view.n_layers != len(plan.kept):
        raise PlanError(
            f"the model in memory has {view.n_layers} layers, the plan keeps {len(plan.kept)}: "
            "apply the plan first."
        )
    check_output_dir(output_dir, view.path, overwrite=overwrite)
    check_disk_space(view.path, output_dir)
    with staged_folder(output_dir, overwrite=overwrite) as folder:
        write_checkpoint(view.path, view.rules, plan, patch, folder)
        recovery = {"method": patch.method, "tensors_changed": len(patch.tensors)}
        content = plan_content(plan, recovery, lineage_of(view.path))
        (folder / "layercut").mkdir()
        (folder / "layercut" / "plan.json").write_text(
            json.dumps(content, indent=2) + "\n", encoding="utf-8"
        )
        verify_checkpoint(folder, view, plan, patch)
    return output_dir


def write_checkpoint(
    source: Path, rules: FamilyRules, plan: PruningPlan, patch: WeightPatch, folder: Path
) -> None:
    """Write the pruned checkpoint into an empty folder, shard by shard.

    Args:
        source: the input model's folder.
        rules: its family's row.
        plan: which layers go.
        patch: replacements, named as in the source; stored in the source's dtype.
        folder: an empty folder.

    Raises:
        PlanError: plan or patch do not fit the source.
        ModelError: the configuration cannot be edited so that every kept layer stays as it is.
        OSError: the disk is full.
    """
    changed = round_patch(source, patch).tensors
    gone = [name for name in changed if new_name(name, rules, plan.new_index) is None]
    if gone:
        raise PlanError(f"the patch changes {gone[0]}, whose layer is dropped. Fit it again.")
    _write_config(source, rules, plan, folder)
    written: dict[str, dict[str, StoredTensor | Tensor]] = {}
    for path in shards.weight_files(source):
        shard = shards.read_shard(path)
        entries: dict[str, StoredTensor | Tensor] = {
            name: changed.get(old, stored)
            for old, stored in shard.tensors.items()
            if (name := new_name(old, rules, plan.new_index)) is not None
        }
        if entries:
            write_shard(folder / path.name, list(entries.items()), shard.metadata)
            written[path.name] = entries
    if (source / shards.INDEX_FILE).exists():
        _write_index(source / shards.INDEX_FILE, written, folder)
    for path in matching_files(source, quantised.CONFIG_FILES):
        content = shards.read_json_object(path)
        new = quantised.renumbered(content, rules, plan.new_index, stored_tensors(source))
        text = replace_values(path.read_text(encoding="utf-8"), _changes(content, new))
        (folder / path.name).write_text(text, encoding="utf-8")
    for path in matching_files(source, COPIED):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def round_patch(source: Path, patch: WeightPatch) -> WeightPatch:
    """The patch as a checkpoint can hold it: every tensor in the dtype that the source stores.

    Rounding before ``apply`` keeps memory and file equal when a model is computed in a wider
    dtype than it is stored in.

    Raises:
        PlanError: the patch names a tensor that the source lacks, or gives it another shape.
    """
    stored = stored_tensors(source)
    rounded = {}
    for name, tensor in patch.tensors.items():
        if name not in stored or stored[name].shape != tuple(tensor.shape):
            raise PlanError(
                f"the patch changes {name} {list(tensor.shape)}, which the checkpoint in {source} "
                "does not hold. Fit it to this model."
            )
        rounded[name] = tensor.to(shards.DTYPES[stored[name].dtype])
    return replace(patch, tensors=rounded)


@torch.no_grad()
def tuned_patch(
    view: DecoderView, plan: PruningPlan, patch: WeightPatch, names: Iterable[str]
) -> WeightPatch:
    """The patch with tensors as training left them, rounded alike in memory and for the file.

    Args:
        view: the pruned and tuned model; its tensors are rounded to what the source stores.
        plan: the layers that went.
        patch: what changed before training.
        names: the trained tensors, named as in ``view``; those that the source does not store are
            tied to one that it does.
    """
    stored = stored_tensors(view.path)
    state = view.model.state_dict()
    before = dict(enumerate(plan.kept))
    trained = {
        name: old
        for name in names
        if (old := new_name(name, view.rules, before)) is not None and old in stored
    }
    tensors = {old: state[name] for name, old in trained.items()}
    rounded = round_patch(view.path, replace(patch, tensors={**patch.tensors, **tensors}))
    for name, old in trained.items():
        state[name].copy_(rounded.tensors[old])
    return rounded


def _write_config(source: Path, rules: FamilyRules, plan: PruningPlan, folder: Path) -> None:
    path = source / "config.json"
    config = shards.read_json_object(path)
    before = _layer_values(source, rules)
    if config.get(rules.count, before[rules.count]) != plan.n_layers:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, {path} says {before[rules.count]}. "
            "Load the model that the plan was made for."
        )
    edited = edit_config(config, rules, plan.kept, plan.n_layers)
    for key in quantised.CONFIG_KEYS & edited.keys():
        names = stored_tensors(source)
        edited[key] = quantised.renumbered(edited[key], rules, plan.new_index, names)
    text = replace_values(path.read_text(encoding="utf-8"), _changes(config, edited))
    (folder / "config.json").write_text(text, encoding="utf-8")
    after = _layer_values(folder, rules)
    for key in rules.per_layer:
        # A pattern that is derived from counts need not survive every choice of layers.
        if before[key] is not None and after[key] != [before[key][i] for i in plan.kept]:
            raise ModelError(
                f"{path}: the kept layers' {key} cannot be expressed without that key. "
                f"Add {key} to the configuration, one entry per layer."
            )


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in after.items() if before.get(key) != value}


def _layer_values(folder: Path, rules: FamilyRules) -> dict[str, Any]:
    """The layer count and the per-layer lists as transformers derives them."""
    with quiet():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return {key: getattr(config, key, None) for key in (rules.count, *rules.per_layer)}


def _write_index(
    index: Path, written: Mapping[str, Mapping[str, StoredTensor | Tensor]], folder: Path
) -> None:
    content = shards.read_json_object(index)
    kept = {name: entry for entries in written.values() for name, entry in entries.items()}
    metadata = dict(content.get("metadata") or {})
    metadata["total_size"] = sum(entry.nbytes for entry in kept.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(entry.shape) for entry in kept.values())
    files = {name: file for file, entries in written.items() for name in entries}
    content |= {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
    (folder / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
