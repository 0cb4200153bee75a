"""Where a layer writes to the residual stream, and what stands between, tried out on the model.

Every linear map whose output ends in the stream is a writer: attention, MLP, shared experts, the
output of a recurrence; so is a block of routed experts, whose output is linear in all of its
down-projections at once. Its output z is put there by hand, with all other writers silent, and what
the layer then adds is compared with what could stand between:

    y = c · z                            nothing, or a factor
    y = g ⊙ z / √(mean z² + ε)           a norm with its gain
    y = g ⊙ (z − mean z) / √(var z + ε)  a norm that subtracts the mean

A map that fits none (a gate per token, a norm over stream and output together) is no writer: no
correction folds into its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layercut.checkpoints.families import (
    ATTENTION_OUTPUTS,
    DOWN_PROJECTIONS,
    EXPERT_BLOCKS,
    SHARED_EXPERTS,
)
from layercut.models.check_method import draw_probe_ids
from layercut.models.experts import (
    Experts,
    Routing,
    add_experts,
    capture_routing,
    find_experts,
)
from layercut.models.layer_probe import TOLERANCE, LayerProbe, noting_readers
from layercut.models.view import DecoderView, LayerInputs

PROBE_TOKENS = 16
EPSILONS = ("variance_epsilon", "eps", "epsilon")


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm between a writer and the stream.

    Attributes:
        gain: g with all factors, (d,) float32.
        eps: ε.
        centred: whether the mean is subtracted.
        parameter: its gain's name in the state dict; ``None``: not known, so it stays.
        offset: what is added to the stored gain: 1 where it is stored as g − 1.
        module: it, where it is known; it may well read the sum of several writers.
    """

    gain: Tensor
    eps: float
    centred: bool
    parameter: str | None
    offset: float
    module: nn.Module | None = None

    def centre(self, z: Tensor) -> Tensor:
        """z, or z less its mean, (n, d)."""
        return z - z.mean(dim=1, keepdim=True) if self.centred else z

    def scale(self, z: Tensor) -> Tensor:
        """√(mean z² + ε) or √(var z + ε) of every token, (n, 1)."""
        return (self.centre(z).square().mean(dim=1, keepdim=True) + self.eps).sqrt()


@dataclass(frozen=True, slots=True)
class Writer:
    """One linear map W (out, in) that writes to the stream, or a block of routed experts.

    Attributes:
        prefix: of its parameters in the state dict.
        module: an ``nn.Linear``, a ``Conv1D``, or the block of experts.
        is_mlp: whether it is the layer's MLP's, which comes last.
        factor: c, where no norm stands between.
        norm: what does.
        experts: how the block's output is made; a map of its own output is then what is fitted
            first, and ``a`` is z.
    """

    prefix: str
    module: Any
    is_mlp: bool
    factor: float = 1.0
    norm: Norm | None = None
    experts: Experts | None = None

    @property
    def is_plain(self) -> bool:
        """Whether its output is added as it is."""
        return self.norm is None and self.factor == 1.0

    def write(self, z: Tensor) -> Tensor:
        """y, what the stream receives of the map's outputs z, (n, d) float32 each."""
        if self.norm is None:
            return self.factor * z
        return self.norm.gain.to(z.device) * (self.norm.centre(z) / self.norm.scale(z))


@torch.no_grad()
def find_writers(view: DecoderView) -> tuple[tuple[Writer, ...], ...]:
    """The writers of every layer, attention before MLP, and routed experts last.

    Args:
        view: the model; unchanged afterwards.
    """
    inputs = view.embed(draw_probe_ids(view, 1, PROBE_TOKENS))
    hidden, found = inputs.hidden, []
    for layer in range(view.n_layers):
        with view.holding(layer):
            found.append(tuple(_probe_layer(view, layer, hidden, inputs)))
            hidden = view.run_layer(layer, hidden, inputs)
    return tuple(found)


def _probe_layer(
    view: DecoderView, layer: int, hidden: Tensor, inputs: LayerInputs
) -> Iterator[Writer]:
    """Try every linear map that may be a writer."""
    modules = dict(view.layers[layer].named_modules())
    paths = [(p, False) for p in ATTENTION_OUTPUTS]
    paths += [(p, True) for p in (*DOWN_PROJECTIONS, *SHARED_EXPERTS)]
    candidates = [
        (path, modules[path], is_mlp)
        for path, is_mlp in paths
        if isinstance(modules.get(path), nn.Linear | Conv1D)
    ]
    experts = find_experts(view.layers[layer])
    candidates += [(path, block.module, True) for path, block in experts.items()]
    writers = [module for _, module, _ in candidates]
    blocks = [modules[path] for path in EXPERT_BLOCKS if path in modules]
    generator = torch.Generator().manual_seed(layer)
    # With nothing in the stream the layer adds y alone, without rounding it away.
    nothing = torch.zeros_like(hidden)
    # Behind an attention, all of the MLP would answer to what it wrote.
    probes = {
        last: LayerProbe(
            view, layer, inputs, (nothing, hidden), writers if last else writers + blocks
        )
        for last in {is_mlp for *_, is_mlp in candidates}
    }
    rounding = 8 * torch.finfo(hidden.dtype).eps * float(hidden.float().norm())
    for path, module, is_mlp in candidates:
        prefix, block = f"{view.layout.layers}.{layer}.{path}", experts.get(path)
        if block is not None and not _follows_rule(view, layer, hidden, inputs, block):
            continue
        z = torch.randn(PROBE_TOKENS, view.hidden_size, generator=generator)
        z = z.to(hidden.device, hidden.dtype)
        readers: dict[str, nn.Module] = {}
        with noting_readers(view.layers[layer], z, readers):
            y, beside = probes[is_mlp].write(module, z)
        size = float(y.norm())
        if not size or not float((beside - y).norm()) <= TOLERANCE * size + rounding:
            continue  # silent, or what it adds depends on what is there
        form = _find_form(z.float(), y)
        if form is None:
            continue
        factor, gain, centred = form
        if gain is None:
            factor = 1.0 if abs(factor - 1) < 1 / 256 else factor
            yield Writer(prefix, module, is_mlp, factor, experts=block)
        else:
            norm = _name_norm(view, layer, readers, gain, centred=centred)
            if norm.module is None and not probes[is_mlp].is_alone(module, z, y):
                continue  # the norm of a sum, which cannot be looked at
            yield Writer(prefix, module, is_mlp, 1.0, norm, block)


def _follows_rule(
    view: DecoderView, layer: int, hidden: Tensor, inputs: LayerInputs, experts: Experts
) -> bool:
    """Whether the sum over the experts, by their rule, is what the block returns."""
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(routing: Routing, output: Any) -> None:
        summed = experts.add_up(output, PROBE_TOKENS).float()
        seen.append((summed, add_experts(experts, routing, PROBE_TOKENS)))

    with capture_routing(experts, keep):
        view.run_layer(layer, hidden, inputs)
    return len(seen) == 1 and bool(
        (seen[0][0] - seen[0][1]).norm() <= TOLERANCE * seen[0][0].norm()
    )


def _find_form(z: Tensor, y: Tensor) -> tuple[float, Tensor | None, bool] | None:
    """c, g and whether the mean is subtracted; ``None`` if y is none of these of z, (n, d) each."""
    factor = float((y * z).sum() / z.square().sum())
    if float((y - factor * z).norm()) <= TOLERANCE * float(y.norm()):
        return factor, None, False
    for centred in (False, True):
        u = z - z.mean(dim=1, keepdim=True) if centred else z
        u = u / u.square().mean(dim=1, keepdim=True).sqrt()
        gain = (y * u).sum(dim=0) / u.square().sum(dim=0)
        if float((y - gain * u).norm()) <= TOLERANCE * float(y.norm()):
            return 1.0, gain, centred
    return None


def _name_norm(
    view: DecoderView, layer: int, readers: Mapping[str, nn.Module], gain: Tensor, *, centred: bool
) -> Norm:
    """The norm with the exact gain of its module, where one of those that read z explains it.

    Large gains are much like themselves less 1: of all forms, the closest is taken.
    """
    best, closest = Norm(gain, 0.0, centred, None, 0.0), TOLERANCE * float(gain.norm())
    for path, module in readers.items():
        stored = module.get_parameter("weight").detach().float()
        eps = next((float(v) for k in EPSILONS if (v := getattr(module, k, None))), 0.0)
        for offset in (0.0, 1.0):
            own = stored + offset
            factor = float((gain * own).sum() / own.square().sum().clamp_min(1e-30))
            factor = 1.0 if abs(factor - 1) < 1 / 256 else factor
            distance = float((gain - factor * own).norm())
            if distance <= closest:
                name = f"{view.layout.layers}.{layer}.{path}.weight"
                best = Norm(factor * own, eps, centred, name, offset, module)
                closest = distance
    return best
