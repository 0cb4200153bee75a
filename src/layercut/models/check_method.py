"""Whether a method and its text suit a loaded model, asked before any long work."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut.errors import ModelError, RecipeError

if TYPE_CHECKING:
    from layercut.models.ranks import Ranks
    from layercut.models.view import DecoderView
    from layercut.registry import MethodCall
    from layercut.types import CalibrationBatches


def check_model(call: MethodCall, view: DecoderView) -> None:
    """Refuse a method that runs layers one by one on a family where that means nothing.

    Raises:
        ModelError: the family's layers cannot be run or compared alone.
        RecipeError: the method needs all weights at once, and the model is streamed; or it needs
            one process, and there are several.
    """
    if not call.method.several_ranks:
        require_one_rank(view.ranks, f"{call.stage} '{call.name}'")
    if not call.method.streams:
        require_resident(view, f"{call.stage} '{call.name}'")
    if call.method.reads_model and (why := view.layout.unscorable):
        raise ModelError(
            f"{call.stage} '{call.name}' cannot work on '{view.layout.model_type}': {why}. Name "
            "the layers with selection.drop, and set recovery.method: none."
        )


def require_resident(view: DecoderView, what: str) -> None:
    """Refuse what needs all weights at once where layers are read from their files.

    Args:
        view: the model.
        what: that which needs them, for the message.

    Raises:
        RecipeError: the model's layers are read one at a time.
    """
    if view.source is not None:
        raise RecipeError(
            f"{what} needs all weights at once, and this model's layers are read from their files "
            "one at a time. Leave it out, or use residency: resident on a machine with more memory."
        )


def require_one_rank(ranks: Ranks, what: str) -> None:
    """Refuse what runs in one process where several share the run.

    Args:
        ranks: the processes.
        what: that which runs in one, for the message.

    Raises:
        RecipeError: there are several.
    """
    if ranks.world > 1:
        raise RecipeError(
            f"{what} runs in one process, and {ranks.world} were started. Leave it out, or start "
            "layercut without a launcher."
        )


def check_method(
    call: MethodCall, view: DecoderView, batches: CalibrationBatches, n_drop: int
) -> None:
    """Refuse all that a method declares it cannot do here.

    Args:
        call: the method with its options.
        view: the model.
        batches: calibration text.
        n_drop: layers that are to go, or that may at most under a perplexity limit.

    Raises:
        LayercutError: what the method's own check raises; ModelError for an unsuitable family.
    """
    check_model(call, view)
    check_options(call, view, batches, n_drop)


def check_options(
    call: MethodCall, view: DecoderView, batches: CalibrationBatches, n_drop: int
) -> None:
    """Refuse what the method's own check refuses; `check_method` less the family.

    A score is not computed where `selection.drop` names the layers, so that any family may go.

    Raises:
        LayercutError: what the check raises.
    """
    if call.method.check is not None:
        call.method.check(view, batches, call.options, n_drop)


def check_lengths(view: DecoderView, **lengths: int) -> None:
    """Refuse windows that are longer than the model's context.

    Args:
        view: the model.
        **lengths: section of the recipe → its ``seq_len``, in tokens.

    Raises:
        RecipeError: names the key.
    """
    for section, length in lengths.items():
        if length > view.context:
            raise RecipeError(
                f"{section}.seq_len is {length}, but the model's context is {view.context} tokens. "
                "Lower it."
            )


def draw_probe_ids(view: DecoderView, n_sequences: int, seq_len: int) -> Tensor:
    """The same random token ids at every call, (n_sequences, seq_len), to try a model on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(view.vocabulary_size, (n_sequences, seq_len), generator=generator)
