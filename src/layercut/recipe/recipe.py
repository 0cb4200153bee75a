"""YAML → a validated, frozen `Recipe`.

Precedence: ``--set`` over environment (``LAYERCUT__A__B``) over recipe over default. Every problem
is reported at once. A method's own options are checked where its file is loaded, because that
needs torch and this file does not.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from layercut.recipe import overrides as overrides_
from layercut.recipe import strict_yaml
from layercut.recipe.base import Config, Count, Name, Names, Positive, SequenceLength
from layercut.recipe.evaluation import EvaluationConfig
from layercut.recipe.finetune import FinetuneConfig
from layercut.recipe.heal import HealConfig
from layercut.recipe.known import known
from layercut.recipe.selection import (
    AMOUNTS,
    SelectionConfig,
    describe_conflict,
    list_amounts,
)
from layercut.recipe.validation import validate
from layercut.registry import check_files

EFFORT_MINUTES = {"quick": 2.0, "standard": 20.0, "thorough": 60.0}
"""What a run with this effort may take in all."""


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|(cuda|mps|xpu)(:[0-9]+)?", name):
        raise ValueError(f"unknown device '{name}' (known: auto, cpu, cuda, cuda:1, mps, xpu)")
    return name


Device = Annotated[str, AfterValidator(_device)]
Options = dict[str, Any]


class CalibrationConfig(Config):
    """The text that scores and repairs are computed on."""

    data: Name | Names = Field(
        default="embedded:docs",
        description="embedded:docs, embedded:reviews@train, a .txt, .raw, .jsonl, .csv or .parquet "
        "file (each also .gz), hub:owner/name[:config][@split], or rows: before a source of task "
        "rows, read as prompts with their right answers; a list draws equally from each",
    )
    text_column: Name = Field(
        default="text", description="the column of a table that holds the text"
    )
    n_sequences: Count = Field(default=48, description="packed windows drawn from the text")
    seq_len: SequenceLength = Field(default=256, description="tokens per window")
    gradient_batch: Count = Field(
        default=8, description="sequences whose gradient is one term of a gradient score"
    )
    micro_batch: Count | Literal["auto"] = Field(
        default="auto",
        description="sequences in memory at once; never changes a result beyond rounding",
    )

    @model_validator(mode="after")
    def _one_sequence_of_each_text(self) -> CalibrationConfig:
        if not isinstance(self.data, str) and self.n_sequences < len(self.data):
            raise ValueError(
                f"n_sequences is {self.n_sequences}, but data names {len(self.data)} texts; "
                "draw at least one window of each"
            )
        return self


class ScoringConfig(Config):
    """How layers are scored."""

    method: Annotated[str, known("scoring")] = Field(
        default="residual-sensitivity",
        description="a file of layercut/scoring/methods, with - for _",
    )
    options: Options = Field(default={}, description="that method's own options")


class RecoveryConfig(Config):
    """How kept weights make up for the dropped layers."""

    method: Annotated[str, known("recovery")] = Field(
        default="refit", description="a file of layercut/recovery/methods, with - for _"
    )
    options: Options = Field(default={}, description="that method's own options")


class Recipe(Config):
    """Everything a run depends on."""

    model: Name = Field(
        description="a local folder, a Hub name (owner/name), or embedded:smollm2-135m"
    )
    revision: Name | None = Field(
        default=None,
        description="branch, tag or commit of a Hub model; pinned to a commit at start",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="seed of every random choice"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto, float32 or bfloat16: how weights are loaded and computed"
    )
    device: Device = Field(default="auto", description="auto, cpu, cuda, cuda:1, mps or xpu")
    effort: Literal["quick", "standard", "thorough"] | None = Field(
        default=None,
        description="2, 20 or 60 minutes in all: the amount of text and of gradient steps is what "
        "this machine does in that time; null: as the other keys say",
    )
    minutes: Positive | None = Field(
        default=None, description="the same for any time; or give effort"
    )
    residency: Literal["auto", "resident", "streamed"] = Field(
        default="auto",
        description="resident: all weights in memory; streamed: one layer at a time, read from its "
        "file; auto: streamed where they do not fit",
    )
    calibration: CalibrationConfig = Field(
        default_factory=CalibrationConfig, description="the text that scores and repairs use"
    )
    scoring: ScoringConfig = Field(
        default_factory=ScoringConfig, description="how layers are scored; higher = keep"
    )
    selection: SelectionConfig = Field(
        default_factory=SelectionConfig, description="which layers go"
    )
    recovery: RecoveryConfig = Field(
        default_factory=RecoveryConfig, description="how kept weights make up for dropped layers"
    )
    heal: HealConfig | None = Field(
        default=None,
        description="short distillation from the dense model after the cut; null: none",
    )
    finetune: FinetuneConfig | None = Field(
        default=None, description="LoRA or full fine-tuning after the cut; null: none"
    )
    evaluation: EvaluationConfig = Field(
        default_factory=EvaluationConfig, description="what is measured before and after"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Recipe:
        if self.effort is not None and self.minutes is not None:
            raise ValueError("effort and minutes are set together; keep one")
        return self

    @field_validator("model")
    @classmethod
    def _no_parent_in_hub_name(cls, name: str) -> str:
        if ".." in name and not name.startswith((".", "/", "~")):
            raise ValueError(f"'..' inside '{name}'; write a local folder as ./… or from /")
        return name

    def to_yaml(self) -> str:
        """The resolved recipe, in the order of the documentation; `load_recipe` reads it back."""
        return strict_yaml.dump(self.model_dump(mode="json"))


def load_recipe(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Recipe:
    """The recipe with its overrides and defaults.

    Args:
        source: a YAML file, or its content as nested mappings.
        overrides: ``a.b=c``, the value in YAML; an amount replaces the recipe's other amounts.
        environ: where ``LAYERCUT__A__B`` variables are looked up; default: the process's own.

    Raises:
        RecipeError: the file or a value cannot be used; lists every problem with its key path.
    """
    check_files()
    name = "recipe" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping):
        data = copy.deepcopy(dict(source))
    else:
        data = strict_yaml.load_file(Path(source))
    variables = os.environ if environ is None else environ
    settings, problems = overrides_.from_environment(variables)
    origins = overrides_.merge(data, settings, alternatives=("selection", AMOUNTS))
    settings, more_problems = overrides_.from_flags(overrides)
    origins |= overrides_.merge(data, settings, alternatives=("selection", AMOUNTS))
    problems += more_problems
    # pydantic looks at this only when every other key of the section is right.
    amounts = list_amounts(data.get("selection"))
    if len(amounts) > 1:
        problems.append(f"selection: {describe_conflict(amounts)}")
    return validate(Recipe, data, name, origins=origins, problems=problems)
