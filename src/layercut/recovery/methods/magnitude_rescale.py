"""Close the gap in magnitude that every cut leaves in the residual stream (Prune&Comp).

Source   arXiv:2507.18212 §3; which norms are compared is read in the released code
Formula  α = mean_k mean_s ‖h_{e,s,k}‖₁ / ‖h_{b,s,k}‖₁
         h (tokens, d): dense residual stream entering the cut (b) and leaving it (e); k: channel;
         ‖·‖₁ over the tokens of sequence s
         every weight that writes to the stream behind the cut, and its bias, times 1/α
Rule     published: the embedding and every output and down-projection before the cut times α. That
         would change a tied head, and no patch can untie one. The same model results if all that
         is written behind the cut is divided by α instead [our reading]: with x the stream in
         front of the cut and f_i what layer i adds, a function of its norm's output,
             published  αx + Σ_i f_i(norm(αx + Σ_{j<i} f_j))
             here       x + Σ_i g_i,  g_i = f_i(norm(x + Σ_{j<i} g_j)) / α
         are α times each other at every layer, because norm(αz) = norm(z) up to its ε; the final
         norm removes that factor as well. Cuts multiply. A contiguous cut has one α, and all are
         measured in the dense model; the paper measures again after every layer it drops
Cost     one dense forward pass without the head
Limits   exact only where nothing but a norm reads the stream, and no norm or nonlinearity stands
         behind the projections that write to it
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.residual_stream import dense_stream
from layercut.errors import ModelError, NumericsError
from layercut.models.output_projections import (
    PROBE_TOKENS,
    PROBE_TOLERANCE,
    attention_output,
    mlp_output,
)
from layercut.models.view import DecoderView
from layercut.registry import MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch


class Options(MethodOptions):
    """No options."""

    def check(self, view: DecoderView, batches: CalibrationBatches, n_drop: int) -> None:
        """Refuse a model whose layers do not follow the scale of their input."""
        check_scale_free(view, range(1, view.n_layers))


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> WeightPatch:
    """Measure α at every cut in the dense model and scale all that is written behind it."""
    alphas = magnitude_gaps(view, plan, batches, evidence)
    tensors: dict[str, Tensor] = {}
    for layer in plan.kept:
        factor = math.prod(1 / alpha for first, alpha in alphas.items() if first < layer)
        if factor != 1:
            tensors |= scaled(view, layer, factor)
    notes = {"alpha": {str(first): alpha for first, alpha in alphas.items()}}
    return WeightPatch(tensors, "magnitude-rescale", notes)


def magnitude_gaps(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    evidence: Evidence | None = None,
) -> dict[int, float]:
    """First layer of every cut → α.

    Raises:
        NumericsError: a channel is silent in front of a cut, or the stream is not finite.
    """
    dense = dense_stream(view, batches, evidence)
    alphas = {}
    for first, length in progress.track(plan.cuts, total=len(plan.cuts)):
        while dense.layer < first:
            dense.advance(dense.layer)
        before = dense.fork().states
        while dense.layer < first + length:
            dense.advance(dense.layer)
        alpha = float(channel_ratios(before, dense.states, batches.seq_len).mean())
        if not 0 < alpha < math.inf:
            raise NumericsError(
                f"the magnitudes around layer {first} have a ratio of {alpha}: a channel of the "
                "residual stream is silent or not finite. Set recovery.method: none."
            )
        alphas[first] = alpha
    return alphas


def channel_ratios(
    before: Spool, after: Spool, seq_len: int, rotation: Tensor | None = None
) -> Tensor:
    """Mean over sequences of ‖after_k‖₁ / ‖before_k‖₁ for every channel k, (d,) float64.

    Args:
        before: rows of whole sequences, (n_tokens, d).
        after: the same tokens' rows.
        seq_len: tokens per sequence, over which a norm runs.
        rotation: (d, d) that is applied to both first.
    """
    totals = torch.zeros(before.rows.shape[1], dtype=torch.float64)
    for x, y in zip(before.slices(seq_len), after.slices(seq_len), strict=True):
        if rotation is not None:
            x, y = x @ rotation, y @ rotation
        totals += y.abs().sum(dim=0, dtype=torch.float64) / x.abs().sum(dim=0, dtype=torch.float64)
    return totals / (len(before) // seq_len)


def scaled(view: DecoderView, layer: int, factor: float) -> dict[str, Tensor]:
    """Every weight and bias by which a layer writes to the residual stream, times ``factor``."""
    names = list(mlp_output(view, layer).weights)
    if (attention := attention_output(view, layer)) is not None:
        prefix, module = attention
        names += [f"{prefix}.weight"] + ([f"{prefix}.bias"] if module.bias is not None else [])
    return {name: view.model.get_parameter(name).data.float() * factor for name in names}


@torch.no_grad()
def check_scale_free(view: DecoderView, layers: Iterable[int]) -> None:
    """Double what enters and what writes in each layer, and see that its output doubles.

    Args:
        view: the model; unchanged afterwards.
        layers: sorted indices of the layers that may stand behind a cut.

    Raises:
        ModelError: a layer or the final norm depends on the scale of the stream.
    """
    wanted = set(layers)
    rows = view.vocabulary_size
    ids = torch.randint(rows, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    inputs = view.embed(ids)
    hidden = inputs.hidden
    for layer in range(view.n_layers):
        after = view.run_layer(layer, hidden, inputs)
        if layer in wanted:
            with view.patched(scaled(view, layer, 2)):
                doubled = view.run_layer(layer, 2 * hidden, inputs)
            added = float((after - hidden).float().norm())
            rounding = 8 * torch.finfo(after.dtype).eps * float(after.float().norm())
            if (
                not float((doubled / 2 - after).float().norm())
                <= PROBE_TOLERANCE * added + rounding
            ):
                raise _depends_on_scale(view, f"layer {layer}")
        hidden = after
    losses = view.stream_losses(hidden, ids)
    gap = float((view.stream_losses(2 * hidden, ids) - losses).norm())
    if not gap <= PROBE_TOLERANCE * float(losses.norm()):
        raise _depends_on_scale(view, "what follows the last layer")


def _depends_on_scale(view: DecoderView, place: str) -> ModelError:
    return ModelError(
        f"{place} of this {view.layout.model_type} model does not follow the scale of the residual "
        "stream (a norm stands behind its projections, or none in front of them), so that no "
        "scale folds into its weights exactly. Set recovery.method: none."
    )
