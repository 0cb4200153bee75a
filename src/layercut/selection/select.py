"""Which layers go: strategies that turn scores into a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from layercut import registry
from layercut.checkpoints.layer_types import Kinds
from layercut.errors import PlanError, RecipeError
from layercut.models.droppable import check_dropped, fixed_layers
from layercut.selection.pattern import pattern_to_keep
from layercut.types import CalibrationBatches, Evidence, LayerScores, PruningPlan

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

Rounds = Literal["one-shot", "each"]
Scorer = Callable[..., LayerScores]
"""What is called as `layercut.scoring.score.score` is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How the user wants a strategy to choose.

    Attributes:
        protect: layers that must stay.
        scoring: scoring method.
        scoring_options: its options.
        rounds: score once, or again after every dropped layer.
        kinds: the pattern that kept layers must follow, if there is one to preserve.
        scorer: what scores the layers, where that is not `layercut.scoring.score.score` itself.
    """

    protect: frozenset[int] = frozenset()
    scoring: str = "residual-sensitivity"
    scoring_options: Mapping[str, Any] = field(default_factory=dict)
    rounds: Rounds = "one-shot"
    kinds: Kinds | None = None
    scorer: Scorer | None = None


Planner = Callable[[int], tuple[PruningPlan, Evidence]]
"""Layers to drop → the plan of that size; what all sizes share is computed once."""


def planner(
    view: DecoderView, batches: CalibrationBatches, *, strategy: str, request: Request
) -> Planner:
    """What chooses plans of any size on this model and text.

    Raises:
        RecipeError: unknown strategy or score, or two that do not go together.
    """
    check_scoring(strategy, request.scoring)
    module = registry.load_method("selection", strategy)
    made: Planner = module.planner(view, batches, request)
    return made


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
    protect: Sequence[int] = (),
    preserve_pattern: bool = False,
) -> tuple[PruningPlan, Evidence]:
    """Choose the layers to drop; the model is unchanged afterwards.

    Args:
        view: the model.
        batches: calibration text.
        strategy: a file of ``layercut/selection``.
        scoring: a file of ``layercut/scoring``; priced-cuts needs residual-sensitivity, block
            angular-distance.
        scoring_options: that method's own options.
        rounds: ``one-shot``, or ``each`` to score again after every dropped layer.
        drop_layers: how many layers go (default 6 when nothing else is given).
        drop_fraction: or which share of them, rounded to the nearest number.
        drop: or exactly which ones; nothing is scored then.
        protect: layers that must stay.
        preserve_pattern: drop only layers after which every kept one is of the kind that engines
            expect in its new place.

    Raises:
        RecipeError: unknown strategy or score, or settings that do not go together.
        PlanError: the request cannot be met by this model.
        ModelError: the family pins a layer that is named, or cannot express the kept ones.
    """
    check_scoring(strategy, scoring)
    if drop is None:
        protect = sorted({*protect, *fixed_layers(view)})
    n_drop = check_request(
        view.n_layers,
        drop_layers=drop_layers,
        drop_fraction=drop_fraction,
        drop=drop,
        protect=protect,
    )
    kinds = None
    if preserve_pattern:
        kinds = pattern_to_keep(view, n_drop, drop=drop, protect=protect, rounds=rounds)
    if drop is not None:
        check_dropped(view, drop)
        plan = PruningPlan(
            model=view.name, n_layers=view.n_layers, dropped=tuple(sorted(drop)), method="given"
        )
        return plan, Evidence(scores=())
    request = Request(
        protect=frozenset(protect),
        scoring=scoring,
        scoring_options=dict(scoring_options or {}),
        rounds=rounds,
        kinds=kinds,
    )
    plan, evidence = planner(view, batches, strategy=strategy, request=request)(n_drop)
    check_dropped(view, plan.dropped)
    return plan, evidence


def check_scoring(strategy: str, scoring: str) -> None:
    """Refuse a strategy with a score that it cannot use.

    Raises:
        RecipeError: unknown strategy, or one that needs another score.
    """
    needed = getattr(registry.load_method("selection", strategy), "NEEDS_SCORING", scoring)
    if scoring != needed:
        raise RecipeError(
            f"selection.strategy {strategy} needs scoring.method {needed}, not {scoring}. "
            f"Set selection.strategy: lowest to use {scoring}."
        )


def check_request(
    n_layers: int,
    *,
    drop_layers: int | None = None,
    drop_fraction: float | None = None,
    drop: Sequence[int] | None = None,
    protect: Sequence[int] = (),
) -> int:
    """How many layers the request drops.

    Raises:
        PlanError: an index that does not exist or stands twice, a protected layer asked to go, no
            layer or too many.
    """
    for name, layers in (("drop", drop or ()), ("protect", protect)):
        outside = [i for i in layers if not 0 <= i < n_layers]
        if outside:
            raise PlanError(
                f"selection.{name} names layer {outside[0]}, but the model's layers are "
                f"0 to {n_layers - 1}."
            )
        if len(set(layers)) != len(layers):
            twice = next(i for i in layers if list(layers).count(i) > 1)
            raise PlanError(f"selection.{name} names layer {twice} twice. Name each layer once.")
    both = sorted(set(drop or ()) & set(protect))
    if both:
        raise PlanError(f"layer {both[0]} is to be dropped and protected. Choose one.")
    if drop is not None:
        n_drop = len(drop)
    elif drop_fraction is not None:
        n_drop = round(drop_fraction * n_layers)
    else:
        n_drop = 6 if drop_layers is None else drop_layers
    _check_count(n_drop, n_layers, len(protect))
    return n_drop


def _check_count(n_drop: int, n_layers: int, n_protected: int) -> None:
    min_keep, most = min_keep_of(n_layers), most_droppable(n_layers, n_protected)
    if n_drop < 1:
        raise PlanError(
            f"cannot drop {n_drop} of {n_layers} layers: nothing would change. "
            "Ask for at least one."
        )
    if n_drop > most:
        raise PlanError(
            f"cannot drop {n_drop} of {n_layers} layers: {n_protected} are protected and "
            f"min_keep={min_keep} allows {most}. Lower drop_layers."
        )


def min_keep_of(n_layers: int) -> int:
    """A model cut below a quarter of its depth is rubble; asking for it is a slip of the hand."""
    return max(1, -(-n_layers // 4))


def most_droppable(n_layers: int, n_protected: int) -> int:
    """The largest number of layers that any request may drop."""
    return n_layers - max(min_keep_of(n_layers), n_protected)
