"""The recipe's section ``finetune``; needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from layercut.recipe.base import Config, Count, Name, Positive, SequenceLength

LEARNING_RATE = {"lora": 1e-4, "full": 1e-5}
Share = Annotated[float, Field(ge=0, lt=1)]


class AdapterFields(BaseModel):
    """Keys that LoRA has in a recipe's section and in a method's options."""

    rank: Count = Field(default=8, description="rank of the adapters")
    alpha: Positive = Field(default=32, description="their scale is alpha / rank")


class RunFields(BaseModel):
    """Keys that a fine-tuning has in the recipe and in the options of methods that begin one."""

    epochs: Positive = Field(default=3.0, description="passes over the rows")
    max_steps: Count | None = Field(
        default=None, description="optimiser steps; instead of epochs where it is given"
    )
    learning_rate: Positive | None = Field(
        default=None, description="peak; null: 1e-4 for lora, 1e-5 for full"
    )
    batch_size: Count = Field(default=8, description="rows in memory at once")
    accumulation: Count = Field(
        default=8, description="batches whose gradients are one optimiser step"
    )
    warmup_ratio: Share = Field(
        default=0.03, description="share of the steps over which the learning rate rises"
    )
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="linear, cosine, constant or constant_with_warmup"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="of AdamW")
    max_length: SequenceLength = Field(
        default=512, description="tokens of a row; a longer prompt loses its start"
    )


class AdapterConfig(AdapterFields, Config):
    """Adapters on every linear sub-layer of every layer."""

    dropout: Share = Field(default=0.0, description="dropout before the adapters")


class DistillConfig(Config):
    """A further loss term: the dense model's distribution where the labels are."""

    weight: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="share of the loss; the labels keep the rest"
    )
    temperature: Positive = Field(
        default=2.0, description="softens both distributions; the term is scaled by its square"
    )
    over: Literal["vocabulary", "choices"] = Field(
        default="vocabulary",
        description="what the distributions are over: all tokens, or the choices that all rows "
        "share, of one token each",
    )


class _Task(Config):
    """What is trained, and on what: the first keys of ``finetune``."""

    mode: Literal["lora", "full"] = Field(default="lora", description="lora or full")
    data: Name = Field(
        default="embedded:reviews@train",
        description="rows of prompt and completion, chat messages, or choices: a .jsonl, .csv or "
        ".parquet file, hub:owner/name[:config][@split], or embedded:reviews@train",
    )


class FinetuneConfig(RunFields, _Task):
    """LoRA or full fine-tuning on a task's rows, with the loss on the completion only.

    The defaults are GradPruner's (arXiv:2601.19503, released code).
    """

    lora: AdapterConfig = Field(
        default_factory=AdapterConfig, description="adapters on every linear sub-layer"
    )
    compare_dense: bool = Field(
        default=True, description="tune the dense model in the same way, too"
    )
    distill: DistillConfig | None = Field(
        default=None, description="learn from the dense model, tuned if compare_dense"
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        default="none",
        description="none, tensorboard (records in OUT/layercut/logs), wandb or trackio",
    )
    keep_adapter: bool = Field(
        default=False,
        description="also write the adapter and, of a pruned model, the checkpoint it belongs to",
    )
    save_steps: Count | None = Field(
        default=50, description="steps between checkpoints to resume from; null: none"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        default=None, description="of data order and adapters; null: the recipe's seed"
    )

    @model_validator(mode="after")
    def _adapter_needs_lora(self) -> FinetuneConfig:
        if self.keep_adapter and self.mode == "full":
            raise ValueError("keep_adapter needs mode: lora")
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate or LEARNING_RATE[self.mode]

    @property
    def rows_per_step(self) -> int:
        """Rows behind one optimiser step of one process."""
        return self.batch_size * self.accumulation
