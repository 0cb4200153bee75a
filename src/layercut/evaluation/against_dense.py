"""A model's predictions and continuations beside those of the one that it was pruned from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from layercut import progress
from layercut.checkpoints.hf_calls import guard
from layercut.data.calibration import evaluation_windows
from layercut.errors import DataError, ModelError
from layercut.evaluation.fidelity import DenseReference, check_same_outputs, compare_to_dense
from layercut.evaluation.generation import NEW_TOKENS, choose_prompts, generation_check
from layercut.models.check_method import require_resident

if TYPE_CHECKING:
    from layercut.models.view import DecoderView
    from layercut.results import Evaluation


def check_comparable(view: DecoderView, dense: DecoderView) -> None:
    """Refuse to compare models of different vocabularies, before any compute.

    Raises:
        ModelError: they predict different tokens.
        RecipeError: the layers of one are read from their files.
    """
    for one in (view, dense):
        require_resident(one, "a comparison with the dense model")
    heads = [v.model.get_output_embeddings() for v in (view, dense)]
    if all(head is not None for head in heads):
        check_same_outputs(*(int(head.weight.shape[0]) for head in heads))
    with guard("a tokenizer cannot list its tokens", ModelError, "Use the model's own."):
        vocabularies = [v.tokenizer.get_vocab() for v in (view, dense)]
    if vocabularies[0] != vocabularies[1]:
        raise ModelError(
            f"the tokenizers of {view.name} and {dense.name} have different vocabularies. "
            "Compare a pruned model with the one it was pruned from."
        )


def measure_beside(
    evaluation: Evaluation,
    view: DecoderView,
    dense: DecoderView,
    *,
    text: Mapping[str, str],
    seq_len: int = 512,
    max_tokens: int = 8192,
    detokenize: bool | Literal["auto"] = "auto",
) -> Evaluation:
    """``evaluation`` of ``view``, with fidelity to ``dense`` and a generation check on each text.

    Args:
        evaluation: what `evaluate` has measured of ``view``.
        view: the model; unchanged afterwards.
        dense: the model that it is compared with; of the same tokenizer.
        text: name → data source; prompts are the starts of its windows.
        seq_len: as for `evaluate`, like the next two.
        max_tokens: of each text.
        detokenize: whether to undo markers.

    Raises:
        DataError: a text cannot be read or used.
        ModelError: the models predict different tokens.
        NumericsError: a prediction is not finite.
    """
    check_comparable(view, dense)
    fidelity, generation = {}, {}
    for name, source in text.items():
        windows = evaluation_windows(
            source, view.tokenizer, seq_len=seq_len, max_tokens=max_tokens, detokenize=detokenize
        )
        fidelity[name] = compare_to_dense(view, DenseReference(dense, windows), windows)
        progress.status(f"{name} KL {fidelity[name].kl.value:.3f} nats")
        prompts, new_tokens = _prompts(view, windows)
        theirs = generation_check(dense, prompts, new_tokens=new_tokens)
        ours = generation_check(view, prompts, theirs.tokens)
        generation[name] = replace(ours, reference=theirs)
    return replace(evaluation, compared_to=dense.name, fidelity=fidelity, generation=generation)


def _prompts(view: DecoderView, windows: Tensor) -> tuple[Tensor, int]:
    """Prompts and the length of their continuations, both shorter where the context is short."""
    half = view.context // 2
    if half < 1:
        raise DataError(f"the model's context of {view.context} has no room for a continuation.")
    return choose_prompts(windows)[:, :half].to(torch.int64), min(NEW_TOKENS, half)
