"""What a PEFT adapter's configuration says of single layers, renumbered.

It is edited where PEFT, asked with the new names, would adapt other modules than those that the
adapter has tensors for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from layercut.checkpoints.adapter import (
    CONFIG_FILE,
    NUMBER,
    Adapter,
    Base,
    layer_number,
    rename,
)
from layercut.checkpoints.hf_calls import guard
from layercut.errors import ModelError, PlanError
from layercut.types import PruningPlan

PATTERNS = ("rank_pattern", "alpha_pattern")


def edit_adapter_config(
    adapter: Adapter, base: Base, plan: PruningPlan, base_name: str
) -> dict[str, Any]:
    """The adapter's configuration for the pruned model.

    Raises:
        PlanError: it names layers that the plan's model lacks.
        ModelError: what it says of single layers cannot be said of the kept ones.
    """
    edited = dict(adapter.config) | {"base_model_name_or_path": base_name}
    if edited.get("revision"):
        edited["revision"] = None
    renamed = {
        old: new
        for old in sorted(adapter.modules)
        if (new := rename(old, base.layers, plan)) is not None
    }
    listed = edited.get("layers_to_transform")
    if listed is not None:
        edited["layers_to_transform"] = _new_layers(adapter, plan, listed)
    for key in PATTERNS:
        if edited.get(key):
            edited[key] = _new_pattern(edited[key], renamed)
    for key in ("modules_to_save", "target_parameters", "feedforward_modules"):
        if edited.get(key):
            edited[key] = _new_names(adapter, base, plan, key, edited[key])
    _fit_targets(adapter, base, edited, renamed)
    return edited


def _new_layers(adapter: Adapter, plan: PruningPlan, listed: Any) -> Any:
    numbers = [listed] if isinstance(listed, int) else listed
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise _unknown_setting(adapter, "layers_to_transform")
    if beyond := [n for n in numbers if not 0 <= n < plan.n_layers]:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, and layers_to_transform of "
            f"{adapter.folder} names layer {beyond[0]}. Use the plan of the adapter's own model."
        )
    new = [plan.new_index[n] for n in numbers if n in plan.new_index]
    if numbers and not new:
        raise PlanError(
            f"all layers of layers_to_transform of {adapter.folder} are dropped, so nothing of "
            "the adapter would be left. Train another one on the pruned model."
        )
    return new[0] if isinstance(listed, int) else new


def _match(keys: Collection[str], path: str) -> str | None:
    """The first pattern that PEFT would take for a module."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)


def _new_pattern(pattern: Any, renamed: Mapping[str, str]) -> Any:
    """Ranks or scales by module: as they are if they fit the new names, else module by module."""
    old_matches = {old: _match(pattern, old) for old in renamed}
    if all(_match(pattern, new) == old_matches[old] for old, new in renamed.items()):
        return pattern
    exact: dict[str, Any] = {}
    for key, value in pattern.items():
        taken = [new for old, new in renamed.items() if old_matches[old] == key]
        exact |= {f"^{re.escape(new)}": value for new in taken}
    return exact


def _new_names(adapter: Adapter, base: Base, plan: PruningPlan, key: str, names: Any) -> Any:
    """A list of names, those with a layer's number renamed by the decoder's full prefix."""
    if isinstance(names, str):
        if re.search(r"\d", names):
            raise _unknown_setting(adapter, key)
        return names
    kept = []
    for name in names:
        inside = layer_number(name, base.layers) is not None
        if NUMBER.search(name) and not inside and name not in base.modules:
            raise _unknown_setting(adapter, key)
        if (new := rename(name, base.layers, plan)) is not None:
            kept.append(new)
    return kept


def _fit_targets(
    adapter: Adapter, base: Base, edited: dict[str, Any], renamed: Mapping[str, str]
) -> None:
    """Name every module by its full path where PEFT would adapt others than the adapter has."""
    # Parameters of experts are found by target_parameters and not by this.
    elsewhere = bool(edited.get("target_parameters"))
    expected = {
        new
        for old, new in renamed.items()
        if not elsewhere or old in _targets(adapter.config, [old])
    }
    if _targets(edited, base.modules) == expected:
        return
    edited["target_modules"] = sorted(expected)
    for key in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if key in edited:
            edited[key] = None
    if _targets(edited, base.modules) != expected:
        raise ModelError(
            f"{adapter.folder / CONFIG_FILE}: PEFT would adapt other modules of {base.folder} than "
            "the adapter has tensors for. Check that it is an adapter of that model."
        )


def _targets(config: Mapping[str, Any], paths: Collection[str]) -> set[str]:
    """Which of these modules PEFT would adapt."""
    from peft.tuners.tuners_utils import check_target_module_exists  # seconds to import

    settings = {"target_modules": [], "target_parameters": None} | dict(config)
    if settings["target_modules"] is None:
        return set()
    asked = SimpleNamespace(**settings)
    with guard(
        f"PEFT cannot read the modules that {CONFIG_FILE} names", ModelError, "Restore that file."
    ):
        found = {path: check_target_module_exists(asked, path) for path in paths}
    return {path for path, hit in found.items() if hit and type(hit).__name__ != "_ExcludedModule"}


def _unknown_setting(adapter: Adapter, key: str) -> ModelError:
    return ModelError(
        f"{adapter.folder / CONFIG_FILE}: {key} names layers in a way that cannot be renumbered. "
        "Write the modules' full names there."
    )
