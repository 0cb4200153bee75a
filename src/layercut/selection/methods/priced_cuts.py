"""Choose whole cuts: price each by what its refit leaves, then find the cheapest plan exactly.

Source   ours; docs/methods.md#priced-cuts
Formula  prices and the shortest path: ``layercut.selection.cut_prices``
Rule     prices ignore how cuts interact, so a short search around the cheapest plan compares
         held-out losses after a refit at the cuts
Cost     that of the prices; each plan that the search tries, one forward pass over the sample more
Limits   layer 0 stays; cuts longer than LONGEST_CUT are not priced
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from layercut import progress
from layercut.checkpoints.layer_types import LayerTypes
from layercut.engine.journal import Entry
from layercut.engine.loss import mean
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import PlanError
from layercut.models.view import DecoderView
from layercut.models.writers import find_writers
from layercut.recovery.layer_fit import (
    LayerWriters,
    choose_held_out,
    mask_held_out_rows,
    refit_cuts,
)
from layercut.registry import Method, MethodOptions
from layercut.scoring.score import with_provenance
from layercut.selection.cut_prices import (
    HELD_OUT_EVERY,
    Prices,
    find_cheapest_plans,
    price_cuts,
    sensitivities,
)
from layercut.selection.pattern import keeps_one, keeps_pattern, no_such_plan_error
from layercut.selection.select import PlanOfSize, Request
from layercut.types import CalibrationBatches, Evidence, LayerScores, LayerSet, PruningPlan, Round

LONGEST_CUT = 10
SAMPLE_SHARE = 0.25
SAMPLE_TOKENS = (4096, 8192)
LENGTH_LIMITS = (LONGEST_CUT, 6, 4, 3, 2, 1)
PLANS_TRIED = 20


class Options(MethodOptions):
    """No options."""


METHOD = Method(needs_scoring="residual-sensitivity")


def plan(view: DecoderView, batches: CalibrationBatches, request: Request) -> PlanOfSize:
    """Price every cut; each size then costs a shortest path and a search on held-out loss."""
    writers = find_writers(view)
    start = time.perf_counter()
    protect = request.protect | {0}
    sample = subsample(batches)
    dense = ResidualStream(view, view.ranks.share_batches(sample), remember=True)
    journal = request.journal

    def measure_slopes() -> Entry:
        slopes, values = sensitivities(view, sample, dense)
        return Entry({"values": values}, {"slopes": slopes})

    measured = journal.recall("sensitivities", "all layers", measure_slopes)
    slopes, values = measured.tensors["slopes"], measured.values["values"]
    prices = price_cuts(view, sample, dense, slopes, LONGEST_CUT, writers, journal)
    n_priced = int(choose_held_out(sample, HELD_OUT_EVERY).sum()) * sample.seq_len
    types, one_of = request.layer_types, request.keep_one_of
    cheapest = find_cheapest_plans(prices, view.n_layers, protect, types, one_of)
    curve = {n: cheapest[n][0] / n_priced for n in sorted(cheapest)}
    bare = LayerScores(tuple(values), n_targets=sample.n_targets)
    seconds = time.perf_counter() - start
    scores = with_provenance(view, sample, bare, request.scoring, seconds)

    def plan_size(n_drop: int) -> tuple[PruningPlan, Evidence]:
        starts = find_starting_plans(prices, view.n_layers, protect, n_drop, types, one_of)
        if not starts and types is not None:
            raise no_such_plan_error(n_drop, view.n_layers)
        if not starts:
            raise PlanError(
                f"no plan drops {n_drop} of {view.n_layers} layers around the protected ones. "
                "Lower drop_layers or protect fewer."
            )

        def loss_of(plan: LayerSet) -> float:
            name = " ".join(map(str, plan))
            compute = partial(plan_loss, view, sample, dense, writers, plan)
            return journal.recall_number("plans tried", name, compute)

        dropped, _ = search(loss_of, view.n_layers, starts, prices, protect, types, one_of)
        chosen = PruningPlan(
            model=view.name,
            n_layers=view.n_layers,
            dropped=dropped,
            method="priced-cuts",
            rounds=(Round(scores.values, dropped, None),),
            fingerprint=scores.fingerprint,
            curve=curve,
        )
        return chosen, Evidence(scores=(scores,))

    return plan_size


def subsample(batches: CalibrationBatches) -> CalibrationBatches:
    """An evenly spaced share of the sequences, enough to price with."""
    least, most = SAMPLE_TOKENS
    share = SAMPLE_SHARE * batches.n_sequences * batches.seq_len
    wanted = min(max(least, share), most)
    n_keep = max(HELD_OUT_EVERY, round(wanted / batches.seq_len))
    every = max(1, batches.n_sequences // n_keep)
    return replace(batches, input_ids=batches.input_ids[::every][:n_keep])


def find_starting_plans(
    prices: Prices,
    n_layers: int,
    protect: frozenset[int],
    n_drop: int,
    layer_types: LayerTypes | None = None,
    keep_one_of: frozenset[int] = frozenset(),
) -> list[LayerSet]:
    """The cheapest plan with cuts of any length, and those with no cut longer than 1, 2, 3, 4, 6.

    A price is a bound on one cut's damage, tighter for some lengths than for others: the cheapest
    plans under several limits are cheap in different ways, and a trial tells which is best.
    """
    plans = []
    for longest in LENGTH_LIMITS:
        allowed = {cut: price for cut, price in prices.items() if cut[1] <= longest}
        curve = find_cheapest_plans(allowed, n_layers, protect, layer_types, keep_one_of)
        if n_drop in curve:
            plans.append(curve[n_drop][1])
    return list(dict.fromkeys(plans))


def search(
    loss_of: Callable[[LayerSet], float],
    n_layers: int,
    starts: list[LayerSet],
    prices: Prices,
    protect: frozenset[int],
    layer_types: LayerTypes | None = None,
    keep_one_of: frozenset[int] = frozenset(),
) -> tuple[LayerSet, dict[LayerSet, float]]:
    """Try the starts, then follow neighbours of the best by held-out loss, until the budget ends.

    Returns:
        The best plan and the held-out loss, in nats, of every plan tried.
    """
    losses = {plan: loss_of(plan) for plan in starts}
    best = min(starts, key=lambda plan: losses[plan])
    while len(losses) < PLANS_TRIED:
        near = list_neighbours(best, n_layers, protect)
        candidates = [
            p
            for p in near
            if p not in losses and keeps_pattern(layer_types, p) and keeps_one(keep_one_of, p)
        ]
        if not candidates:
            break
        candidate = min(candidates, key=lambda plan: plan_price(plan, prices))
        losses[candidate] = loss_of(candidate)
        progress.status(f"plan {len(losses)} of {PLANS_TRIED}: loss {min(losses.values()):.3f}")
        if losses[candidate] < losses[best]:
            best = candidate
    return best, losses


def plan_loss(
    view: DecoderView,
    batches: CalibrationBatches,
    dense: ResidualStream,
    writers: LayerWriters,
    dropped: LayerSet,
) -> float:
    """Held-out cross-entropy of the plan after a refit at its cuts, in nats."""
    plan = PruningPlan(view.name, view.n_layers, dropped, "priced-cuts")
    own = view.ranks.share_batches(batches)
    held_out = mask_held_out_rows(batches, HELD_OUT_EVERY, view.ranks)
    sequences = held_out[:: batches.seq_len].nonzero().squeeze(1)
    # Behind the last cut nothing is fitted any more: only what is held out goes on.
    behind = refit_cuts(view, plan, own, held_out, dense, writers)
    stream = behind.take_sequences(sequences)
    stream.advance_to(view.n_layers)
    return mean(stream.losses(own.input_ids[sequences]), view.ranks)


def list_neighbours(plan: LayerSet, n_layers: int, protect: frozenset[int]) -> list[LayerSet]:
    """Plans that drop one other layer instead of one of these."""
    dropped = set(plan)
    free = [layer for layer in range(n_layers) if layer not in dropped | protect]
    return [tuple(sorted(dropped - {out} | {new})) for out in plan for new in free]


def plan_price(plan: LayerSet, prices: Prices) -> float:
    """The sum of a plan's prices; a cut too long to be priced counts as its parts."""
    cuts = PruningPlan("", max(plan) + 1, plan, "").cuts
    parts = [
        (first + done, min(LONGEST_CUT, length - done))
        for first, length in cuts
        for done in range(0, length, LONGEST_CUT)
    ]
    return sum(prices.get(part, float("inf")) for part in parts)
