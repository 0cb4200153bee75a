"""A causal language model, seen as a stack of residual layers that can be run one at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layercut.models.hooks import DecoderOutput
from layercut.models.special_tokens import n_given
from layercut.models.stack import LayerInputs, LayerStack

__all__ = ["DecoderView", "LayerInputs"]

LOSS_CHUNK = 256
"""Tokens whose logits exist at once: 256 × 49,152 float32 logits are 48 MiB."""

GPU_LOSS_CHUNK = 2048
"""The same on a GPU, which smaller products leave idle: 2,048 × 128,256 float32 are 1 GiB."""


class DecoderView(LayerStack):
    """A loaded model: its stack of layers, and what follows them, the final norm and the head."""

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy of every predicted token, (batch, seq − 1 − `n_given`), float32, nats."""
        input_ids = input_ids.to(self.device)
        with self.precision():
            output = self.decoder(input_ids=input_ids, use_cache=False)
        return self._losses(output.last_hidden_state, input_ids)

    @torch.no_grad()
    def stream_losses(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """The same from h_L, the residual stream *before* the final norm, (batch, seq, d)."""
        return self._losses(self.norm_states(hidden, input_ids), input_ids.to(self.device))

    def _losses(self, normed: Tensor, input_ids: Tensor) -> Tensor:
        n = n_given(self.leading, input_ids)
        flat, targets = normed[:, n:-1].flatten(0, 1), input_ids[:, n + 1 :].flatten()
        chunks = zip(flat.split(self._loss_chunk), targets.split(self._loss_chunk), strict=True)
        losses = [self._chunk_losses(h, t) for h, t in chunks]
        return torch.cat(losses).view(input_ids.shape[0], -1)

    def loss_gradient(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the summed token loss with respect to h_L, and that loss in nats, ().

        The logits exist for `_loss_chunk` tokens at a time, in both directions.

        Args:
            hidden: h_L, the residual stream *before* the final norm, (batch, seq, d).
            input_ids: (batch, seq); token t + 1 is the target of position t.
        """
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad():
            normed = self.norm_states(leaf, input_ids)
        n = n_given(self.leading, input_ids)
        flat = normed.detach()[:, n:-1].flatten(0, 1)
        targets = input_ids[:, n + 1 :].flatten().to(flat.device)
        total, gradients = torch.zeros((), dtype=torch.float64, device=flat.device), []
        n_chunk = self._loss_chunk
        for chunk, target in zip(flat.split(n_chunk), targets.split(n_chunk), strict=True):
            chunk = chunk.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._chunk_losses(chunk, target).sum()
                (gradient,) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
            gradients.append(gradient)
        # The last position of a sequence predicts nothing.
        upstream = torch.zeros_like(normed)
        upstream[:, n:-1] = torch.cat(gradients).view_as(normed[:, n:-1])
        (gradient,) = torch.autograd.grad(normed, leaf, upstream)
        return gradient, total

    def norm_states(self, hidden: Tensor, input_ids: Tensor) -> Tensor:
        """What the decoder makes of h_L: the final norm's output, (batch, seq, d).

        Args:
            hidden: h_L, the residual stream *before* the final norm, (batch, seq, d).
            input_ids: (batch, seq).
        """

        def replace(_: nn.Module, __: Any, output: Any) -> Any:
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with self.skipping(range(self.n_layers)), self.precision():
            hook = self.layers[-1].register_forward_hook(replace)
            try:
                output = self.decoder(input_ids=input_ids.to(self.device), use_cache=False)
            finally:
                hook.remove()
        normed: Tensor = output.last_hidden_state
        return normed

    def head(self, normed: Tensor) -> Tensor:
        """Logits of normed states, (n, d) → (n, vocabulary), scaled and capped as the model does.

        The model's own forward pass runs, with these states in the place of its decoder's.
        """
        ids = torch.zeros(1, len(normed), dtype=torch.int64, device=self.device)
        decoder = self.decoder
        decoder.forward = lambda *_, **__: DecoderOutput(last_hidden_state=normed[None])
        try:
            with self.precision():
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        finally:
            del decoder.forward
        return logits[0]

    @property
    def _loss_chunk(self) -> int:
        return GPU_LOSS_CHUNK if self.device.type == "cuda" else LOSS_CHUNK

    def _chunk_losses(self, normed: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(self.head(normed).float(), targets, reduction="none")
