"""What a layer's MLP adds to the residual stream, and the weights that a linear map folds into.

A map P of that output m is exact in the weights where the layer returns u + m: it then returns
u + P·m once every weight that writes to m is multiplied by P. That holds for one down-projection,
and for the sum of routed and shared experts, which is linear in all of them; it does not where a
norm or a factor stands between. `check_exact` tries it out on the model at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layercut.checkpoints.families import (
    ATTENTION_OUTPUTS,
    DOWN_PROJECTIONS,
    EXPERT_BLOCKS,
    EXPERT_DOWN_PROJECTIONS,
)
from layercut.errors import ModelError
from layercut.models.check_method import draw_probe_ids
from layercut.models.hooks import capture
from layercut.models.view import DecoderView, LayerInputs

LinearMap: TypeAlias = Any
"""An ``nn.Linear``, or a ``Conv1D``, which transformers does not type."""
PROBE_TOKENS = 16
PROBE_TOLERANCE = 0.05
"""Share of the expected change; bf16 rounds to 1/256, a norm or factor changes it wholly."""


@dataclass(frozen=True, slots=True)
class MlpOutput:
    """Where one layer's MLP writes.

    Attributes:
        module: its output is m, (batch, seq, d).
        weights: names of all weights and biases that m is linear in → whether their last
            dimension, rather than the one before it, is m's.
    """

    module: nn.Module
    weights: dict[str, bool]


def down_projection(view: DecoderView, layer: int) -> tuple[str, LinearMap] | None:
    """State-dict prefix and module of the MLP's only output projection, if there is one."""
    return _linear(view, layer, DOWN_PROJECTIONS)


def attention_output(view: DecoderView, layer: int) -> tuple[str, LinearMap] | None:
    """State-dict prefix and module of the attention's output projection, if there is one."""
    return _linear(view, layer, ATTENTION_OUTPUTS)


def mlp_output(view: DecoderView, layer: int) -> MlpOutput:
    """Where the layer's MLP, dense or of experts, writes to the residual stream.

    Raises:
        ModelError: no such place is known in this family.
    """
    projection = _linear(view, layer, DOWN_PROJECTIONS)
    if projection is not None:
        prefix, module = projection
        biased = {f"{prefix}.bias": True} if module.bias is not None else {}
        return MlpOutput(module, {f"{prefix}.weight": isinstance(module, Conv1D)} | biased)
    for path in EXPERT_BLOCKS:
        block = dict(view.layers[layer].named_modules()).get(path)
        weights = {
            f"{view.layout.layers}.{layer}.{path}.{name}": _is_output_last(view, name, parameter)
            for name, parameter in (block.named_parameters() if block else ())
            if EXPERT_DOWN_PROJECTIONS.fullmatch(name)
        }
        if block is not None and weights:
            return MlpOutput(block, weights)
    raise ModelError(
        f"layer {layer} of this {view.layout.model_type} model has no MLP whose output projection "
        "is known. Set recovery.method: none."
    )


def fold(view: DecoderView, output: MlpOutput, projection: Tensor) -> dict[str, Tensor]:
    """Every weight that writes to m, multiplied by a projection of m, in the projection's dtype.

    Args:
        view: the model.
        output: where the layer's MLP writes.
        projection: P, (d, d).
    """
    folded = {}
    for name, output_is_last in output.weights.items():
        weight = view.model.get_parameter(name).data
        p = projection.to(weight.device)
        folded[name] = weight.to(p) @ p.T if output_is_last else p @ weight.to(p)
    return folded


def in_features(module: LinearMap) -> int:
    """Width of what a linear map reads."""
    return int(module.nx if isinstance(module, Conv1D) else module.in_features)


def store_like(module: LinearMap, matrix: Tensor) -> Tensor:
    """An (out, in) matrix in the layout of the module's weight."""
    return matrix.T if isinstance(module, Conv1D) else matrix


@torch.no_grad()
def check_exact(view: DecoderView, layers: Iterable[int]) -> None:
    """Double every second coordinate of m in turn in each layer, and see that just that happens.

    Args:
        view: the model; unchanged afterwards.
        layers: sorted indices of the layers whose weights a recovery may change.

    Raises:
        ModelError: something stands between the MLP's output and the residual stream.
    """
    wanted = set(layers)
    inputs = view.embed(draw_probe_ids(view, 1, PROBE_TOKENS))
    hidden = inputs.hidden
    probe = torch.ones(view.hidden_size, device=hidden.device, dtype=hidden.dtype)
    probe[::2] = 2  # a power of two: rounds nothing in any dtype
    for layer in range(max(wanted, default=-1) + 1):
        if layer not in wanted:
            hidden = view.run_layer(layer, hidden, inputs)
            continue
        output = mlp_output(view, layer)
        with view.holding(layer):
            after, m = _run_capturing(view, layer, hidden, inputs, output.module)
            with view.patched(fold(view, output, torch.diag(probe))):
                changed = view.run_layer(layer, hidden, inputs)
        expected = (m.view_as(after) * (probe - 1)).float()
        rounding = 8 * torch.finfo(after.dtype).eps * float(after.float().norm())
        gap = float(((changed - after).float() - expected).norm())
        if not gap <= PROBE_TOLERANCE * float(expected.norm()) + rounding:
            raise ModelError(
                f"layer {layer} of this {view.layout.model_type} model does not add its MLP's "
                "output to the residual stream as it is (a norm or a factor stands between), so "
                "that no correction folds into its weights exactly. Set recovery.method: none, "
                "and selection.strategy: lowest."
            )
        hidden = after


def _run_capturing(
    view: DecoderView, layer: int, hidden: Tensor, inputs: LayerInputs, module: nn.Module
) -> tuple[Tensor, Tensor]:
    """The layer's output and that of one of its modules."""
    seen: list[Tensor] = []
    # Falcon adds the attention's output to it in place.
    with capture(module, lambda _, output: seen.append(output.clone())):
        after = view.run_layer(layer, hidden, inputs)
    return after, seen[0]


def _linear(view: DecoderView, layer: int, paths: Iterable[str]) -> tuple[str, LinearMap] | None:
    modules = dict(view.layers[layer].named_modules())
    for path in paths:
        if isinstance(module := modules.get(path), nn.Linear | Conv1D):
            return f"{view.layout.layers}.{layer}.{path}", module
    return None


def _is_output_last(view: DecoderView, name: str, parameter: Tensor) -> bool:
    """Biases, and experts stored as (experts, in, out) rather than (experts, out, in)."""
    if parameter.dim() == 1 or name.endswith("bias"):
        return True
    return parameter.shape[-2] != view.hidden_size
