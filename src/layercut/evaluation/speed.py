"""Speed of the model as plain transformers runs it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

PROMPT_TOKENS = 512
NEW_TOKENS = 16
REPEATS = 5


@torch.no_grad()
def prefill_tokens_per_second(view: DecoderView) -> float:
    """Tokens of one 512-token prompt processed per second; best of five after a warm-up."""
    ids = _prompt(view, min(PROMPT_TOKENS, view.context))

    def prefill() -> None:
        with view.precision():
            view.model(input_ids=ids, use_cache=False, logits_to_keep=1)

    return ids.numel() / _best_seconds(view, prefill)


@torch.no_grad()
def decode_tokens_per_second(view: DecoderView) -> float:
    """Greedy tokens per second after a short prompt, batch of one; best of five."""
    ids = _prompt(view, 16)

    def decode() -> None:
        cache = None
        step = ids
        for _ in range(NEW_TOKENS):
            output = view.model(input_ids=step, past_key_values=cache, use_cache=True)
            # Recurrent models keep no keys and values; a step costs them the same without a past.
            cache = getattr(output, "past_key_values", None)
            step = output.logits[:, -1:].argmax(dim=-1)

    return NEW_TOKENS / _best_seconds(view, decode)


def _prompt(view: DecoderView, n_tokens: int) -> torch.Tensor:
    """Any tokens behind those that start every text: routers and sinks work as on real text."""
    leading = view.leading[:n_tokens]
    ids = torch.arange(n_tokens, device=view.device) % view.vocabulary_size
    ids[: len(leading)] = torch.tensor(leading, device=view.device)
    return ids[None]


def _best_seconds(view: DecoderView, run: Callable[[], None]) -> float:
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        run()
        if view.device.type == "cuda":
            torch.cuda.synchronize(view.device)
        seconds.append(time.perf_counter() - start)
    # Other work on the machine only ever adds time.
    return min(seconds[1:])
