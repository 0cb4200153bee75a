"""The only structural writer: turn the loaded model into the pruned one, in memory.

The pruned model is built from its edited configuration, never by slicing the old one's layer
list: attention patterns, cache slots and masks are then those that the written checkpoint gets
when it is loaded. Its parameters are the old model's own tensors; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from layercut.checkpoints.config_check import prune_config
from layercut.checkpoints.config_edit import read_config
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.patch import rescale_queries
from layercut.errors import PlanError, VerificationError
from layercut.models.attention import read_attention
from layercut.models.check_method import draw_probe_ids
from layercut.models.hooks import prepare_for_inference
from layercut.models.layer_source import LayerSource
from layercut.models.view import DecoderView
from layercut.types import PruningPlan, WeightPatch

CHECK_SHAPE = (2, 32)


def apply(view: DecoderView, plan: PruningPlan, patch: WeightPatch | None = None) -> None:
    """Replace ``view.model`` by the pruned and patched model.

    Args:
        view: the model the plan was made for; it is changed.
        plan: which layers go.
        patch: replacement tensors, named as in the input model.

    Raises:
        PlanError: the plan is for a model with another number of layers, or the patch names a
            tensor that does not stay.
        ModelError: the family cannot express the kept layers.
        VerificationError: the pruned model differs from the dense one with its dropped layers
            passed over.
    """
    if not view.n_layers == plan.n_layers == view.layout.n_layers:
        raise PlanError(
            f"the plan is for {plan.n_layers} layers, the model has {view.n_layers}. "
            "Load the model that the plan was made for."
        )
    patch = patch or WeightPatch({}, "none")
    state: dict[str, Tensor] = dict(view.model.state_dict())
    for name in patch.tensors:
        if view.layout.new_name(name, plan.new_index) is None or name not in state:
            raise PlanError(
                f"the patch changes {name}, which the pruned model does not have. "
                "Fit it again for this plan."
            )
    expected = _compute_identity_logits(view, plan, patch)
    tensors = rescale_queries(view.path, view.layout, plan, patch).tensors
    source = view.source
    for name, tensor in tensors.items():
        if source is None or not source.is_layers(name):
            state[name] = tensor.to(state[name])
    model = prepare_for_inference(_rebuild(view, plan, state))
    if source is not None:
        source = _follow(view, source, model, plan, tensors)
    _check_logits(view, model, expected)
    view.model, view.source = model, source


def _follow(
    view: DecoderView,
    source: LayerSource,
    model: nn.Module,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
) -> LayerSource:
    """The pruned model's layers, read from the input model's files and replaced as patched."""
    renamed = {
        view.layout.new_name(name, plan.new_index): tensor
        for name, tensor in tensors.items()
        if source.is_layers(name)
    }
    kept = {name: tensor for name, tensor in renamed.items() if name is not None}
    return source.rebuild(model, view.layout, plan.kept, kept, lambda: view.skipped)


@torch.no_grad()
def _compute_identity_logits(view: DecoderView, plan: PruningPlan, patch: WeightPatch) -> Tensor:
    """Logits of the patched dense model with the dropped layers as the identity."""
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        logits: Tensor = view.model(
            draw_probe_ids(view, *CHECK_SHAPE).to(view.device), use_cache=False
        ).logits
    return logits


@torch.no_grad()
def _check_logits(view: DecoderView, model: nn.Module, expected: Tensor) -> None:
    logits = model(draw_probe_ids(view, *CHECK_SHAPE).to(view.device), use_cache=False).logits
    # Some experts' sums have no fixed order; queries that were rescaled are rounded once more.
    eps = torch.finfo(expected.dtype).eps
    scaled = view.layout.index_scaled
    rounding = rounding_of_rescaled(expected) if scaled else min(4 * eps, 1e-6)
    gap = float((logits - expected).abs().max())
    if not gap <= rounding * float(expected.abs().max()):
        raise VerificationError(
            f"the pruned model's logits differ by {gap:.2g} from those of the dense model with its "
            f"dropped layers passed over: '{view.layout.model_type}' needs a rule that layercut "
            "does not have. Nothing was saved; please report this."
        )


def _rebuild(view: DecoderView, plan: PruningPlan, state: Mapping[str, Tensor]) -> nn.Module:
    old, layout = view.model, view.layout
    config = read_config(prune_config(view.path, layout, plan.kept))
    config._name_or_path = old.config._name_or_path  # PEFT looks the vocabulary up there
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=old.dtype, attn_implementation=read_attention(old.config)
        )
    renamed = {
        name: _keep_slices(layout, plan, old_name, tensor)
        for old_name, tensor in state.items()
        if (name := layout.new_name(old_name, plan.new_index)) is not None
    }
    model.load_state_dict(renamed, strict=True, assign=True)
    # A head that is stored beside the embedding is its own, whatever the configuration says.
    tied: Any = model.all_tied_weights_keys
    if all(renamed[name].data_ptr() == renamed[other].data_ptr() for name, other in tied.items()):
        model.tie_weights()  # type: ignore[operator]
    _carry_buffers(old, model, layout, plan.new_index)
    model.generation_config = old.generation_config
    return model


def _keep_slices(layout: Layout, plan: PruningPlan, name: str, tensor: Tensor) -> Tensor:
    """A tensor; of one that holds a block per layer, the kept layers' blocks."""
    dimension = layout.slice_dimension(name)
    if dimension is None:
        return tensor
    blocks = tensor.unflatten(dimension, (plan.n_layers, -1))
    index = torch.tensor(plan.kept, device=tensor.device)
    kept: Tensor = blocks.index_select(dimension, index).flatten(dimension, dimension + 1)
    return kept


def _carry_buffers(
    old: nn.Module, new: nn.Module, layout: Layout, new_index: Mapping[int, int]
) -> None:
    """Rotary tables and their like are not in the state dict: take the old model's."""
    for old_name, buffer in old.named_buffers():
        name = layout.new_name(old_name, new_index)
        if name is None:
            continue
        path, _, attribute = name.rpartition(".")
        module = new.get_submodule(path)
        # A rotary table of a kind of layers that are all gone has no place any more.
        if hasattr(module, attribute) and getattr(module, attribute).is_meta:
            setattr(module, attribute, buffer)


def rounding_of_rescaled(logits: Tensor) -> float:
    """Share of the largest logit by which those of a model with rescaled queries may be off."""
    return min(100 * torch.finfo(logits.dtype).eps, 0.1)
