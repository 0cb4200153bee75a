"""Close the gap in magnitude that every cut leaves in the residual stream (Prune&Comp).

Source   arXiv:2507.18212 §3; which norms are compared is read in the released code
Formula  α = mean_k mean_s ‖h_{e,s,k}‖₁ / ‖h_{b,s,k}‖₁
         h (tokens, d): dense residual stream entering the cut (b) and leaving it (e); k: channel;
         ‖·‖₁ over the tokens of sequence s
Rule     every weight and bias that writes to the stream behind the cut, times 1/α; cuts multiply.
         The paper scales what lies before the cut by α: the same model, but it changes a tied
         head (docs/methods.md#magnitude-rescale has the proof)
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
from layercut.engine.residual_stream import ResidualStream, start_dense_stream
from layercut.errors import ModelError, NumericsError
from layercut.models.check_method import draw_probe_ids
from layercut.models.output_projections import (
    PROBE_TOKENS,
    PROBE_TOLERANCE,
    attention_output,
    mlp_output,
)
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.models.weight_store import make_store
from layercut.registry import Method, MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch


class Options(MethodOptions):
    """No options."""


def check(view: DecoderView, batches: CalibrationBatches, options: Options, n_drop: int) -> None:
    """Refuse a model whose layers do not follow the scale of their input."""
    check_scale_free(view, range(1, view.n_layers))


METHOD = Method(shares_dense_stream=True, check=check)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
    *,
    dense: ResidualStream | None = None,
) -> WeightPatch:
    """Measure α at every cut in the dense model and scale all that is written behind it."""
    alphas = measure_magnitude_gaps(view, plan, batches, dense)
    tensors = make_store(view)
    for layer in plan.kept:
        factor = math.prod(1 / alpha for first, alpha in alphas.items() if first < layer)
        if factor != 1:
            with view.holding(layer):
                tensors.update(scale_writers(view, layer, factor))
    notes = {"alpha": {str(first): alpha for first, alpha in alphas.items()}}
    return WeightPatch(tensors, "magnitude-rescale", notes)


def measure_magnitude_gaps(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    dense: ResidualStream | None = None,
) -> dict[int, float]:
    """First layer of every cut → α.

    Raises:
        NumericsError: a channel is silent in front of a cut, or the stream is not finite.
    """
    dense = start_dense_stream(view, view.ranks.share_batches(batches), dense)
    alphas = {}
    for first, length in progress.track(plan.cuts, total=len(plan.cuts)):
        dense.advance_to(first)
        before = dense.fork().states
        dense.advance_to(first + length)
        ratios = channel_ratios(before, dense.states, batches.seq_len, ranks=view.ranks)
        alpha = float(ratios.mean())
        if not 0 < alpha < math.inf:
            raise NumericsError(
                f"the magnitudes around layer {first} have a ratio of {alpha}: a channel of the "
                "residual stream is silent or not finite. Set recovery.method: none."
            )
        alphas[first] = alpha
    return alphas


def channel_ratios(
    before: Spool,
    after: Spool,
    seq_len: int,
    rotation: Tensor | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Mean over all ranks' sequences of ‖after_k‖₁ / ‖before_k‖₁ for every channel k, (d,) float64.

    Args:
        before: rows of whole sequences, (n_tokens, d).
        after: the same tokens' rows.
        seq_len: tokens per sequence, over which a norm runs.
        rotation: (d, d) that is applied to both first.
        ranks: who has the other sequences.
    """
    totals = torch.zeros(before.rows.shape[1], dtype=torch.float64, device=before.device)
    n_sequences = len(before) // seq_len
    for x, y in zip(before.slices(seq_len), after.slices(seq_len), strict=True):
        if not len(x):
            break  # this rank has no sequence
        y = y.to(x.device)
        if rotation is not None:
            x, y = x @ rotation, y @ rotation
        totals += y.abs().sum(dim=0, dtype=torch.float64) / x.abs().sum(dim=0, dtype=torch.float64)
    ranks.sum_(totals)
    return totals / ranks.total(n_sequences)[0]


def scale_writers(view: DecoderView, layer: int, factor: float) -> dict[str, Tensor]:
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
    ids = draw_probe_ids(view, 1, PROBE_TOKENS)
    inputs = view.embed(ids)
    hidden = inputs.hidden
    for layer in range(view.n_layers):
        with view.holding(layer):
            after = view.run_layer(layer, hidden, inputs)
            if layer in wanted:
                with view.patched(scale_writers(view, layer, 2)):
                    doubled = view.run_layer(layer, 2 * hidden, inputs)
        if layer in wanted:
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


def _depends_on_scale(view: DecoderView, where: str) -> ModelError:
    return ModelError(
        f"{where} of this {view.layout.model_type} model does not follow the scale of the residual "
        "stream (a norm stands behind its projections, or none in front of them), so that no "
        "scale folds into its weights exactly. Set recovery.method: none."
    )
