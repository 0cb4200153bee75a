"""A few large gradient steps of a pruned model towards the dense one, each as long as pays.

Source   ours; docs/methods.md#gradient-steps. Orthogonalised gradients: Muon, arXiv:2502.16982
Formula  W ← W − η ‖W‖_F/√r · U Vᵀ,  with U S Vᵀ = ∂/∂W mean_t KL(q_t ‖ p_t), r = min(out, in)
         q, p: next-token distributions of the dense and of the pruned model; η is the length of
         the step as a part of ‖W‖_F, the same for all weights
Rule     the gradient is taken on one half of the sequences, η is halved or doubled from ETA on
         while that lowers the cross-entropy on the other half; then the halves change places.
         With fresh sequences, every step's gradient is that of the next of them.
         A step that does not lower it is not made. Give it sequences that nothing was fitted to
Cost     per step a dense forward and a pruned forward-backward pass over one half, about five
         forward passes over the other, and r³ per weight
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

import torch
from torch import Tensor

from layercut import progress
from layercut.checkpoints.patch import Names
from layercut.engine.gradient_sums import walk_summed_gradients
from layercut.engine.journal import NO_JOURNAL, Journal
from layercut.engine.layer_gradients import LossGradient
from layercut.engine.loss import mean_loss
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import NumericsError
from layercut.models.attention import eager
from layercut.models.view import DecoderView
from layercut.models.weight_store import collect, make_store
from layercut.recovery.orthogonalize import orthogonalize
from layercut.recovery.step_records import recall_steps, record_step
from layercut.tensor_maps import ComputedTensors
from layercut.training.distillation_loss import Divergence
from layercut.types import CalibrationBatches, PruningPlan, split_rows

ETA = 0.001
SHORTEST = ETA / 8


def take_steps(
    view: DecoderView,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    sequences: Tensor,
    *,
    n_steps: int,
    micro_batch: int,
    fresh: Tensor | None = None,
    journal: Journal = NO_JOURNAL,
) -> tuple[Mapping[str, Tensor], tuple[float, ...]]:
    """Take up to ``n_steps`` steps from the pruned model with ``tensors`` in it.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go.
        tensors: replaced weights of the kept layers, by name.
        sequences: token ids, (n, seq), at least two rows.
        n_steps: steps; each half of the sequences teaches every second one.
        micro_batch: sequences in memory at once.
        fresh: more sequences, at least one for each step, of which each step learns from its share.
        journal: records every step; those that it knows are not taken again.

    Returns:
        The replaced weights after the steps, in the model's dtype, and each step's η; 0 for one
        not made.

    Raises:
        NumericsError: the loss or a gradient is not finite.
    """
    reached, lengths = recall_steps(journal, tensors, n_steps)
    halves = sequences[::2], sequences[1::2]
    for step in range(len(lengths), n_steps):
        learned, held_out = halves[step % 2], halves[1 - step % 2]
        if fresh is not None and len(fresh):
            learned = fresh[step::n_steps]
        directions = find_directions(view, plan, reached, learned, micro_batch)
        eta = search_length(view, plan, reached, directions, held_out, micro_batch)
        if eta:
            reached = collect(view, step_weights(view, reached, directions, eta))
        lengths.append(eta)
        record_step(journal, reached, lengths)
    return reached, tuple(lengths)


def find_directions(
    view: DecoderView,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    sequences: Tensor,
    micro_batch: int,
) -> MutableMapping[str, Tensor]:
    """What every weight moves by at η = 1: its polar factor, scaled to the weight's own norm.

    In bfloat16, which is exact enough for a thousandth of a weight. A weight's direction takes the
    place of its gradient, so that both are never in memory whole.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go.
        tensors: replaced weights.
        sequences: token ids, (n, seq).
        micro_batch: sequences in memory at once.

    Raises:
        NumericsError: the loss or a gradient is not finite.
    """
    directions, turn = make_store(view), 0
    for gradients in walk_divergence_gradients(view, plan, tensors, sequences, micro_batch):
        while gradients:
            name, gradient = gradients.popitem()
            direction = gradient.new_empty(gradient.shape, dtype=torch.bfloat16)
            if turn % view.ranks.world == view.ranks.rank:
                weight = view.model.get_parameter(name).data
                length = weight.float().norm() / math.sqrt(min(weight.shape))
                direction.copy_(orthogonalize(gradient) * length.to(gradient.device))
            view.ranks.broadcast_(direction, turn)
            directions[name] = direction
            turn += 1
    return directions


def walk_divergence_gradients(
    view: DecoderView,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    sequences: Tensor,
    micro_batch: int,
) -> Iterator[dict[str, Tensor]]:
    """Gradient of the mean divergence from the dense model, one kept layer after the other.

    Args:
        view: the intact model; unchanged afterwards. Between two layers it is the pruned one.
        plan: which layers go.
        tensors: replaced weights.
        sequences: token ids, (n, seq), of which every rank works on its share.
        micro_batch: sequences in memory at once.

    Yields:
        A layer's gradients by weight name, float32; the layer's weights are in memory meanwhile.

    Raises:
        NumericsError: the loss or a gradient is not finite.
    """
    trained = find_trained_weights(view, plan)
    with _naming_the_remedy(), eager(view, sequences.shape[1]):
        own = view.ranks.share(sequences)
        loss = _divergence_from(view, own, micro_batch, len(sequences))
        groups = _divide(view, own, micro_batch)
        with view.skipping(plan.dropped), view.patched(tensors):
            for _, gradients in walk_summed_gradients(
                view, groups, micro_batch=micro_batch, loss=loss, wanted=trained.__contains__
            ):
                yield gradients


@contextmanager
def _naming_the_remedy() -> Iterator[None]:
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{error} Or set the refit's gradient_steps: 0.") from error


def _divergence_from(view: DecoderView, own: Tensor, micro_batch: int, n: int) -> LossGradient:
    """Every micro-batch's part of the mean divergence over ``n`` sequences from ``view``."""
    stream = ResidualStream(view, CalibrationBatches(own, micro_batch, micro_batch, "", ""))
    stream.advance_to(view.n_layers)
    divergence = Divergence(view, view)
    dense = [divergence.round_teacher_states(s) for s in stream.normed_states(own)]

    def differentiate(hidden: Tensor, ids: Tensor, place: int) -> tuple[Tensor, Tensor]:
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = view.norm_states(leaf, ids)
            value = divergence.of_states(normed, ids, dense[place]) * (len(ids) / n)
        (gradient,) = torch.autograd.grad(value, leaf)
        return gradient, value.detach()

    return differentiate


def _divide(view: DecoderView, sequences: Tensor, micro_batch: int) -> list[Tensor]:
    """Gradient groups: all at once where memory or files call for it, else micro-batches.

    One group's layers run forward twice, but one layer's gradients are in memory at a time.
    """
    if view.source is not None or view.device.type == "cuda":
        return [sequences] if len(sequences) else []
    return list(split_rows(sequences, micro_batch))


def step_weights(
    view: DecoderView,
    tensors: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    eta: float,
) -> ComputedTensors:
    """``tensors`` and the model's own weights where there are none, each less η · direction.

    In the model's dtype, in which the loss at this η is measured. One is computed when it is asked
    for, from what the model holds then.
    """

    def compute(name: str) -> Tensor:
        own: Tensor = view.model.get_parameter(name).data
        weight = tensors.get(name, own).to(own.device)
        if name not in directions:
            return weight
        return (weight.float() - eta * directions[name].to(own.device)).to(own.dtype)

    return ComputedTensors([*tensors, *directions], compute)


def find_trained_weights(view: DecoderView, plan: PruningPlan) -> set[str]:
    """Names of kept layers' linear weights that are stored as such, and not shared by layers."""
    names = Names(view.path, view.layout)
    weights = {
        name: view.model.get_parameter(name)
        for layer in range(view.n_layers)
        for name in view.linear_modules(layer)
    }
    times = Counter(id(weight) for weight in weights.values())
    dropped = {name for layer in plan.dropped for name in view.linear_modules(layer)}
    return {
        name
        for name, weight in weights.items()
        if name not in dropped
        and times[id(weight)] == 1
        and names.on_disk(name, weight) is not None
    }


def search_length(
    view: DecoderView,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    directions: Mapping[str, Tensor],
    sequences: Tensor,
    micro_batch: int,
) -> float:
    """The η with the lowest loss on other sequences by doubling or halving; 0 if none is better."""

    def loss_at(eta: float) -> float:
        with (
            view.skipping(plan.dropped),
            view.patched(step_weights(view, tensors, directions, eta)),
        ):
            return mean_loss(view, sequences, micro_batch)

    losses = {eta: loss_at(eta) for eta in (0.0, ETA)}
    eta = ETA
    if losses[ETA] < losses[0.0]:
        while losses[eta] == min(losses.values()):
            eta *= 2
            losses[eta] = loss_at(eta)
    else:
        while losses[eta] >= losses[0.0] and eta > SHORTEST:
            eta /= 2
            losses[eta] = loss_at(eta)
    best = min(losses, key=lambda tried: losses[tried])
    progress.status(f"a step of {best:.2%}: loss {losses[0.0]:.3f} → {losses[best]:.3f}")
    return best
