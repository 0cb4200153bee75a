"""The loss of a heal: the dense model's whole distribution over the next token, chunk by chunk.

Source   arXiv:1503.02531 §2
Formula  (1 − w) T² mean_t KL(q_t ‖ p_t) + w mean_t −log p_t(x_{t+1})
         q, p = softmax of the teacher's and the student's logits / T in the first term, w = label
         weight; the first mean is over all tokens, the second over those that have a next one
Cost     two heads forward and one backward per token; the logits of ``CHUNK`` tokens at a time
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layercut.engine.loss import kl_divergence, log_normaliser
from layercut.models.special_tokens import n_given
from layercut.models.view import DecoderView

CHUNK = 128
"""Tokens whose logits exist at once, about five float32 copies: 5 × 24 MiB of 49,152 words."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """The loss and what it is taken between.

    Attributes:
        student: the model that learns.
        teacher: the model that it learns from.
        temperature: T.
        label_weight: w.
    """

    student: DecoderView
    teacher: DecoderView
    temperature: float = 1.0
    label_weight: float = 0.0

    @torch.no_grad()
    def compute_teacher_states(self, input_ids: Tensor) -> Tensor:
        """The teacher's normed states, (batch, seq, d), in its own arithmetic."""
        return self.round_teacher_states(_normed_states(self.teacher, input_ids))

    def round_teacher_states(self, states: Tensor) -> Tensor:
        """The states as the teacher's head would round them in any case."""
        return states.bfloat16() if self.teacher.mixed_precision else states

    def __call__(self, input_ids: Tensor, teacher_states: Tensor) -> Tensor:
        """The mean loss of a batch in nats, with a gradient if the student's states have one.

        Args:
            input_ids: (batch, seq).
            teacher_states: theirs, by `compute_teacher_states`.
        """
        return self.of_states(_normed_states(self.student, input_ids), input_ids, teacher_states)

    def of_states(self, normed: Tensor, input_ids: Tensor, teacher_states: Tensor) -> Tensor:
        """The same from the student's normed states, (batch, seq, d)."""
        ids = input_ids.to(normed.device)
        labels = torch.full_like(ids, -1)
        n = n_given(self.student.leading, ids)
        labels[:, n:-1] = ids[:, n + 1 :]
        n_labels = ids.shape[0] * (ids.shape[1] - 1 - n)
        weights = ((1 - self.label_weight) / ids.numel(), self.label_weight / n_labels)
        total, gradients = torch.zeros((), device=normed.device), []
        for states, guiding, targets in zip(
            normed.detach().flatten(0, 1).split(CHUNK),
            teacher_states.flatten(0, 1).split(CHUNK),
            labels.flatten().split(CHUNK),
            strict=True,
        ):
            leaf = states.detach().requires_grad_(normed.requires_grad)
            loss, upstream, logits = self._chunk(leaf, guiding, targets, weights)
            total += loss
            if normed.requires_grad:
                gradients += torch.autograd.grad(logits, leaf, upstream)
        if not normed.requires_grad:
            return total
        whole = torch.cat(gradients).view_as(normed)
        return attach_gradient(normed, total, whole)

    def _chunk(
        self, states: Tensor, teacher_states: Tensor, labels: Tensor, weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of some tokens, its gradient with respect to their logits, and these."""
        logits = self.student.head(states)
        with torch.no_grad():
            dense = self.teacher.head(teacher_states.to(self.teacher.device)).to(logits.device)
            loss, upstream = chunk_loss(logits, dense, labels, self.temperature, weights)
        return loss, upstream.to(logits.dtype), logits


@torch.no_grad()
def chunk_loss(
    logits: Tensor,
    dense: Tensor,
    labels: Tensor,
    temperature: float,
    weights: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The loss of some tokens and its gradient with respect to the student's logits.

    ∂/∂z [T² KL] = T (p − q), and of the label's term: softmax(z) − onehot.

    Args:
        logits: the student's, (n, vocabulary).
        dense: the teacher's, (n, vocabulary).
        labels: the next token of each, (n,); −1 where there is none.
        temperature: T.
        weights: what a token's divergence and its label's loss count for.

    Returns:
        The weighted sum, a float32 scalar, and its gradient, (n, vocabulary), float32.
    """
    divergence, p, q = kl_divergence(logits, dense, temperature)
    loss = weights[0] * temperature**2 * divergence.sum()
    gradient = (p - q).mul_(weights[0] * temperature)
    if weights[1]:
        z = logits.float()
        if temperature != 1:
            p = z.softmax(dim=-1)
        has_label = labels >= 0
        rows, columns = has_label.nonzero().squeeze(1), labels[has_label]
        loss += weights[1] * (log_normaliser(z, p)[rows] - z[rows, columns]).sum()
        p[~has_label] = 0.0
        p[rows, columns] -= 1.0
        gradient.add_(p, alpha=weights[1])
    return loss, gradient


def _normed_states(view: DecoderView, input_ids: Tensor) -> Tensor:
    with view.precision():
        output = view.decoder(input_ids=input_ids.to(view.device), use_cache=False)
    states: Tensor = output.last_hidden_state
    return states


def attach_gradient(states: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value`` as a function of ``states`` whose gradient is known already, of their shape."""
    joined: Tensor = _WithGradient.apply(states, value, gradient)  # type: ignore[no-untyped-call]
    return joined


class _WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to the states is known already."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        """The value; keeps the gradient."""
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        """The gradient times what comes from above."""
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None
