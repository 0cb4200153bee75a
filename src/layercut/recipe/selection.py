"""The recipe's section ``selection``; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from layercut.recipe.base import Config, Count, Positive
from layercut.recipe.known import known

AMOUNTS = (
    "drop_layers",
    "drop_fraction",
    "drop",
    "drop_parameters",
    "fit_memory",
    "max_perplexity_ratio",
)
"""The spellings of one setting: how much goes. At most one is given."""

DEFAULT_DROP_LAYERS = 6


def _distinct(layers: tuple[int, ...]) -> tuple[int, ...]:
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise ValueError(f"names layer {twice[0]} twice")
    return layers


# strict=False: YAML has lists, not tuples; the items stay strict.
Layers = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False), AfterValidator(_distinct)
]


class MemoryConfig(Config):
    """A memory that the pruned model is to be served in; its weights as they are loaded."""

    gb: Positive = Field(description="billions of bytes for weights and key-value cache")
    context: Count = Field(default=8192, description="tokens of every sequence")
    batch: Count = Field(default=1, description="sequences at once")

    @classmethod
    def example(cls) -> MemoryConfig:
        """A card of 16 GB, with some room for activations."""
        return cls(gb=14.0)


class SelectionConfig(Config):
    """Which layers go, given their scores."""

    strategy: Annotated[str, known("selection")] = Field(
        default="priced-cuts",
        description="how scores become a plan: a file of layercut/selection/methods",
    )
    drop_layers: Count | None = Field(
        default=None,
        description="how many layers go; or give one of drop_fraction and drop instead",
    )
    drop_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="the part of all layers that goes, between 0 and 1"
    )
    drop: Annotated[Layers, Field(min_length=1)] | None = Field(
        default=None, description="exactly these layers go, counted from 0 at the embedding"
    )
    drop_parameters: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="the part of all parameters that goes, at least"
    )
    fit_memory: MemoryConfig | None = Field(
        default=None,
        description="as many go as let weights and key-value cache fit",
    )
    max_perplexity_ratio: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="as many go as keep held-out perplexity within this multiple of the dense one",
    )
    rounds: Literal["one-shot", "each"] = Field(
        default="one-shot", description="one-shot, or each: score again after every dropped layer"
    )
    protect: Layers = Field(default=(), description="layers that stay whatever their score")
    preserve_pattern: bool = Field(
        default=False,
        description="drop only such layers that engines which count layer types still run it right",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_amount(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and not list_amounts(data):
            return {**data, "drop_layers": DEFAULT_DROP_LAYERS}
        return data

    @model_validator(mode="after")
    def _one_amount(self) -> SelectionConfig:
        amounts = list_amounts(self.__dict__)
        if len(amounts) > 1:
            raise ValueError(describe_conflict(amounts))
        return self


def list_amounts(selection: Any) -> list[str]:
    """The spellings of "how much goes" that a selection section sets."""
    if not isinstance(selection, Mapping):
        return []
    return [key for key in AMOUNTS if selection.get(key) is not None]


def describe_conflict(amounts: Sequence[str]) -> str:
    """What to say when ``given`` amounts are set together."""
    return f"{' and '.join(amounts)} are set together; keep one"
