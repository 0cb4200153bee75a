"""Weight gradients summed over all gradient groups of all ranks, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from layercut.engine.layer_gradients import LossGradient
from layercut.engine.layerwise import walk_gradients
from layercut.models.view import DecoderView


def walk_summed_gradients(
    view: DecoderView,
    groups: Sequence[Tensor],
    *,
    micro_batch: int,
    n_targets: int = 1,
    loss: LossGradient | None = None,
    wanted: Callable[[str], bool] = lambda _: True,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Every layer that is not skipped, from the last to the first, with its summed gradients.

    Args:
        view: the model.
        groups: the gradient groups of this rank, perhaps none, (n_sequences, seq) each.
        micro_batch: sequences in memory at once.
        n_targets: what the summed token loss is divided by.
        loss: what is differentiated in the place of the token loss.
        wanted: whether the gradient of a weight, by its name, is asked for.

    Yields:
        The layer and its gradients by weight name, float32; its weights are in memory meanwhile.

    Raises:
        NumericsError: the loss or a gradient is not finite.
    """
    if not groups:
        for layer in reversed(range(view.n_layers)):
            if layer not in view.skipped:
                with view.holding(layer):
                    yield layer, _add_up_ranks(view, _zeros(view, layer, wanted))
        return
    sums: dict[int, dict[str, Tensor]] = {}
    for found in walk_gradients(
        view, groups, micro_batch=micro_batch, n_targets=n_targets, loss=loss
    ):
        layer_sums = sums.setdefault(found.layer, {})
        for name, gradient in found.weights.items():
            if not wanted(name):
                continue
            known = layer_sums.get(name)
            layer_sums[name] = gradient if known is None else known.add_(gradient)
        if found.group == len(groups) - 1:
            found.weights.clear()
            yield found.layer, _add_up_ranks(view, sums.pop(found.layer))


def _zeros(view: DecoderView, layer: int, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """What a rank without sequences adds."""
    return {
        name: torch.zeros_like(weight, dtype=torch.float32)
        for name, weight in view.linear_weights(layer).items()
        if wanted(name)
    }


def _add_up_ranks(view: DecoderView, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    # A transposed weight's gradient may be laid out as the weight is; ranks add up plain rows.
    if view.ranks.world > 1:
        gradients = {name: gradient.contiguous() for name, gradient in gradients.items()}
        view.ranks.sum_(*gradients.values())
    return gradients
