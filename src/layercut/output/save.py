"""Write the pruned model; the folder appears whole and verified, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from layercut.checkpoints.output_dir import check_disk_space, check_output_dir, staged_folder
from layercut.checkpoints.plan_file import plan_content, read_lineage
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import PlanError
from layercut.models.view import DecoderView
from layercut.output.verify import verify_checkpoint
from layercut.types import PruningPlan, WeightPatch


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
        recovery = {"method": patch.method, "tensors_changed": len(patch.tensors)}
        content = plan_content(plan, recovery, read_lineage(view.path))
        (folder / "layercut").mkdir()
        (folder / "layercut" / "plan.json").write_text(
            json.dumps(content, indent=2) + "\n", encoding="utf-8"
        )
        verify_checkpoint(folder, view, plan, patch)
    return output_dir
