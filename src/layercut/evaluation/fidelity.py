"""How far a pruned model's predictions are from the dense model's, token by token.

Source   Kullback and Leibler 1951; agreement as in speculative decoding and distillation papers
Formula  agreement = mean_t [argmax p_t = argmax q_t];  KL = mean_t Σ_v q_tv (log q_tv − log p_tv)
         q dense, p pruned; t = every position of every window, v = vocabulary
Meaning  unlike perplexity, it needs no target, and being wrong in another way counts
Cost     one dense pass, d float32 numbers kept per token; per variant one pass and a second head
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.loss import check_vocabulary, kl_divergence
from layercut.errors import DataError, ModelError, NumericsError
from layercut.results import Fidelity, estimate_mean
from layercut.spool import Spool

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

WINDOWS_AT_ONCE = 2
LOGITS_AT_ONCE = 256
"""Tokens whose logits exist at once, of both models."""


class DenseReference:
    """What the dense model predicts after every token of some windows.

    Its normed final states are kept (in a file past a memory limit) with a copy of its head;
    logits, which would be thousands of times larger, are computed from them chunk by chunk. The
    view may therefore be skipped, patched or pruned in place afterwards: the reference stays dense.

    Attributes:
        windows: token ids, (n, seq_len).
        states: the final norm's outputs, (n · seq_len, d) float32.
        n_outputs: entries of a row of logits.
    """

    def __init__(self, view: DecoderView, windows: Tensor) -> None:
        """Run ``view`` as it is now over ``windows``.

        Raises:
            DataError: a token id is outside the model's vocabulary.
            NumericsError: a state is not finite.
        """
        check_vocabulary(view, windows)
        self.windows = windows
        self._view = view
        self._head = _head_tensors(view)
        self.states: Spool | None = None
        self._dtype = torch.float32
        start = 0
        for _, hidden in _final_states(view, windows):
            if self.states is None:
                self.states = Spool(windows.numel(), hidden.shape[1], device=hidden.device)
                self._dtype = hidden.dtype
            if not bool(hidden.isfinite().all()):
                raise NumericsError(
                    f"the dense model's states are not finite in the windows from token {start} "
                    "on. Use dtype: float32, or check the weights."
                )
            self.states.write(start, hidden)
            start += len(hidden)
        self.n_outputs = self.logits(0, 1).shape[1]

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        """Of every next token after tokens ``start`` to ``stop``, (n, vocabulary)."""
        assert self.states is not None
        rows = self.states.rows[start:stop].to(self._view.device, self._dtype)
        with self._view.patched(self._head):
            return self._view.head(rows)


@torch.no_grad()
def compare_to_dense(view: DecoderView, reference: DenseReference, windows: Tensor) -> Fidelity:
    """Run ``view`` as it is now, be it skipped or patched, and compare it with the dense model.

    Args:
        view: the model; the reference's own, or another of the same vocabulary.
        reference: the dense model's predictions.
        windows: those of the reference, or the first of them, (n, seq_len).

    Raises:
        DataError: the windows are not the reference's.
        ModelError: the two models have different vocabularies.
        NumericsError: a prediction is not finite.
    """
    n_windows, seq_len = windows.shape
    if not torch.equal(reference.windows[:n_windows], windows):
        raise DataError(
            "the windows are not those that the dense model was run on. Give it the same ones."
        )
    n_batches = -(-n_windows // WINDOWS_AT_ONCE)
    same, divergences = [], []
    for first, hidden in progress.track(_final_states(view, windows), n_batches):
        for i in range(0, len(hidden), LOGITS_AT_ONCE):
            chunk = view.head(hidden[i : i + LOGITS_AT_ONCE])
            check_same_outputs(chunk.shape[1], reference.n_outputs)
            dense = reference.logits(first + i, first + i + len(chunk)).to(chunk.device)
            same.append((chunk.argmax(dim=-1) == dense.argmax(dim=-1)).double().cpu())
            divergences.append(kl_divergence(chunk, dense)[0].double().cpu())
    kl = torch.cat(divergences).view(n_windows, seq_len)
    if not bool(kl.isfinite().all()):
        window = int((~kl.isfinite()).any(dim=1).nonzero()[0])
        raise NumericsError(
            f"KL to the dense model is not finite in window {window}: a model yields NaN or Inf "
            "there. Use dtype: float32, or check the weights."
        )
    per_window = [values.mean(dim=1) for values in (torch.cat(same).view_as(kl), kl)]
    return Fidelity(*(estimate_mean(means, kl.numel()) for means in per_window))


def check_same_outputs(n_outputs: int, n_dense: int) -> None:
    """Refuse to compare models that predict different tokens.

    Raises:
        ModelError: they have rows of logits of different lengths.
    """
    if n_outputs != n_dense:
        raise ModelError(
            f"the model predicts {n_outputs} tokens and the one it is compared with {n_dense}. "
            "Compare a pruned model with the one it was pruned from."
        )


@torch.no_grad()
def _final_states(view: DecoderView, windows: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Index of a batch's first token, and its normed final states, (n_tokens, d)."""
    for start in range(0, len(windows), WINDOWS_AT_ONCE):
        ids = windows[start : start + WINDOWS_AT_ONCE].to(view.device)
        with view.precision():
            output = view.decoder(input_ids=ids, use_cache=False)
        yield start * windows.shape[1], output.last_hidden_state.flatten(0, 1)


def _head_tensors(view: DecoderView) -> dict[str, Tensor]:
    """Copies of the output embedding's parameters by name; it may be patched or trained later."""
    head = view.model.get_output_embeddings()
    names = (name for name, module in view.model.named_modules() if module is head)
    place = next(names, None)
    if head is None or place is None:
        return {}
    return {f"{place}.{name}": p.detach().clone() for name, p in head.named_parameters()}
