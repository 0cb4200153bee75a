"""What a comparison depends on, checked before anything is loaded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from layercut.comparison.entries import DEFAULT, parse_methods
from layercut.errors import RecipeError
from layercut.recipe.base import Config, Count, Name
from layercut.recipe.evaluation import EvaluationConfig
from layercut.recipe.heal import HealConfig
from layercut.recipe.recipe import CalibrationConfig, Device


def _check_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    try:
        parse_methods(names)
    except RecipeError as error:
        raise ValueError(str(error)) from None
    return names


def _sort_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(sizes)))


Sizes = Annotated[tuple[Count, ...], Field(strict=False, min_length=1), AfterValidator(_sort_sizes)]
Methods = Annotated[
    tuple[Name, ...], Field(strict=False, min_length=1), AfterValidator(_check_methods)
]


class ComparisonConfig(Config):
    """One model and text, sizes, and the methods that compete."""

    model: Name = Field(description="a local folder, a Hub name, or embedded:smollm2-135m")
    revision: Name | None = Field(default=None, description="branch, tag or commit on the Hub")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=0, description="of every choice")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(default="auto")
    device: Device = Field(default="auto")
    calibration: CalibrationConfig = Field(default_factory=CalibrationConfig)
    drop_layers: Sizes = Field(default=(3, 6, 9, 12), description="the sizes to compare at")
    methods: Methods = Field(
        default=DEFAULT, description="presets, SCORE+RECOVERY pairs, published, or all"
    )
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    layer_losses: bool = Field(
        default=True, description="also measure the loss without each layer, one pass each"
    )
    heal: HealConfig | None = Field(
        default=None, description="distil entries from the dense model, for a short time"
    )
    heal_methods: Methods | None = Field(
        default=None, description="the entries that are healed as well; null: all of them"
    )
    speed: bool = Field(default=False, description="measure tokens per second")

    @model_validator(mode="after")
    def _check_heal_methods(self) -> Self:
        if self.heal_methods is None:
            return self
        if self.heal is None:
            raise ValueError("heal_methods names who is healed, but heal has no minutes or steps")
        pairs = {entry.pair for entry in parse_methods(self.methods)}
        absent = [e.name for e in parse_methods(self.heal_methods) if e.pair not in pairs]
        if absent:
            raise ValueError(f"heal_methods: {', '.join(absent)} is not among the methods; add it")
        return self
