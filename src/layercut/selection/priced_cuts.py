"""Choose whole cuts: price each by what its refit leaves, then find the cheapest plan exactly.

Source   ours; METHODS §5
Formula  price(i, n) = Σ_t ‖∇h_{i+n,t}‖₂ · ‖h_{i+n,t} − h_{i,t} − D·a_t‖₂ over held-out tokens:
         a first-order bound, in nats, on what dropping layers i…i+n−1 does to the loss
         D (d, in) refits layer i−1's down-projection towards h_{i+n}, with weights 1/‖h_{i,t}‖²;
         a_t (in): its input; ∇ of the summed token loss, in the dense model
Rule     a plan is a set of disjoint cuts with a kept layer before each; their prices add up, and
         the cheapest plan of every size is a shortest path. Prices ignore how cuts interact, so a
         short search around the cheapest plan compares held-out losses after a refit at the cuts.
Cost     one forward-backward through activations and two forward passes over the sampled tokens,
         in·d sums for every cut; each plan that the search tries costs about one pass more
Limits   layer 0 stays
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from layercut import progress
from layercut.activations import ResidualStream, Spool
from layercut.errors import PlanError
from layercut.gradients import layer_gradients
from layercut.models.view import DecoderView
from layercut.recovery import refit
from layercut.scoring import finished
from layercut.selection import Request
from layercut.types import CalibrationBatches, Evidence, LayerScores, PruningPlan, Round

NEEDS_SCORING = "residual-sensitivity"
HELD_OUT_EVERY = 4
PENALTY = 0.1
LONGEST_CUT = 10
SAMPLE_SHARE = 0.25
SAMPLE_TOKENS = 4096
LENGTH_LIMITS = (LONGEST_CUT, 6, 4, 3, 2, 1)
PLANS_TRIED = 20
REFIT = refit.Options(layers="cuts", modules="down", held_out_every=HELD_OUT_EVERY)

Plan = tuple[int, ...]
Prices = dict[tuple[int, int], float]


def select(
    view: DecoderView, batches: CalibrationBatches, request: Request
) -> tuple[PruningPlan, Evidence]:
    """Price every cut, take the cheapest plan and search around it on held-out loss."""
    start = time.perf_counter()
    protect = request.protect | {0}
    sample = thin(batches)
    dense = ResidualStream(view, sample, remember=True)
    slopes, values = sensitivities(view, sample, dense)
    prices = price_cuts(view, sample, dense, slopes, min(LONGEST_CUT, request.n_drop))
    curve = cheapest_plans(prices, view.n_layers, protect)
    if request.n_drop not in curve:
        raise PlanError(
            f"no plan drops {request.n_drop} of {view.n_layers} layers around the protected ones. "
            "Lower drop_layers or protect fewer."
        )
    n_priced = int(refit.held_out_rows(sample, HELD_OUT_EVERY).sum())
    starts = starting_plans(prices, view.n_layers, protect, request.n_drop)
    dropped, _ = search(view, sample, dense, starts, prices, protect)
    bare = LayerScores(tuple(values), n_targets=sample.n_targets)
    seconds = time.perf_counter() - start
    scores = finished(view, sample, bare, request.scoring, {}, seconds)
    plan = PruningPlan(
        model=view.name,
        n_layers=view.n_layers,
        dropped=dropped,
        method="priced-cuts",
        rounds=(Round(scores.values, dropped, None),),
        fingerprint=scores.fingerprint,
        # Cuts longer than the request were not priced: beyond it the curve would be too dear.
        curve={n: curve[n][0] / n_priced for n in sorted(curve) if n <= request.n_drop},
    )
    return plan, Evidence(scores=(scores,))


def thin(batches: CalibrationBatches) -> CalibrationBatches:
    """An evenly spaced share of the sequences, enough to price with."""
    wanted = max(SAMPLE_TOKENS, SAMPLE_SHARE * batches.n_sequences * batches.seq_len)
    n_keep = max(HELD_OUT_EVERY, round(wanted / batches.seq_len))
    every = max(1, batches.n_sequences // n_keep)
    return replace(batches, input_ids=batches.input_ids[::every][:n_keep])


def sensitivities(
    view: DecoderView, batches: CalibrationBatches, dense: ResidualStream
) -> tuple[Tensor, list[float]]:
    """‖∇h_l‖ of every token at every boundary, and every layer's residual sensitivity.

    Returns:
        Slopes, (L + 1, n_tokens), where row l is for the stream entering layer l (row 0 is zero),
        and the sum over tokens of ‖∇h_{l+1}‖·‖h_{l+1} − h_l‖ per layer.
    """
    slopes = torch.zeros(view.n_layers + 1, batches.n_sequences * batches.seq_len)
    values = [0.0] * view.n_layers
    start = 0
    n_slices = -(-batches.n_sequences // batches.micro_batch)
    for ids in progress.track(batches.micro_batches(), total=n_slices):
        stop = start + ids.numel()
        for g in layer_gradients(view, ids, micro_batch=len(ids), n_targets=1, weights=False):
            slopes[g.layer + 1, start:stop] = g.grad_out[0].float().norm(dim=-1).flatten().cpu()
        start = stop
    for layer in range(view.n_layers):
        dense.advance(layer)
    assert dense.history is not None
    for layer, (before, after) in enumerate(zip(dense.history, dense.history[1:], strict=False)):
        change = (after.rows - before.rows).norm(dim=1)
        values[layer] = float((slopes[layer + 1] * change).sum(dtype=torch.float64))
    return slopes, values


def price_cuts(
    view: DecoderView,
    batches: CalibrationBatches,
    dense: ResidualStream,
    slopes: Tensor,
    longest: int,
) -> Prices:
    """The price of every cut (first layer, number of layers) of at most ``longest`` layers."""
    held_out = refit.held_out_rows(batches, HELD_OUT_EVERY)
    prices: Prices = {}
    assert dense.history is not None
    for start in progress.track(range(1, view.n_layers), total=view.n_layers - 1):
        dense.rewind(start - 1)
        module = view.down_projection(start - 1)[1]
        inputs = refit.advance_capturing(dense.fork(), start - 1, module)
        ends = range(start + 1, min(start + longest, view.n_layers) + 1)
        targets = [dense.history[end] for end in ends]
        residuals = _residuals(inputs, dense.history[start], targets, held_out)
        for end, length in zip(ends, residuals, strict=True):
            price = (slopes[end, held_out] * length).sum(dtype=torch.float64)
            prices[start, end - start] = float(price)
    return prices


def _residuals(
    inputs: Spool, origin: Spool, targets: list[Spool], held_out: Tensor
) -> Iterator[Tensor]:
    """‖target − origin − D·a‖ of every held-out token, per target; D = 0 where that is better."""
    seen = ~held_out
    weight = origin.rows[seen].norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
    a, a_held = inputs.rows[seen] * weight, inputs.rows[held_out]
    gram = (a.T @ a).double()
    ridge = PENALTY * gram.diagonal().mean()
    ridged = gram + ridge * torch.eye(len(gram), dtype=torch.float64)
    factor, singular = torch.linalg.cholesky_ex(ridged)
    for target in targets:
        change = (target.rows[seen] - origin.rows[seen]) * weight
        fitted = torch.cholesky_solve((a.T @ change).double(), factor).float()
        missing = target.rows[held_out] - origin.rows[held_out]
        after = (missing - a_held @ fitted).norm(dim=1)
        before = missing.norm(dim=1)
        # A layer whose MLP is silent gives nothing to fit with.
        yield after if not singular and after.sum() < before.sum() else before


def cheapest_plans(
    prices: Prices, n_layers: int, protect: frozenset[int]
) -> dict[int, tuple[float, Plan]]:
    """For every number of dropped layers, the lowest sum of prices and the plan that has it.

    A shortest path over positions: from a kept layer, either keep the next one or make a cut and
    keep the layer after it.
    """
    # best[p][n]: layers before p are decided, n of them dropped, and layer p − 1 is kept.
    best: list[dict[int, tuple[float, Plan]]] = [{} for _ in range(n_layers + 2)]
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
                if start < n_layers and (known is None or entry < known):
                    best[after][n_dropped + length] = entry
    finished = {**best[n_layers]}
    for n_dropped, entry in best[n_layers + 1].items():
        if n_dropped not in finished or entry < finished[n_dropped]:
            finished[n_dropped] = entry
    finished.pop(0, None)
    return finished


def starting_plans(
    prices: Prices, n_layers: int, protect: frozenset[int], n_drop: int
) -> list[Plan]:
    """The cheapest plan with cuts of any length, and those with no cut longer than 1, 2, 3, 4, 6.

    A price is a bound on one cut's damage, tighter for some lengths than for others: the cheapest
    plans under several limits are cheap in different ways, and a trial tells which is best.
    """
    plans = []
    for longest in LENGTH_LIMITS:
        allowed = {cut: price for cut, price in prices.items() if cut[1] <= longest}
        curve = cheapest_plans(allowed, n_layers, protect)
        if n_drop in curve:
            plans.append(curve[n_drop][1])
    return list(dict.fromkeys(plans))


def search(
    view: DecoderView,
    batches: CalibrationBatches,
    dense: ResidualStream,
    starts: list[Plan],
    prices: Prices,
    protect: frozenset[int],
) -> tuple[Plan, dict[Plan, float]]:
    """Try the starts, then follow neighbours of the best by held-out loss, until the budget ends.

    Returns:
        The best plan and the held-out loss, in nats, of every plan tried.
    """
    losses = {plan: plan_loss(view, batches, dense, plan) for plan in starts}
    best = min(starts, key=lambda plan: losses[plan])
    while len(losses) < PLANS_TRIED:
        candidates = [p for p in neighbours(best, view.n_layers, protect) if p not in losses]
        if not candidates:
            break
        candidate = min(candidates, key=lambda plan: plan_price(plan, prices))
        losses[candidate] = plan_loss(view, batches, dense, candidate)
        progress.figure(f"plan {len(losses)} of {PLANS_TRIED}: loss {min(losses.values()):.3f}")
        if losses[candidate] < losses[best]:
            best = candidate
    return best, losses


def plan_loss(
    view: DecoderView, batches: CalibrationBatches, dense: ResidualStream, dropped: Plan
) -> float:
    """Held-out cross-entropy of the plan after a refit at its cuts, in nats."""
    plan = PruningPlan(view.name, view.n_layers, dropped, "priced-cuts")
    held_out = refit.held_out_rows(batches, HELD_OUT_EVERY)
    dense.rewind(0)
    tensors = refit.walk(view, plan, dense, held_out, REFIT)
    sequences = batches.input_ids[held_out[:: batches.seq_len]]
    with view.skipping(dropped), view.patched(tensors):
        return refit.held_out_loss(view, sequences, batches.micro_batch)


def neighbours(plan: Plan, n_layers: int, protect: frozenset[int]) -> list[Plan]:
    """Plans that drop one other layer instead of one of these."""
    gone = set(plan)
    free = [layer for layer in range(n_layers) if layer not in gone | protect]
    return [tuple(sorted(gone - {out} | {new})) for out in plan for new in free]


def plan_price(plan: Plan, prices: Prices) -> float:
    """The sum of a plan's prices; a cut too long to be priced counts as its parts."""
    cuts = PruningPlan("", max(plan) + 1, plan, "").cuts
    parts = [
        (first + done, min(LONGEST_CUT, length - done))
        for first, length in cuts
        for done in range(0, length, LONGEST_CUT)
    ]
    return sum(prices.get(part, float("inf")) for part in parts)
