"""Tokens per second of models as plain transformers runs them, timed in turns.

Other work on the machine slows whatever runs at that moment. So models that are compared take
turns: within a round all of them meet nearly the same machine, and a change is the median of the
rounds' ratios, not a ratio of two times that lie minutes apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from layercut.evaluation.generation import can_cache
from layercut.types import take_median

if TYPE_CHECKING:
    from layercut.models.view import DecoderView
    from layercut.results import Evaluation

PROMPT_TOKENS = 512
SHORT_PROMPT = 16
NEW_TOKENS = 16
N_ROUNDS = 7

Clock = Callable[[], float]
Opener = Callable[[], "AbstractContextManager[DecoderView]"]
"""Opens a block in which the view that it yields is the model to time."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Tokens per second of one model, one value for each round.

    Attributes:
        prefill: of a prompt of 512 tokens.
        decode: new tokens, batch of one; empty where keys and values cannot be kept.
    """

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


def measure_speeds(
    models: Mapping[str, Opener], *, clock: Clock = time.perf_counter
) -> dict[str, Speeds]:
    """Time all models in turns; one model alone is timed as often.

    Args:
        models: name → how it is opened; all are opened once in every round.
        clock: seconds since any moment.
    """
    cached = [name for name, opener in models.items() if _can_decode(opener)]
    prefill = time_in_turns(models, process_prompt, clock)
    decode = time_in_turns({name: models[name] for name in cached}, _decode, clock)
    return {name: Speeds(prefill[name], decode.get(name, ())) for name in models}


@torch.no_grad()
def time_in_turns(
    models: Mapping[str, Opener],
    work: Callable[[DecoderView], int],
    clock: Clock = time.perf_counter,
) -> dict[str, tuple[float, ...]]:
    """Tokens per second of every model, a value for each of seven rounds after a warm-up.

    Args:
        models: name → how it is opened, which is not timed.
        work: what is timed; returns its tokens.
        clock: seconds since any moment.
    """
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + N_ROUNDS):
        for name, opener in models.items():
            with opener() as view:
                start = clock()
                n_tokens = work(view)
                if view.device.type == "cuda":
                    torch.cuda.synchronize(view.device)
                speeds[name].append(n_tokens / (clock() - start))
    return {name: tuple(values[1:]) for name, values in speeds.items()}


def add_speeds(evaluation: Evaluation, own: Speeds, dense: Speeds | None = None) -> Evaluation:
    """``evaluation`` with the speeds' medians and spreads.

    Args:
        evaluation: of the same model.
        own: its speeds.
        dense: the dense model's, timed in turns with it: the change is told as well.
    """
    prefill = take_median(own.prefill)
    decode = take_median(own.decode) if own.decode else None
    pairs = {} if dense is None else _pair(own, dense)
    return replace(
        evaluation,
        prefill_tokens_per_second=prefill.value,
        prefill_spread=prefill.spread,
        decode_tokens_per_second=decode.value if decode else None,
        decode_spread=decode.spread if decode else None,
        speed_change={name: take_median(ratios) for name, ratios in pairs.items()},
    )


def _pair(own: Speeds, dense: Speeds) -> dict[str, list[float]]:
    """``prefill`` and ``decode`` → this model's speed over the dense one's in each round."""
    both = {"prefill": (own.prefill, dense.prefill), "decode": (own.decode, dense.decode)}
    return {
        name: [after / before for after, before in zip(*pair, strict=True)]
        for name, pair in both.items()
        if all(pair)
    }


def _can_decode(opener: Opener) -> bool:
    with opener() as view:
        return can_cache(view)


def process_prompt(view: DecoderView) -> int:
    """One forward pass over a prompt; returns its tokens."""
    ids = _prompt(view, min(PROMPT_TOKENS, view.context))
    with view.precision():
        view.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return ids.numel()


def _decode(view: DecoderView) -> int:
    cache = None
    step = _prompt(view, SHORT_PROMPT)
    for _ in range(NEW_TOKENS):
        output = view.model(input_ids=step, past_key_values=cache, use_cache=True)
        # Recurrent models keep no keys and values; a step costs them the same without a past.
        cache = getattr(output, "past_key_values", None)
        step = output.logits[:, -1:].argmax(dim=-1)
    return NEW_TOKENS


def _prompt(view: DecoderView, n_tokens: int) -> torch.Tensor:
    """Any tokens behind those that start every text: routers and sinks work as on real text."""
    leading = view.leading[:n_tokens]
    ids = torch.arange(n_tokens, device=view.device) % view.vocabulary_size
    ids[: len(leading)] = torch.tensor(leading, device=view.device)
    return ids[None]
