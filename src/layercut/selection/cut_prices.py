"""What every cut would cost after its refit, and the cheapest plan of every size.

Source   ours; docs/methods.md#priced-cuts
Formula  price(i, n) = Σ_t ‖∇h_{i+n,t}‖₂ · ‖h_{i+n,t} − h_{i,t} − D·a_t‖₂ over held-out tokens:
         a first-order bound, in nats, on what dropping layers i…i+n−1 does to the loss
         D (d, in) refits what layer i−1 writes last, its down-projection, towards h_{i+n}, with
         weights 1/‖h_{i,t}‖²; a_t (in): its input; ∇ of the summed token loss, in the dense model
Rule     prices of disjoint cuts with a kept layer before each add up; the cheapest plan of every
         size is a shortest path
Cost     one forward-backward through activations and one forward pass over the tokens, and in·d
         sums for every cut
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from layercut import progress
from layercut.checkpoints.layer_types import LayerTypes
from layercut.engine.journal import NO_JOURNAL, Entry, Journal
from layercut.engine.layerwise import walk_gradients
from layercut.engine.residual_stream import ResidualStream
from layercut.models.ranks import Ranks
from layercut.models.view import DecoderView
from layercut.models.writers import Writer
from layercut.recovery.expert_fit import record_writer
from layercut.recovery.layer_fit import LayerWriters, mask_held_out_rows
from layercut.recovery.ridge import factor_ridge, fast_products
from layercut.recovery.writer_fit import see_through
from layercut.selection.pattern import keeps_one
from layercut.spool import Spool, choose_device
from layercut.types import CalibrationBatches, Cut, LayerSet

HELD_OUT_EVERY = 4
PENALTY = 0.1

Prices = dict[Cut, float]


def sensitivities(
    view: DecoderView, batches: CalibrationBatches, dense: ResidualStream
) -> tuple[Tensor, list[float]]:
    """‖∇h_l‖ of every token at every boundary, and every layer's residual sensitivity.

    Args:
        view: the model.
        batches: the sample.
        dense: this rank's share of it.

    Returns:
        Slopes of this rank's tokens on the model's device, (L + 1, n_tokens), where row l is for
        the stream entering layer l (row 0 is zero),
        and the sum over all tokens of ‖∇h_{l+1}‖·‖h_{l+1} − h_l‖ per layer.
    """
    n_tokens = len(dense.states)
    slopes = torch.zeros(view.n_layers + 1, n_tokens, device=view.device)
    parts = list(view.ranks.share_batches(batches).micro_batches())
    n_rows = batches.micro_batch * batches.seq_len
    for g in walk_gradients(view, parts, micro_batch=batches.micro_batch, weights=False):
        norms = g.grad_out[0].float().norm(dim=-1).flatten()
        slopes[g.layer + 1, g.group * n_rows :][: len(norms)] = norms
    for layer in range(view.n_layers):
        dense.advance(layer)
    assert dense.history is not None
    values = []
    for slope, before, after in zip(slopes[1:], dense.history, dense.history[1:], strict=False):
        change = (after.rows - before.rows.to(after.device)).norm(dim=1)
        values.append((slope.to(change.device) * change).sum(dtype=torch.float64).to(view.device))
    totals = torch.stack(values)
    view.ranks.sum_(totals)
    return slopes, totals.tolist()


def price_cuts(
    view: DecoderView,
    batches: CalibrationBatches,
    dense: ResidualStream,
    slopes: Tensor,
    longest: int,
    writers: LayerWriters,
    journal: Journal = NO_JOURNAL,
) -> Prices:
    """The price of every cut (first layer, number of layers) of at most ``longest`` layers.

    All ranks have all prices.

    Args:
        view: the model; unchanged afterwards.
        batches: calibration text.
        dense: the model's stream of this rank's share of it, with a history.
        slopes: ‖∇h_l‖ of that share, (L + 1, n_tokens).
        longest: the most layers of a cut.
        writers: of every layer; the last one in front of a cut is what its refit changes.
        journal: records the prices of every first layer.
    """
    held_out = mask_held_out_rows(batches, HELD_OUT_EVERY, view.ranks)
    rows = (~held_out).nonzero().squeeze(1), held_out.nonzero().squeeze(1)
    weights = slopes[:, rows[1].to(slopes.device)]
    prices: Prices = {}
    for start in progress.track(range(1, view.n_layers), total=view.n_layers - 1):
        ends = range(start + 1, min(start + longest, view.n_layers) + 1)
        before = writers[start - 1]
        writer = before[-1] if before else None
        price = partial(_price_from, view, dense, writer, start, ends, weights, rows)
        entry = journal.recall("prices of cuts at", start, price)
        for end, cost in zip(ends, entry.values["prices"], strict=True):
            prices[start, end - start] = cost
    return prices


def _price_from(
    view: DecoderView,
    dense: ResidualStream,
    writer: Writer | None,
    start: int,
    ends: range,
    weights: Tensor,
    rows: tuple[Tensor, Tensor],
) -> Entry:
    """The prices of all cuts that begin at layer ``start``, by their ends."""
    dense.advance_to(view.n_layers)  # known already, but where another process recorded the slopes
    assert dense.history is not None
    dense.rewind(start - 1)
    recorded = None
    if writer is not None:
        inputs, outputs, _ = record_writer(dense.fork(), start - 1, writer)
        recorded = writer, inputs, outputs
    targets = [dense.history[end] for end in ends]
    lengths = _residuals(recorded, dense.history[start], targets, rows, view.device, view.ranks)
    costs = [
        (weights[end].to(length.device) * length).sum(dtype=torch.float64)
        for end, length in zip(ends, lengths, strict=True)
    ]
    totals = torch.stack(costs)
    view.ranks.sum_(totals)
    return Entry({"prices": totals.tolist()})


def _residuals(
    recorded: tuple[Writer, Spool, Spool | None] | None,
    origin: Spool,
    targets: list[Spool],
    rows: tuple[Tensor, Tensor],
    device: torch.device,
    ranks: Ranks,
) -> Iterator[Tensor]:
    """‖target − origin − what D adds‖ of every held-out token, per target; D = 0 where better.

    Args:
        recorded: the writer that D refits, its inputs and, behind a norm, its outputs; ``None``:
            there is none.
        origin: rows in front of the cut.
        targets: rows behind it, by its length.
        rows: indices of the tokens to fit, and of those that are held out.
        device: where it is computed, if there is memory for it; else the CPU.
        ranks: who has the other rows.
    """
    width, out = recorded[1].rows.shape[1] if recorded else 0, origin.rows.shape[1]
    n_fitted = int(ranks.total(len(rows[0]))[0])
    side = min(width, n_fitted)
    # Rows of the inputs and of one target's changes; the Gram matrix, its factor, the fit.
    n_bytes = 4 * (n_fitted + len(rows[1])) * (width + 3 * out)
    n_bytes += 8 * side * (4 * side + len(rows[1]) + 4 * out)
    device = choose_device(device, n_bytes)

    def pick(spool: Spool, part: int) -> Tensor:
        return spool.rows[rows[part].to(spool.device)].to(device)

    start, start_held = pick(origin, 0), pick(origin, 1)
    weight = start.norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
    with fast_products(device):
        # Through a norm, D·a is that of z: rows by 1/ρ, changes of the stream by g/(g² + τ²).
        predict = None
        if recorded is not None:
            writer, inputs, outputs = recorded
            z = None if outputs is None else (pick(outputs, 0), pick(outputs, 1))
            before, after, scale, scale_held = see_through(writer, z)
            a, a_held = pick(inputs, 0) * (weight / scale), pick(inputs, 1) / scale_held
            predict = _prepare_prediction(a, a_held, n_fitted, ranks)
        for target in targets:
            missing = pick(target, 1) - start_held
            length = missing.norm(dim=1)
            # A layer whose MLP is silent gives nothing to fit with.
            if recorded is not None and predict is not None:
                wanted = (pick(target, 0) - start) * weight * before
                left = (missing - after * predict(wanted)).norm(dim=1)
                sums = torch.stack([left.sum(), length.sum()])
                ranks.sum_(sums)
                length = torch.where(sums[0] < sums[1], left, length)
            yield length


def _prepare_prediction(
    a: Tensor, a_held: Tensor, n_fitted: int, ranks: Ranks
) -> Callable[[Tensor], Tensor] | None:
    """D·a of the held-out rows as a function of the change that D is fitted to.

    Args:
        a: this rank's weighted rows to fit with, (n, in).
        a_held: its held-out rows, (m, in).
        n_fitted: rows to fit with of all ranks.
        ranks: who shares the sums; each answers for its own held-out rows.
    """
    width = a.shape[1]
    if n_fitted < width:
        rows = ranks.gather_rows(a)
        factor = factor_ridge(ranks.gather_rows(a @ rows.T).double(), PENALTY, width)
        if not ranks.agree(factor is not None) or factor is None:
            return None
        solved = torch.cholesky_solve((rows @ a_held.T).double(), factor).T.float()
        return lambda change: solved @ ranks.gather_rows(change)
    gram = (a.T @ a).double()
    ranks.sum_(gram)
    factor = factor_ridge(gram, PENALTY)
    if not ranks.agree(factor is not None) or factor is None:
        return None

    def predict(change: Tensor) -> Tensor:
        right = (a.T @ change).double()
        ranks.sum_(right)
        return a_held @ torch.cholesky_solve(right, factor).float()

    return predict


def find_cheapest_plans(
    prices: Prices,
    n_layers: int,
    protect: frozenset[int],
    layer_types: LayerTypes | None = None,
    keep_one_of: frozenset[int] = frozenset(),
) -> dict[int, tuple[float, LayerSet]]:
    """For every number of dropped layers, the lowest sum of prices and the plan that has it.

    A shortest path over positions: from a kept layer, either keep the next one or make a cut and
    keep the layer after it. With ``layer_types``, a layer is kept only where its new
    place is of its type. Where the cheapest plan of a size drops all of ``keep_one_of``, it is the
    cheapest of those that keep a certain one of them.
    """
    plans = _find_cheapest_plans(prices, n_layers, protect, layer_types)
    if all(keeps_one(keep_one_of, plan) for _, plan in plans.values()):
        return plans
    kept: dict[int, tuple[float, LayerSet]] = {}
    for layer in sorted(keep_one_of):
        found = _find_cheapest_plans(prices, n_layers, protect | {layer}, layer_types)
        for n_dropped, entry in found.items():
            kept[n_dropped] = min(kept.get(n_dropped, entry), entry)
    return kept


def _find_cheapest_plans(
    prices: Prices, n_layers: int, protect: frozenset[int], layer_types: LayerTypes | None
) -> dict[int, tuple[float, LayerSet]]:
    # best[p][n]: layers before p are decided, n of them dropped, and layer p − 1 is kept.
    best: list[dict[int, tuple[float, LayerSet]]] = [{} for _ in range(n_layers + 2)]
    best[1][0] = (0.0, ())
    allowed = {
        cut: price for cut, price in prices.items() if not protect & set(range(cut[0], sum(cut)))
    }
    for position in range(1, n_layers + 1):
        for n_dropped, (cost, plan) in best[position].items():
            moves = [((position, 0), 0.0)]
            moves += [(cut, price) for cut, price in allowed.items() if cut[0] == position]
            for (start, length), price in moves:
                # A cut at the very end has no layer to keep after it.
                after = min(start + length + 1, n_layers + 1)
                entry = (cost + price, (*plan, *range(start, start + length)))
                known = best[after].get(n_dropped + length)
                kept, new = start + length, position - n_dropped
                if (
                    layer_types is not None
                    and kept < n_layers
                    and layer_types[kept] != layer_types[new]
                ):
                    continue
                if start < n_layers and (known is None or entry < known):
                    best[after][n_dropped + length] = entry
    finished = {**best[n_layers]}
    for n_dropped, entry in best[n_layers + 1].items():
        if n_dropped not in finished or entry < finished[n_dropped]:
            finished[n_dropped] = entry
    finished.pop(0, None)
    return finished
