"""What a model writes when it goes on by itself: repetition, and agreement with the dense model.

Source   distinct-n: Li et al. 2016, arXiv:1510.03055; loops of greedy decoding: Holtzman et al.
         2020, arXiv:1904.09751
Formula  distinct_n = different n-grams / n-grams;  loop = the longest stretch in which every token
         equals the one a fixed distance before it, over the length (0 if it is not one full period)
Meaning  perplexity sees the model on human text only; a pruned model can score well there and
         still fall into loops on its own. The dense model's values are the yardstick, not 1 and 0
Limits   greedy decoding, which loops more than sampling; the end-of-text token is a token like any
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.loss import check_vocabulary
from layercut.errors import DataError, NumericsError
from layercut.results import Generation, estimate_mean

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

N_PROMPTS = 8
PROMPT_TOKENS = 64
NEW_TOKENS = 64


def choose_prompts(
    windows: Tensor, *, n_prompts: int = N_PROMPTS, prompt_tokens: int = PROMPT_TOKENS
) -> Tensor:
    """The starts of evenly spaced windows, (≤ n_prompts, ≤ prompt_tokens)."""
    chosen = torch.linspace(0, len(windows) - 1, min(n_prompts, len(windows))).round().long()
    return windows[chosen, :prompt_tokens]


def generation_check(
    view: DecoderView,
    prompts: Tensor,
    reference_tokens: Tensor | None = None,
    *,
    new_tokens: int = NEW_TOKENS,
) -> Generation:
    """Continue ``prompts`` with ``view`` as it is now, be it skipped or patched.

    Args:
        view: the model; unchanged afterwards.
        prompts: token ids, (n_prompts, prompt_tokens).
        reference_tokens: the dense model's continuations, (n_prompts, new_tokens).
        new_tokens: length of a continuation; that of the reference where there is one.

    Raises:
        DataError: a prompt and its continuation exceed the model's context, a token id its
            vocabulary, or the reference is not one of these prompts.
        NumericsError: a logit is not finite.
    """
    check_vocabulary(view, prompts)
    n_prompts, prompt_tokens = prompts.shape
    if reference_tokens is not None:
        if len(reference_tokens) != n_prompts:
            raise DataError(
                f"there are {n_prompts} prompts and {len(reference_tokens)} continuations to "
                "compare with. Give one for each prompt."
            )
        new_tokens = reference_tokens.shape[1]
    if prompt_tokens + new_tokens > view.context:
        raise DataError(
            f"prompts of {prompt_tokens} tokens and {new_tokens} new ones exceed the model's "
            f"context of {view.context}. Use shorter ones."
        )
    tokens = continue_prompts(view, prompts, new_tokens)
    rows = tokens.tolist()
    shares = [[distinct_share(row, n) for row in rows] for n in (1, 2, 3)]
    shares.append([loop_share(row) for row in rows])
    *distinct, loop = map(estimate_mean, torch.tensor(shares, dtype=torch.float64))
    common = same = None
    if reference_tokens is not None:
        equal = tokens == reference_tokens.to(tokens.device)
        # cumprod is 1 as long as every token so far was the same.
        common = estimate_mean(equal.long().cumprod(dim=1).sum(dim=1).double())
        same = estimate_mean(equal.double().mean(dim=1))
    return Generation(
        tokens=tokens,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        distinct=(distinct[0], distinct[1], distinct[2]),
        loop=loop,
        common_prefix=common,
        agreement=same,
    )


@torch.no_grad()
def continue_prompts(view: DecoderView, prompts: Tensor, new_tokens: int) -> Tensor:
    """The likeliest next token, again and again, (n_prompts, new_tokens) int64.

    Raises:
        NumericsError: a logit is not finite.
    """
    cached = can_cache(view)
    text = step = prompts.to(view.device)
    cache: Any = None
    for position in progress.track(range(new_tokens), new_tokens):
        with view.precision():
            output = view.model(
                input_ids=step, past_key_values=cache, use_cache=cached, logits_to_keep=1
            )
        logits = output.logits[:, -1]
        if bool(logits.isnan().any()):
            raise NumericsError(
                f"the model's logits are NaN at new token {position}. Use dtype: float32, or "
                "check the weights."
            )
        text = torch.cat([text, logits.argmax(dim=-1, keepdim=True)], dim=1)
        # Recurrent models keep their state elsewhere: run the whole text again.
        cache = getattr(output, "past_key_values", None) if cached else None
        step = text if cache is None else text[:, -1:]
    return text[:, prompts.shape[1] :].cpu()


def distinct_share(tokens: list[int], n: int) -> float:
    """Different n-grams / n-grams; 1 where there is none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def loop_share(tokens: list[int]) -> float:
    """The part of ``tokens`` in its longest loop.

    A loop of period p is a stretch of at least 2p tokens in which each, from the p-th on, equals
    the one p before it; it counts with its first period.
    """
    longest = 0
    for period in range(1, len(tokens) // 2 + 1):
        run = 0
        for before, token in zip(tokens, tokens[period:], strict=False):
            run = run + 1 if token == before else 0
            if run >= period:
                longest = max(longest, run + period)
    return longest / len(tokens)


def can_cache(view: DecoderView) -> bool:
    """Whether keys and values can be kept from token to token.

    The library asks the cache of the first layer of each kind how many tokens it has seen; one that
    is passed over has seen none.
    """
    text = view.model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ())
    return not view.skipped or (0 not in view.skipped and len(kinds) <= 1)
