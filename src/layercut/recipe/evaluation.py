"""The recipe's section ``evaluation``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from layercut.recipe.base import Config, Count, Name, SequenceLength


class EvaluationConfig(Config):
    """What is measured before and after."""

    text: dict[str, Name] = Field(
        default={"speeches": "embedded:speeches"},
        description="name: source; the perplexity of each: wikitext2, ptb or c4 from the Hub, or "
        "any source that calibration.data takes but rows:",
    )
    tasks: dict[str, Name] = Field(
        default={},
        description="name: source of rows with choices or completions; the accuracy of each",
    )
    harness: Annotated[tuple[Name, ...], Field(strict=False)] = Field(
        default=(),
        description="zero-shot tasks of lm-evaluation-harness: its names, gradmap7 for GradMAP's "
        "seven, or the path of a task's .yaml file",
    )
    harness_limit: Count | None = Field(
        default=None, description="rows of each such task, from its start; null: all"
    )
    harness_batch_size: Count = Field(
        default=8, description="requests of such a task in memory at once"
    )
    seq_len: SequenceLength = Field(default=512, description="tokens per window")
    max_tokens: SequenceLength = Field(
        default=8192, description="tokens of each text that are used, from its start"
    )
    detokenize: bool | Literal["auto"] = Field(
        default="auto",
        description="undo WikiText's and PTB's markers; auto: in .raw files, wikitext2 and ptb",
    )
