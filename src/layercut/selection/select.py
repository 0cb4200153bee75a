"""Which layers go: strategies that turn scores into a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from layercut import registry
from layercut.checkpoints.layer_types import LayerTypes
from layercut.engine.journal import NO_JOURNAL, Journal
from layercut.errors import PlanError, RecipeError
from layercut.models.droppable import check_dropped, layers_to_keep
from layercut.recipe.selection import DEFAULT_DROP_LAYERS
from layercut.registry import MethodCall, Rounds
from layercut.scoring.score import score_layers
from layercut.selection.amounts import Amount, count_memory, count_parameters
from layercut.selection.bounds import (
    check_count,
    check_indices,
    check_request,
    most_droppable,
)
from layercut.selection.pattern import pattern_to_keep
from layercut.types import CalibrationBatches, Evidence, LayerScores, LayerSet, PruningPlan

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

Scorer = Callable[["DecoderView", CalibrationBatches, MethodCall], LayerScores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a strategy chooses by, once all that can be refused early has been.

    Attributes:
        scoring: the scoring method with its options.
        strategy: a file of ``layercut/selection/methods``.
        rounds: score once, or again after every dropped layer.
        n_drop: layers that go, or that may at most where the size is searched.
        drop: exactly these layers go, and nothing is scored.
        protect: layers that must stay.
        keep_one_of: layers of which at least one must stay; empty where there is no such need.
        layer_types: the pattern that kept layers must follow, if there is one to preserve.
        scorer: computes scores; `layercut.scoring.score.score_layers`, or one that remembers.
        journal: where a strategy records what takes long.
        amount: what the dropped layers must be worth, where that is asked for instead of
            ``n_drop``.
        sizes: numbers of layers that may be worth it; ``n_drop`` is the last one.
    """

    scoring: MethodCall
    strategy: str = "lowest"
    rounds: Rounds = "one-shot"
    n_drop: int = DEFAULT_DROP_LAYERS
    drop: LayerSet | None = None
    protect: frozenset[int] = frozenset()
    keep_one_of: frozenset[int] = frozenset()
    layer_types: LayerTypes | None = None
    scorer: Scorer = score_layers
    journal: Journal = NO_JOURNAL
    amount: Amount | None = None
    sizes: range = range(0)


PlanOfSize = Callable[[int], tuple[PruningPlan, Evidence]]
"""Layers to drop → the plan of that size; what all sizes share is computed once."""


def resolve_request(
    view: DecoderView,
    *,
    scoring: MethodCall,
    strategy: str = "priced-cuts",
    rounds: Rounds = "one-shot",
    drop_layers: int | None = None,
    drop_fraction: float | None = None,
    drop: Sequence[int] | None = None,
    drop_parameters: float | None = None,
    fit_memory: Mapping[str, Any] | None = None,
    protect: Sequence[int] = (),
    preserve_pattern: bool = False,
    search_size: bool = False,
    recovery: MethodCall | None = None,
    scorer: Scorer = score_layers,
) -> Request:
    """All that selection is asked, with the layers that the family and the recovery need.

    Args:
        view: the model.
        scoring: the scoring method with its options.
        strategy: a file of ``layercut/selection/methods``.
        rounds: how decisions are made.
        drop_layers: how many layers go (default 6 when nothing else is given).
        drop_fraction: or which share of them, rounded to the nearest number.
        drop: or exactly which ones.
        drop_parameters: or which share of all parameters goes, at least.
        fit_memory: or ``gb``, ``context`` and ``batch`` that weights and cache must fit into.
        protect: layers that must stay.
        preserve_pattern: whether kept layers must be of the type that their new place has.
        search_size: whether the number is to be found, instead of given.
        recovery: what repairs the kept layers, if that is known.
        scorer: computes scores.

    Raises:
        RecipeError: unknown strategy, or settings that do not go together.
        PlanError: the request cannot be met by this model.
        ModelError: the family pins a layer that is named, or cannot express the kept ones.
    """
    check_scoring(strategy, scoring.name)
    kept = set(protect)
    if recovery is not None and recovery.method.needs_previous_layer:
        if 0 in (drop or ()):
            raise PlanError(
                f"recovery {recovery.name} needs a kept layer before every cut, but "
                "selection.drop names layer 0. Keep it, or set recovery.method: none."
            )
        kept.add(0)
    check_indices(view.n_layers, drop or (), protect)
    if drop is None:
        kept |= set(layers_to_keep(view))
    one_of = view.layout.keep_one_of if not view.layout.keep_one_of & kept else frozenset()
    amount, sizes = None, range(0)
    if drop_parameters is not None:
        amount = count_parameters(view, drop_parameters)
    elif fit_memory is not None:
        amount = count_memory(view, **fit_memory)
    n_drop = check_request(
        view.n_layers,
        drop_layers=1 if search_size or amount else drop_layers,
        drop_fraction=drop_fraction,
        drop=drop,
        protect=sorted(kept),
    )
    n_kept = len(kept) + bool(one_of)
    if search_size:
        n_drop = most_droppable(view.n_layers, n_kept)
    if amount is not None:
        free = [layer for layer in range(view.n_layers) if layer not in kept]
        sizes = amount.range_of_sizes(free, most_droppable(view.n_layers, n_kept))
        n_drop = sizes[-1]
    if drop is None:
        check_count(n_drop, view.n_layers, n_kept)
    if drop is not None:
        check_dropped(view, drop)
    layer_types = None
    if preserve_pattern:
        layer_types = pattern_to_keep(
            view,
            None if search_size or amount else n_drop,
            drop=drop,
            protect=sorted(kept),
            rounds=rounds,
        )
    return Request(
        scoring=scoring,
        strategy=strategy,
        rounds=rounds,
        n_drop=n_drop,
        drop=None if drop is None else tuple(sorted(drop)),
        protect=frozenset(kept),
        keep_one_of=one_of,
        layer_types=layer_types,
        scorer=scorer,
        amount=amount,
        sizes=sizes,
    )


def plan_sizes(view: DecoderView, batches: CalibrationBatches, request: Request) -> PlanOfSize:
    """What chooses plans of any size on this model and text, by the request's strategy.

    Raises:
        ModelError: the model's layers cannot be scored.
    """
    plan = registry.resolve("selection", request.strategy).function
    return cast(PlanOfSize, plan(view, batches, request))


def choose_layers(
    view: DecoderView, batches: CalibrationBatches, request: Request
) -> tuple[PruningPlan, Evidence]:
    """The plan that a resolved request asks for; the model is unchanged afterwards.

    Raises:
        PlanError: no plan of this size meets the request.
        ModelError: the family cannot express the kept layers.
    """
    if request.drop is not None:
        plan = PruningPlan(
            model=view.name, n_layers=view.n_layers, dropped=request.drop, method="given"
        )
        return plan, Evidence(scores=())
    plan_size = plan_sizes(view, batches, request)
    if request.amount is not None:
        return _choose_amount(view, request.amount, request.sizes, plan_size)
    plan, evidence = plan_size(request.n_drop)
    check_dropped(view, plan.dropped)
    return plan, evidence


def _choose_amount(
    view: DecoderView, amount: Amount, sizes: range, plan_size: PlanOfSize
) -> tuple[PruningPlan, Evidence]:
    """The plan with the fewest layers that are worth what is needed.

    Raises:
        PlanError: none is.
    """
    refusal: PlanError | None = None
    for n_drop in sizes:
        try:
            plan, evidence = plan_size(n_drop)
        except PlanError as error:  # a pattern may leave out a size
            refusal = error
            continue
        if amount.of(plan.dropped) >= amount.needed:
            check_dropped(view, plan.dropped)
            amount.tell(plan.dropped)
            return plan, evidence
    raise refusal or PlanError(
        f"{amount.key}: no plan of up to {sizes[-1]} layers that the strategy chooses is "
        "worth as much. Ask for less, or for a number of layers."
    )


def select(
    view: DecoderView,
    batches: CalibrationBatches,
    *,
    strategy: str = "priced-cuts",
    scoring: str = "residual-sensitivity",
    scoring_options: Mapping[str, Any] | None = None,
    rounds: Rounds = "one-shot",
    drop_layers: int | None = None,
    drop_fraction: float | None = None,
    drop: Sequence[int] | None = None,
    drop_parameters: float | None = None,
    fit_memory: Mapping[str, Any] | None = None,
    protect: Sequence[int] = (),
    preserve_pattern: bool = False,
) -> tuple[PruningPlan, Evidence]:
    """Choose the layers to drop; the model is unchanged afterwards.

    Args:
        view: the model.
        batches: calibration text.
        strategy: a file of ``layercut/selection/methods``.
        scoring: a file of ``layercut/scoring/methods``; priced-cuts needs residual-sensitivity,
            block angular-distance.
        scoring_options: that method's own options.
        rounds: ``one-shot``, or ``each`` to score again after every dropped layer.
        drop_layers: how many layers go (default 6 when nothing else is given).
        drop_fraction: or which share of them, rounded to the nearest number.
        drop: or exactly which ones; nothing is scored then.
        drop_parameters: or which share of all parameters goes, at least.
        fit_memory: or ``gb``, ``context`` and ``batch`` that weights and cache must fit into.
        protect: layers that must stay.
        preserve_pattern: drop only layers after which every kept one is of the type that engines
            expect in its new place.

    Raises:
        RecipeError: unknown strategy or score, or settings that do not go together.
        PlanError: the request cannot be met by this model.
        ModelError: the family pins a layer that is named, or cannot express the kept ones.
    """
    request = resolve_request(
        view,
        scoring=registry.resolve("scoring", scoring, dict(scoring_options or {})),
        strategy=strategy,
        rounds=rounds,
        drop_layers=drop_layers,
        drop_fraction=drop_fraction,
        drop=drop,
        drop_parameters=drop_parameters,
        fit_memory=fit_memory,
        protect=protect,
        preserve_pattern=preserve_pattern,
    )
    return choose_layers(view, batches, request)


def check_scoring(strategy: str, scoring: str) -> None:
    """Refuse a strategy with a score that it cannot use.

    Raises:
        RecipeError: unknown strategy, or one that needs another score.
    """
    needed = registry.describe("selection", strategy).needs_scoring or scoring
    if scoring != needed:
        raise RecipeError(
            f"selection.strategy {strategy} needs scoring.method {needed}, not {scoring}. "
            f"Set selection.strategy: lowest to use {scoring}."
        )
