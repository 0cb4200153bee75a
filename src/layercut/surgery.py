"""The only structural writer: turn the loaded model into the pruned one, in memory.

The pruned model is built from its edited configuration, never by slicing the old one's layer
list: attention patterns, cache slots and masks are then those that the written checkpoint gets
when it is loaded. Its parameters are the old model's own tensors; nothing is copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from layercut.errors import PlanError
from layercut.models.families import FamilyRules, edit_config
from layercut.models.view import DecoderView
from layercut.types import PruningPlan, WeightPatch


def apply(view: DecoderView, plan: PruningPlan, patch: WeightPatch | None = None) -> None:
    """Replace ``view.model`` by the pruned and patched model.

    Args:
        view: the model the plan was made for; it is changed.
        plan: which layers go.
        patch: replacement tensors, named as in the input model.

    Raises:
        PlanError: the plan is for a model with another number of layers, or the patch names a
            tensor that does not stay.
    """
    if view.n_layers != plan.n_layers:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, the model has {view.n_layers}. "
            "Load the model that the plan was made for."
        )
    old: nn.Module = view.model
    state: dict[str, Tensor] = dict(old.state_dict())
    for name, tensor in (patch.tensors if patch else {}).items():
        if new_name(name, view.rules, plan.new_index) is None or name not in state:
            raise PlanError(
                f"the patch changes {name}, which the pruned model does not have. "
                "Fit it again for this plan."
            )
        state[name] = tensor.to(state[name])
    view.model = _rebuild(view, plan, state).eval().requires_grad_(False)


def new_name(name: str, rules: FamilyRules, new_index: Mapping[int, int]) -> str | None:
    """A tensor's name in the pruned model; ``None`` if its layer is dropped."""
    match = re.match(rf"{re.escape(rules.layers)}\.(\d+)\.", name)
    if match is None:
        return name
    index = new_index.get(int(match.group(1)))
    return None if index is None else f"{rules.layers}.{index}.{name[match.end() :]}"


def _rebuild(view: DecoderView, plan: PruningPlan, state: Mapping[str, Tensor]) -> nn.Module:
    old = view.model
    edited = edit_config(old.config.to_dict(), view.rules, plan.kept, plan.n_layers)
    config = type(old.config).from_dict(edited)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=old.dtype, attn_implementation=old.config._attn_implementation
        )
    renamed = {
        name: tensor
        for old_name, tensor in state.items()
        if (name := new_name(old_name, view.rules, plan.new_index)) is not None
    }
    model.load_state_dict(renamed, strict=True, assign=True)
    model.tie_weights()  # type: ignore[operator]
    _carry_buffers(old, model, view.rules, plan.new_index)
    model.generation_config = old.generation_config
    return model


def _carry_buffers(
    old: nn.Module, new: nn.Module, rules: FamilyRules, new_index: Mapping[int, int]
) -> None:
    """Rotary tables and their like are not in the state dict: take the old model's."""
    for old_name, buffer in old.named_buffers():
        name = new_name(old_name, rules, new_index)
        if name is None:
            continue
        path, _, attribute = name.rpartition(".")
        module = new.get_submodule(path)
        if getattr(module, attribute).is_meta:
            setattr(module, attribute, buffer)
