"""How many layers a request may drop, and which: everything that numbers alone decide."""

from __future__ import annotations

from collections.abc import Sequence

from layercut.errors import PlanError
from layercut.recipe.selection import DEFAULT_DROP_LAYERS


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
    check_indices(n_layers, drop or (), protect)
    if drop is not None:
        n_drop = len(drop)
    elif drop_fraction is not None:
        n_drop = round(drop_fraction * n_layers)
    else:
        n_drop = DEFAULT_DROP_LAYERS if drop_layers is None else drop_layers
    check_count(n_drop, n_layers, len(protect))
    return n_drop


def check_indices(n_layers: int, drop: Sequence[int], protect: Sequence[int]) -> None:
    """Refuse layers that do not exist, stand twice, or are to go and to stay.

    Raises:
        PlanError: names the first of them.
    """
    for name, layers in (("drop", drop), ("protect", protect)):
        outside = [i for i in layers if not 0 <= i < n_layers]
        if outside:
            raise PlanError(
                f"selection.{name} names layer {outside[0]}, but the model's layers are "
                f"0 to {n_layers - 1}."
            )
        if len(set(layers)) != len(layers):
            twice = next(i for i in layers if list(layers).count(i) > 1)
            raise PlanError(f"selection.{name} names layer {twice} twice. Name each layer once.")
    both = sorted(set(drop) & set(protect))
    if both:
        raise PlanError(f"layer {both[0]} is to be dropped and protected. Choose one.")


def check_count(n_drop: int, n_layers: int, n_protected: int) -> None:
    """Refuse a number of layers that cannot go.

    Raises:
        PlanError: none, or too many.
    """
    least, most = least_kept(n_layers), most_droppable(n_layers, n_protected)
    if n_drop < 1:
        raise PlanError(
            f"cannot drop {n_drop} of {n_layers} layers: nothing would change. "
            "Ask for at least one."
        )
    if n_drop > most:
        raise PlanError(
            f"cannot drop {n_drop} of {n_layers} layers: {n_protected} are protected and "
            f"min_keep={least} allows {most}. Lower drop_layers."
        )


def least_kept(n_layers: int) -> int:
    """A quarter of the layers, rounded up: a request to keep fewer is refused as a mistake."""
    return max(1, -(-n_layers // 4))


def most_droppable(n_layers: int, n_protected: int) -> int:
    """The largest number of layers that any request may drop."""
    return n_layers - max(least_kept(n_layers), n_protected)
