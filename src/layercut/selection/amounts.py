"""Sizes that are not counted in layers: a share of the parameters, or what fits into a memory.

Both are one question: every layer is worth so much, and a plan must be worth at least what is
needed. Layers may be worth unequal amounts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layercut.checkpoints.preflight import check_folder
from layercut.errors import PlanError, RecipeError
from layercut.models.check_method import draw_probe_ids, require_resident

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

GIGABYTE = 1e9
TOLERANCE = 0.02
"""A plan that is worth more than is needed by this part of the whole is told."""
PROBE_LENGTHS = (8, 16)


@dataclass(frozen=True, slots=True)
class Amount:
    """How much must go.

    Attributes:
        key: of the recipe, for messages.
        worth: of every layer.
        needed: what the dropped ones must be worth together.
        whole: what the model is worth.
    """

    key: str
    worth: tuple[float, ...]
    needed: float
    whole: float

    def of(self, layers: Sequence[int]) -> float:
        """What these layers are worth."""
        return sum(self.worth[layer] for layer in layers)

    def range_of_sizes(self, droppable: Sequence[int], most: int) -> range:
        """Numbers of layers that may be worth what is needed, from the largest ones on.

        Args:
            droppable: the layers that may go.
            most: how many may go.

        Raises:
            PlanError: all that may go is worth too little.
        """
        ranked = sorted((self.worth[layer] for layer in droppable), reverse=True)
        least = next((n for n in range(1, most + 1) if sum(ranked[:n]) >= self.needed), None)
        if least is None:
            share, wanted = sum(ranked[:most]) / self.whole, self.needed / self.whole
            raise PlanError(
                f"{self.key} asks for {wanted:.1%} of the model, but the {most} layers that may "
                f"go at most are {share:.1%} of it. Ask for less, or protect fewer layers."
            )
        ascending = ranked[::-1]
        enough = (n for n in range(least, most + 1) if sum(ascending[:n]) >= self.needed)
        return range(least, next(enough, most) + 1)

    def tell(self, dropped: Sequence[int]) -> None:
        """Warn of a plan that is worth much more than was asked for."""
        found, wanted = self.of(dropped) / self.whole, self.needed / self.whole
        if found - wanted > TOLERANCE:
            warnings.warn(
                f"{self.key} asks for {wanted:.1%} of the model, and the {len(dropped)} layers "
                f"that go are {found:.1%} of it: whole layers come no closer.",
                stacklevel=2,
            )


def count_parameters(view: DecoderView, share: float) -> Amount:
    """A share of all parameters; tied ones count once.

    Args:
        view: the model.
        share: ``selection.drop_parameters``, between 0 and 1.
    """
    sizes = tuple(float(sum(p.numel() for p in layer.parameters())) for layer in view.layers)
    whole = float(view.n_parameters)
    return Amount("selection.drop_parameters", sizes, share * whole, whole)


def count_memory(view: DecoderView, *, gb: float, context: int, batch: int) -> Amount:
    """What must go so that weights and the key-value cache fit.

    Weights count as they are stored. The cache of every layer is measured on the model at two short
    lengths: what grows between them grows on up to ``context``, or to the layer's window. It has 16
    bits for each number, or 32 where the weights do.

    Args:
        view: the model.
        gb: the memory, in billions of bytes.
        context: tokens of every sequence.
        batch: sequences at once.

    Raises:
        PlanError: the model fits as it is.
        RecipeError: the model is read from files; or its cache cannot be measured.
    """
    key = "selection.fit_memory"
    require_resident(view, key)
    layout, stored = check_folder(view.path)
    sizes = [0.0] * view.n_layers
    for name, tensor in stored.items():
        if (number := layout.stored_number(name)) is not None and number < view.n_layers:
            sizes[number] += tensor.nbytes
    weights = sum(tensor.nbytes for tensor in stored.values())
    item = 4 if weights > 3 * view.n_parameters else 2
    caches = [item * n for n in measure_caches(view, context)]
    worth = tuple(size + batch * cache for size, cache in zip(sizes, caches, strict=True))
    whole = weights + batch * sum(caches)
    needed = whole - gb * GIGABYTE
    if needed <= 0:
        raise PlanError(
            f"{key} allows {gb:g} GB, and the model with its cache takes "
            f"{whole / GIGABYTE:.2f} GB: no layer needs to go. Ask for less memory, or for a "
            "number of layers."
        )
    return Amount(key, worth, needed, whole)


@torch.no_grad()
def measure_caches(view: DecoderView, context: int) -> list[float]:
    """Numbers that every layer caches of one sequence of ``context`` tokens.

    Raises:
        RecipeError: the model's cache is not one entry for each layer.
    """
    found: list[list[tuple[float, int | None]]] = []
    for length in PROBE_LENGTHS:
        ids = draw_probe_ids(view, 1, length).to(view.device)
        output = view.model(input_ids=ids, use_cache=True)
        cache = output.get("past_key_values", output.get("cache_params"))
        entries = list(getattr(cache, "layers", ()))
        if len(entries) != view.n_layers:
            raise RecipeError(
                f"selection.fit_memory cannot measure the cache of this {view.layout.model_type} "
                "model. Use drop_parameters or drop_layers."
            )
        found.append([(_count_entry(entry), _window(entry)) for entry in entries])
    short, long = PROBE_LENGTHS
    sizes = []
    for (small, _), (large, window) in zip(*found, strict=True):
        each = (large - small) / (long - short)
        tokens = context if window is None else min(context, window)
        sizes.append(small + each * (max(tokens, short) - short))
    return sizes


def _count_entry(entry: Any) -> float:
    """All tensors that one layer's entry holds."""
    held: dict[int, Tensor] = {}
    for value in vars(entry).values():
        parts = value.values() if isinstance(value, Mapping) else [value]
        held |= {id(part): part for part in parts if isinstance(part, Tensor)}
    return float(sum(part.numel() for part in held.values()))


def _window(entry: Any) -> int | None:
    """Tokens that the entry keeps at most."""
    window = getattr(entry, "sliding_window", None)
    return int(window) if isinstance(window, int) and window > 0 else None
