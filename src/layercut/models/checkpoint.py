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

import torch
from torch import Tensor
from transformers import DynamicCache

from layercut.errors import (
    ModelError,
    PlanError,
    VerificationError,
)
from layercut.models import shards
from layercut.models.blocks import StoredBlocks
from layercut.models.config_text import replace_values
from layercut.models.destination import check_disk_space, check_output_dir, staged_folder
from layercut.models.layout import Layout
from layercut.models.patch import stored_patch
from layercut.models.preflight import (
    TOKENIZER_FILES,
    load_strictly,
    matching_files,
)
from layercut.models.same_layers import pruned_config
from layercut.models.shards import Content, StoredTensor
from layercut.models.view import DecoderView
from layercut.types import PruningPlan, WeightPatch

__all__ = [
    "check_disk_space",
    "check_output_dir",
    "save",
    "staged_folder",
    "verify_checkpoint",
    "write_checkpoint",
]

COPIED = ("generation_config.json", "LICENSE*", "NOTICE*", *TOKENIZER_FILES)
CHECK_BATCHES, CHECK_SHAPE, PREFILL = 2, (2, 32), 24
CACHED_TOLERANCE = 1e-4
"""Chunked linear attention (Qwen3-Next) and its single steps differ by 3e-5 in float32."""


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
        write_checkpoint(view.path, view.layout, plan, patch, folder)
        content = {"schema": 1, "model": plan.model, "fingerprint": plan.fingerprint}
        (folder / "layercut").mkdir()
        (folder / "layercut" / "plan.json").write_text(
            json.dumps(content | plan.to_json(), indent=2) + "\n", encoding="utf-8"
        )
        verify_checkpoint(folder, view)
    return output_dir


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
    changed = stored_patch(source, layout, plan, patch)
    _write_config(source, layout, plan, folder)
    written: dict[str, dict[str, Content]] = {}
    for path in shards.weight_files(source):
        shard = shards.read_shard(path)
        entries: dict[str, Content] = {
            name: changed[old] if old in changed else _kept_part(layout, plan, old, stored)
            for old, stored in shard.tensors.items()
            if (name := layout.new_stored_name(old, plan.new_index)) is not None
        }
        if entries:
            shards.write_shard(folder / path.name, list(entries.items()), shard.metadata)
            written[path.name] = entries
    if (source / shards.INDEX_FILE).exists():
        _write_index(source / shards.INDEX_FILE, written, folder)
    for path in matching_files(source, COPIED):
        copy = folder / path.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)


def _kept_part(layout: Layout, plan: PruningPlan, name: str, stored: StoredTensor) -> Content:
    """A stored tensor; of one that holds a block per layer, the kept layers' blocks."""
    dimension = layout.slice_dimension(name)
    if dimension is None:
        return stored
    return StoredBlocks(stored, dimension, plan.n_layers, plan.kept)


@torch.no_grad()
def verify_checkpoint(folder: Path, view: DecoderView) -> None:
    """Reload a written checkpoint and compare its logits with those of the model in memory.

    Args:
        folder: the written checkpoint.
        view: the pruned model, after ``apply``.

    Raises:
        VerificationError: keys, logits, or logits computed step by step with a cache differ.
    """
    remedy = "Nothing was saved; please report this."
    attention = view.model.config._attn_implementation
    try:
        written = load_strictly(folder, view.model.dtype, view.device, attention).eval()
    except ModelError as error:
        raise VerificationError(f"the written checkpoint does not reload: {error}") from error
    generator = torch.Generator().manual_seed(0)
    vocabulary = view.model.get_input_embeddings().weight.shape[0]
    for _ in range(CHECK_BATCHES):
        ids = torch.randint(vocabulary, CHECK_SHAPE, generator=generator).to(view.device)
        expected = view.model(ids, use_cache=False).logits
        logits = written(ids, use_cache=False).logits
        if not torch.equal(logits, expected):
            gap = float((logits - expected).abs().max())
            raise VerificationError(
                f"the written checkpoint's logits differ from the model's in memory by {gap:.2g}. "
                f"{remedy}"
            )
    # Float32: in a narrower dtype, rounding alone would exceed the tolerance.
    written = written.float()
    whole = written(ids, use_cache=False).logits
    gap = float((cached_logits(written, ids, PREFILL) - whole).abs().max())
    if not gap <= CACHED_TOLERANCE * max(1.0, float(whole.abs().max())):
        raise VerificationError(
            f"the written checkpoint's cached logits differ from its uncached ones by {gap:.2g}. "
            f"{remedy}"
        )


@torch.no_grad()
def cached_logits(model: Any, ids: Tensor, prefill: int) -> Tensor:
    """Logits of a prefill and single steps after it, (batch, seq, vocabulary).

    Args:
        model: a causal language model.
        ids: (batch, seq).
        prefill: tokens that are processed at once.
    """
    given: dict[str, Any] = {}
    output = model(ids[:, :prefill], use_cache=True)
    if not _caches(output):
        # RecurrentGemma fills a cache that it does not return.
        given = {"past_key_values": DynamicCache(config=model.config.get_text_config(decoder=True))}
        output = model(ids[:, :prefill], use_cache=True, **given)
    logits = [output.logits]
    for position in range(prefill, ids.shape[1]):
        if given:
            given["position_ids"] = torch.full_like(ids[:, :1], position)
        step = ids[:, position : position + 1]
        output = model(step, use_cache=True, **(_caches(output) or given))
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def _caches(output: Any) -> dict[str, Any]:
    """What a step hands to the next one; recurrent models name it otherwise."""
    return {k: output[k] for k in ("past_key_values", "cache_params") if k in output}


def _write_config(source: Path, layout: Layout, plan: PruningPlan, folder: Path) -> None:
    path = source / "config.json"
    if layout.n_layers != plan.n_layers:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, {path} says {layout.n_layers}. "
            "Load the model that the plan was made for."
        )
    config = shards.read_json_object(path)
    edited = pruned_config(source, layout, plan.kept)
    changes = {key: value for key, value in edited.items() if config.get(key, ...) != value}
    text = replace_values(path.read_text(encoding="utf-8"), changes)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_index(index: Path, written: Mapping[str, Mapping[str, Content]], folder: Path) -> None:
    content = shards.read_json_object(index)
    kept = {name: entry for entries in written.values() for name, entry in entries.items()}
    metadata = dict(content.get("metadata") or {})
    metadata["total_size"] = sum(entry.nbytes for entry in kept.values())
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(math.prod(entry.shape) for entry in kept.values())
    files = {name: file for file, entries in written.items() for name in entries}
    content |= {"metadata": metadata, "weight_map": dict(sorted(files.items()))}
    (folder / index.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
