"""Move a PEFT adapter from the dense model to the pruned one: renumber it, train nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from layercut import progress
from layercut.checkpoints.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Adapter,
    read_adapter,
    read_base,
    rename_tensors,
)
from layercut.checkpoints.adapter_config import edit_adapter_config
from layercut.checkpoints.output_dir import check_output_dir, staged_folder
from layercut.checkpoints.plan_file import read_lineage, read_plan
from layercut.checkpoints.preflight import COPIED, list_matching_files, read_layout
from layercut.checkpoints.safetensors_file import read_shard
from layercut.checkpoints.shard_writer import write_shard
from layercut.errors import PlanError, VerificationError
from layercut.output.verify import sha256
from layercut.types import PruningPlan


@dataclass(frozen=True, slots=True)
class MovedAdapter:
    """What was written.

    Attributes:
        output: the new adapter's folder.
        base: the pruned model that it fits.
        plan: which layers went.
        n_kept: tensors that were copied and compared by sha256.
        n_dropped: tensors of dropped layers.
        edited: keys of the configuration that changed.
    """

    output: Path
    base: str
    plan: PruningPlan
    n_kept: int
    n_dropped: int
    edited: tuple[str, ...]


def move_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    plan: str | Path,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> MovedAdapter:
    """Renumber an adapter of the dense model for the model that ``plan`` left of it.

    Args:
        adapter: the folder that PEFT saved it to.
        output_dir: the new adapter's folder; it appears complete and verified, or not at all.
        plan: the ``plan.json`` by which the model was pruned.
        base: the pruned model; default: the checkpoint that ``plan`` lies in.
        overwrite: replace an earlier output.

    Raises:
        PlanError: the plan is of another model, or drops every layer that the adapter has.
        ModelError: the adapter or the pruned model cannot be used.
        OutputError: the destination cannot be written to.
        VerificationError: what was written differs from what it should be.
    """
    folder, output = Path(adapter).expanduser(), Path(output_dir)
    progress.stage("check the adapter")
    chosen = read_plan(Path(plan), repaired=True)
    name = base if base is not None else _checkpoint_of(Path(plan))
    check_output_dir(output, folder, overwrite=overwrite)
    source = read_adapter(folder)
    target = read_base(Path(name).expanduser())
    _check_models(source, chosen, Path(name).expanduser())
    names = rename_tensors(source, target, chosen)
    config = edit_adapter_config(source, target, chosen, str(name))
    entries = [(new, source.shard.tensors[old]) for old, new in names.items()]
    progress.stage("write the adapter")
    with staged_folder(output, overwrite=overwrite) as partial:
        write_shard(partial / WEIGHTS_FILE, entries, source.shard.metadata)
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in list_matching_files(folder, COPIED):
            copy = partial / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
        (partial / "layercut").mkdir()
        (partial / "layercut" / "plan.json").write_bytes(Path(plan).read_bytes())
        written = read_shard(partial / WEIGHTS_FILE).tensors
        if [*written] != [new for new, _ in entries] or any(
            sha256(written[new]) != sha256(tensor) for new, tensor in entries
        ):
            raise VerificationError("the written adapter differs. Nothing was saved; report this.")
    return MovedAdapter(
        output=output,
        base=str(name),
        plan=chosen,
        n_kept=len(entries),
        n_dropped=len(source.shard.tensors) - len(entries),
        edited=tuple(k for k, v in config.items() if source.config.get(k, ...) != v),
    )


def _checkpoint_of(plan: Path) -> Path:
    """The pruned checkpoint whose ``layercut/plan.json`` this is."""
    folder = plan.parent.parent
    if plan.parent.name != "layercut" or not (folder / "config.json").exists():
        raise PlanError(
            f"{plan} does not lie in a pruned checkpoint. Name the pruned model by --base."
        )
    return folder


def _check_models(adapter: Adapter, plan: PruningPlan, base: Path) -> None:
    """Refuse a plan of another model than the adapter's, or than the pruned one."""
    n_kept = read_layout(base).n_layers
    if n_kept != len(plan.kept):
        raise PlanError(
            f"{base} has {n_kept} layers, and the plan leaves {len(plan.kept)}. "
            "Name the model that was pruned by this plan."
        )
    trained_on = adapter.config.get("base_model_name_or_path")
    folder = Path(trained_on).expanduser() if isinstance(trained_on, str) and trained_on else None
    if folder is None or not (folder / "config.json").is_file():
        return
    if folder.resolve() == base.resolve():
        raise PlanError(f"{adapter.folder} was trained on {base} itself. Use it as it is.")
    n_layers = read_layout(folder).n_layers
    if n_layers != plan.n_layers:
        pruned = " (pruned already)" if read_lineage(folder) else ""
        raise PlanError(
            f"{adapter.folder} was trained on {folder}{pruned}, which has {n_layers} layers; the "
            f"plan is for {plan.n_layers}. Use the plan by which that model was pruned."
        )
