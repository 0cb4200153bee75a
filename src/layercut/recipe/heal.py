"""The recipe's section ``heal``; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from layercut.recipe.base import Config, Count, Name, Names, Positive, SequenceLength
from layercut.recipe.finetune import AdapterConfig, Share


class HealAdapterConfig(AdapterConfig):
    """Adapters on every linear sub-layer of every layer, folded in at the end."""

    rank: Count = Field(default=16, description="rank of the adapters")


class HealConfig(Config):
    """Distillation of the pruned model from the dense one on plain text, for a short budget."""

    minutes: Positive | None = Field(
        default=None, description="wall-clock budget, evaluations included; or give steps"
    )
    steps: Count | None = Field(default=None, description="optimiser steps; or give minutes")
    data: Name | Names | None = Field(
        default=None,
        description="text as in calibration.data; null: that text, without the windows used there",
    )
    text_column: Name | None = Field(
        default=None, description="the column that holds the text; null: calibration.text_column"
    )
    max_tokens: SequenceLength = Field(
        default=2_000_000, description="tokens of the text that are used, from its start"
    )
    seq_len: SequenceLength = Field(default=256, description="tokens per window")
    batch_size: Count = Field(default=4, description="windows behind one optimiser step")
    learning_rate: Positive = Field(default=1e-3, description="peak")
    warmup_ratio: Share = Field(
        default=0.03, description="share of the budget over which the learning rate rises"
    )
    scheduler: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="linear, cosine or constant after the warm-up"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="of AdamW")
    lora: HealAdapterConfig = Field(
        default_factory=HealAdapterConfig, description="adapters on every linear sub-layer"
    )
    temperature: Positive = Field(
        default=1.0, description="softens both distributions; the term is scaled by its square"
    )
    label_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="share of the loss that is the text's own next token"
    )
    held_out: Count = Field(default=8, description="windows that measure and never train")
    evaluations: Count = Field(
        default=8, description="times that they measure, evenly over the budget"
    )
    patience: Count = Field(
        default=3, description="evaluations without a better one after which training stops"
    )
    save_steps: Count | None = Field(
        default=50, description="steps between checkpoints to resume from; null: none"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        default=None, description="of windows, their order and adapters; null: the recipe's seed"
    )

    @classmethod
    def example(cls) -> Self:
        """A quarter of an hour."""
        return cls(minutes=15)

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, data: Any) -> Any:
        keys = [key for key in ("minutes", "steps") if isinstance(data, Mapping) and data.get(key)]
        if isinstance(data, Mapping) and len(keys) != 1:
            what = "minutes and steps are set together" if keys else "neither is set"
            raise ValueError(f"{what}; give either minutes or steps")
        return data
