"""What a model's fine-tuning needs of rows, configuration and tokenizer, before the long work."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from layercut.data.encoding import encode_choices, training_example
from layercut.data.tasks import TaskRow, check_classes
from layercut.errors import DataError, ModelError, RecipeError
from layercut.models.view import DecoderView
from layercut.recipe.finetune import FinetuneConfig


def check_rows(
    view: DecoderView, rows: Sequence[TaskRow], config: FinetuneConfig
) -> list[dict[str, Any]]:
    """Every row as ``input_ids``, ``labels`` and ``length``, or a refusal before the long work.

    Raises:
        DataError: too few rows, a class without rows, or a row that cannot be learnt from.
        ModelError: the tokenizer has neither a padding nor an end-of-text token.
        RecipeError: the model is too narrow, or its context too short, for the configuration.
    """
    pad_token(view)
    if config.mode == "full" and view.model.dtype != torch.float32:
        raise RecipeError(
            f"finetune.mode: full would lose its small steps in {view.model.dtype} weights. "
            "Set dtype: float32, or finetune.mode: lora."
        )
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise RecipeError(
            f"finetune.report_to: {config.report_to} is not installed. "
            f'Run: pip install "layercut[{config.report_to}]", or set it to none.'
        )
    context = view.context
    if config.max_length > context:
        raise RecipeError(
            f"finetune.max_length is {config.max_length}, but the model's context is {context} "
            "tokens. Lower it."
        )
    if len(rows) < config.rows_per_step:
        raise DataError(
            f"{len(rows)} training row(s) are fewer than one step's {config.rows_per_step} "
            f"(batch_size {config.batch_size} × accumulation {config.accumulation}). "
            "Use more rows, or lower finetune.batch_size or finetune.accumulation."
        )
    check_classes(rows)
    if config.distill is not None and config.distill.over == "choices":
        choice_tokens(rows, view.tokenizer)
    return [training_example(row, view.tokenizer, config.max_length) for row in rows]


def choice_tokens(rows: Sequence[TaskRow], tokenizer: Any) -> list[int]:
    """The token of each of the choices that all rows share.

    Raises:
        DataError: the rows have no choices, or each its own.
        RecipeError: a choice has several tokens.
    """
    choices = rows[0].choices
    other = next((row for row in rows if row.choices != choices or row.ending), None)
    if len(choices) < 2 or other is not None:
        raise DataError(
            f"{(other or rows[0]).where}: finetune.distill.over: choices needs rows that share "
            "their choices. Set it to vocabulary."
        )
    targets = [encoded.targets for encoded in encode_choices(rows[0], tokenizer)]
    for choice, tokens in zip(choices, targets, strict=True):
        if len(tokens) > 1:
            raise RecipeError(
                f"finetune.distill.over: choices needs choices of one token, but "
                f"'{choice.strip()}' has {len(tokens)}. Set it to vocabulary."
            )
    return [tokens[0] for tokens in targets]


def pad_token(view: DecoderView) -> int:
    """The token that fills short rows; the end-of-text token where there is no padding token.

    Raises:
        ModelError: the tokenizer has neither.
    """
    for token in (view.tokenizer.pad_token_id, view.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ModelError(
        f"the tokenizer of {view.name} has neither a padding nor an end-of-text token. "
        "Add a pad_token to its tokenizer_config.json."
    )
