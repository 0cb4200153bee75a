"""Patterns of unlike layers, and whether a reader that derives them by position gets them right.

Some engines do not read which layer is of which type: they count. A pruned checkpoint runs right in
them only if its kept layers follow the pattern that a fresh configuration of as many layers has.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from layercut.checkpoints.config_edit import edit_config, read_config
from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.layer_types import LayerTypes, derive_layer_types, read_layer_types
from layercut.errors import ModelError, PlanError, RecipeError

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def pattern_to_keep(
    view: DecoderView,
    n_drop: int | None,
    *,
    drop: Sequence[int] | None = None,
    protect: Sequence[int] = (),
    rounds: str = "one-shot",
) -> LayerTypes | None:
    """The types that kept layers must have in their new places; ``None`` if any layers may go.

    Args:
        view: the model.
        n_drop: how many layers are to go; ``None`` for as many as a budget allows.
        drop: or exactly which ones.
        protect: layers that must stay.
        rounds: how decisions are made.

    Raises:
        RecipeError: the settings cannot preserve a pattern.
        PlanError: no plan of this size can, or the whole model has no pattern of positions.
    """
    layer_types = _types_by_position(view)
    if layer_types is None:
        return None
    if rounds == "each" or n_drop is None:
        setting = "rounds: each" if n_drop else "max_perplexity_ratio"
        raise RecipeError(
            f"selection.{setting} cannot preserve the pattern of unlike layers, which only some "
            "numbers of layers do. Ask for drop_layers in one shot, or set preserve_pattern: false."
        )
    if drop is not None and not keeps_pattern(layer_types, drop):
        raise no_such_plan_error(n_drop, len(layer_types))
    choose_lowest_in_pattern(
        [0.0] * len(layer_types), layer_types, n_drop, frozenset(protect), view.layout.keep_one_of
    )
    return layer_types


def _types_by_position(view: DecoderView) -> LayerTypes | None:
    text = view.model.config.get_text_config(decoder=True)
    layer_types = read_layer_types(text)
    if len(set(layer_types)) <= 1:
        return None
    if derive_layer_types(text) != layer_types:
        raise PlanError(
            f"selection.preserve_pattern cannot hold: {view.name} itself has another pattern than "
            "engines derive from its number of layers. Set it to false."
        )
    # Some patterns are counts, such as Qwen2's max_window_layers, that follow any drop.
    if all(_is_derived_without(view, layer) for layer in range(view.n_layers)):
        return None
    return layer_types


def keeps_pattern(layer_types: LayerTypes | None, dropped: Sequence[int]) -> bool:
    """Whether the kept layers are of the layer_types that their new places have."""
    if layer_types is None:
        return True
    dropped_set = set(dropped)
    kept = [layer_type for layer, layer_type in enumerate(layer_types) if layer not in dropped_set]
    return kept == list(layer_types[: len(kept)])


def keeps_one(layers: Collection[int], dropped: Collection[int]) -> bool:
    """Whether a plan keeps one of ``layers``, if there are any."""
    return not layers or not set(layers) <= set(dropped)


def choose_lowest_in_pattern(
    values: Sequence[float],
    layer_types: LayerTypes,
    n_drop: int,
    protect: frozenset[int],
    keep_one_of: frozenset[int] = frozenset(),
) -> tuple[int, ...]:
    """The ``n_drop`` layers of the lowest total score whose loss keeps the pattern.

    Exact: of layers 0…l with j kept, the cheapest choice depends on nothing else.

    Raises:
        PlanError: no choice of this size keeps it, the protected layers, and one of
            ``keep_one_of``.
    """
    plan = _choose_lowest_in_pattern(values, layer_types, n_drop, protect)
    if plan is not None and not keeps_one(keep_one_of, plan[1]):
        # The best of all, whichever of these layers is the one that stays.
        plans = (
            _choose_lowest_in_pattern(values, layer_types, n_drop, protect | {layer})
            for layer in sorted(keep_one_of)
        )
        plan = min((plan for plan in plans if plan is not None), default=None)
    if plan is None:
        raise no_such_plan_error(n_drop, len(layer_types))
    return plan[1]


def _choose_lowest_in_pattern(
    values: Sequence[float], layer_types: LayerTypes, n_drop: int, protect: frozenset[int]
) -> tuple[float, tuple[int, ...]] | None:
    """The lowest total score and its layers; ``None`` if no choice of this size does."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for layer, (value, layer_type) in enumerate(zip(values, layer_types, strict=True)):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for n_dropped, (cost, dropped) in best.items():
            moves = []
            if layer_types[layer - n_dropped] == layer_type:
                moves.append((n_dropped, (cost, dropped)))
            if layer not in protect and n_dropped < n_drop:
                moves.append((n_dropped + 1, (cost + value, (*dropped, layer))))
            for n, entry in moves:
                after[n] = min(after.get(n, entry), entry)
        best = after
    return best.get(n_drop)


def no_such_plan_error(n_drop: int, n_layers: int) -> PlanError:
    """What to raise when no plan of this size keeps the pattern."""
    return PlanError(
        f"no plan drops {n_drop} of {n_layers} layers, keeps the protected ones and preserves the "
        "pattern of unlike layers. Ask for whole periods, or set selection.preserve_pattern: false."
    )


def _is_derived_without(view: DecoderView, layer: int) -> bool:
    kept = [i for i in range(view.n_layers) if i != layer]
    raw = read_json_object(view.path / "config.json")
    try:
        text = read_config(edit_config(raw, view.layout.rules, kept)).get_text_config(decoder=True)
    except ModelError:  # only whole periods can go
        return False
    return derive_layer_types(text) == read_layer_types(text)
