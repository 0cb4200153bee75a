"""``plan.json``: which layers go, and whether the run that chose them changed the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.errors import PlanError
from layercut.types import PruningPlan

MAX_BYTES = 50_000_000
REMEDY = "Name the plan.json that `layercut run` wrote."


def plan_content(
    plan: PruningPlan, recovery: Mapping[str, Any], lineage: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Content of ``plan.json``.

    Args:
        plan: which layers go.
        lineage: the plans that made the input model, the first one first.
        recovery: ``method``, and ``tensors_changed``: how many kept ones changed, be it by that
            method or by a fine-tuning.
    """
    content = {"schema": 1, "model": plan.model, "fingerprint": plan.fingerprint}
    return content | plan.to_json() | {"recovery": dict(recovery), "lineage": list(lineage)}


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The plans by which a checkpoint was pruned before; none for one that layercut did not write.

    Args:
        folder: the checkpoint.
    """
    path = folder / "layercut" / "plan.json"
    try:
        content = _read(path)
    except PlanError:
        return []
    earlier = content.get("lineage")
    last = {key: content.get(key) for key in ("model", "n_layers", "dropped")}
    return [*(earlier if isinstance(earlier, list) else ()), last]


def read_plan(path: Path, *, repaired: bool = False) -> PruningPlan:
    """The layers of a ``plan.json``, to be dropped from a checkpoint that nothing else changes in.

    Args:
        path: the file; for plans that say nothing of recovery a ``result.json`` beside it is read,
            of schema 1 or 2.
        repaired: whether the run may have changed kept weights.

    Raises:
        PlanError: it is not a plan, or its run changed kept weights, which other checkpoints lack.
    """
    content = _read(path)
    n_layers, dropped = content.get("n_layers"), content.get("dropped")
    whole = isinstance(n_layers, int) and isinstance(dropped, list)
    if not whole or not all(type(i) is int for i in dropped or ()) or content.get("schema", 1) != 1:
        raise PlanError(
            f"{path} is not a plan of schema 1 with n_layers and a list dropped. {REMEDY}"
        )
    assert isinstance(n_layers, int) and isinstance(dropped, list)
    plan = PruningPlan(
        model=str(content.get("model", "")),
        n_layers=n_layers,
        dropped=tuple(sorted(dropped)),
        method=str(content.get("method", "given")),
        fingerprint=str(content.get("fingerprint", "")),
    )
    if list(plan.kept) != content.get("kept", list(plan.kept)):
        raise PlanError(f"{path}: kept and dropped are not the two parts of all layers. {REMEDY}")
    if not repaired:
        _check_recovery(path, content)
    return plan


def _check_recovery(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse plans whose layers were measured together with weights that only their run has."""
    recovery = content.get("recovery")
    changed_by = ""
    if isinstance(recovery, Mapping):
        if recovery.get("tensors_changed"):
            changed_by = f"recovery '{recovery.get('method')}' or a fine-tuning"
    elif (beside := path.with_name("result.json")).is_file():
        result = _read(beside)
        method = (result.get("recovery") or {}).get("method", "none")
        if method != "none":
            changed_by = f"recovery '{method}'"
        elif (result.get("recipe") or {}).get("finetune"):
            changed_by = "a fine-tuning"
    if changed_by:
        raise PlanError(
            f"{path} comes from a run in which {changed_by} changed kept weights, and those "
            "changes do not fit this checkpoint's stored form. Run again with recovery.method: "
            "none, or drop the same layers unrepaired by --drop."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            what = "is not a plain file" if path.exists() else "does not exist"
            raise PlanError(f"{path} {what}. {REMEDY}")
        if path.stat().st_size > MAX_BYTES:
            raise PlanError(f"{path} is too large for a plan. {REMEDY}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{path} cannot be read as JSON ({error}). {REMEDY}") from error
    if not isinstance(content, dict):
        raise PlanError(f"{path} does not hold a JSON object. {REMEDY}")
    return content
