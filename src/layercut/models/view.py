"""A causal language model, seen as a stack of residual layers that can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from layercut.models.families import FamilyRules

LOSS_CHUNK = 256
"""Tokens whose logits exist at once: 256 × 49,152 float32 logits are 48 MiB."""


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What the layers of one micro-batch receive.

    Attributes:
        hidden: embeddings = the residual stream entering layer 0, shape (batch, seq, d).
        kwargs: the further arguments of every layer (mask, rotary tables, positions).
    """

    hidden: Tensor
    kwargs: tuple[dict[str, Any], ...]


class DecoderView:
    """A loaded model with named access to what pruning reads.

    Attributes:
        model: the transformers model, in evaluation mode, without gradients.
        tokenizer: its tokenizer.
        name: what the user called it.
        path: the local checkpoint folder it was loaded from.
        rules: its family's row.
        fingerprint: hash of the checkpoint's files.
        mixed_precision: run float32 weights through bfloat16 matrix products.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        path: Path,
        rules: FamilyRules,
        fingerprint: str,
        mixed_precision: bool,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.path = path
        self.rules = rules
        self.fingerprint = fingerprint
        self.mixed_precision = mixed_precision
        self.skipped: frozenset[int] = frozenset()

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, from the embedding up."""
        layers: nn.ModuleList = self.model.get_submodule(self.rules.layers)
        return layers

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    def linear_weights(self, layer: int) -> dict[str, Tensor]:
        """Weights of the linear sub-layers of one layer, by their name in the state dict."""
        return {
            f"{self.rules.layers}.{layer}.{name}.weight": module.weight
            for name, module in self.layers[layer].named_modules()
            if isinstance(module, nn.Linear)
        }

    def down_projection(self, layer: int) -> tuple[str, nn.Linear]:
        """State-dict prefix and module of the MLP's output projection."""
        return self._linear(layer, self.rules.down_projection)

    def attention_output(self, layer: int) -> tuple[str, nn.Linear]:
        """State-dict prefix and module of the attention's output projection."""
        return self._linear(layer, self.rules.attention_output)

    def _linear(self, layer: int, path: str) -> tuple[str, nn.Linear]:
        module = self.layers[layer].get_submodule(path)
        assert isinstance(module, nn.Linear), path
        return f"{self.rules.layers}.{layer}.{path}", module

    @contextmanager
    def skipping(self, layers: Iterable[int]) -> Iterator[None]:
        """Let ``layers`` pass their input through unchanged inside the block; nests."""
        new = frozenset(layers) - self.skipped
        before = self.skipped
        # Libraries such as accelerate wrap `forward` per instance: put theirs back, not none.
        wrapped = {i: f for i in new if (f := self.layers[i].__dict__.get("forward"))}
        for layer in new:
            self.layers[layer].forward = _identity
        self.skipped = before | new
        try:
            yield
        finally:
            for layer in new:
                del self.layers[layer].forward
            for layer, forward in wrapped.items():
                self.layers[layer].forward = forward
            self.skipped = before

    @contextmanager
    def patched(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Use ``tensors`` in place of the parameters of these names inside the block."""
        parameters = {name: self.model.get_parameter(name) for name in tensors}
        before = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = tensors[name].to(before[name])
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = before[name]

    def precision(self) -> AbstractContextManager[Any]:
        """The arithmetic of scoring and evaluation; exact comparisons stay outside of it."""
        if not self.mixed_precision:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @torch.no_grad()
    def embed(self, input_ids: Tensor) -> LayerInputs:
        """Run only what comes before the layers, and catch what each layer would receive.

        Args:
            input_ids: (batch, seq), int64.
        """
        seen: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            seen.append((hidden, rest))

        hooks = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in self.layers]
        try:
            with self.skipping(range(self.n_layers)), self.precision():
                self.model.base_model(input_ids=input_ids.to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return LayerInputs(hidden=seen[0][0], kwargs=tuple(kwargs for _, kwargs in seen))

    def run_layer(self, layer: int, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """Map the residual stream entering ``layer`` to the one leaving it, (batch, seq, d)."""
        with self.precision():
            output = self.layers[layer](hidden, **inputs.kwargs[layer])
        return output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def token_losses(self, input_ids: Tensor) -> Tensor:
        """Cross-entropy of every predicted token, (batch, seq − 1), float32, in nats."""
        input_ids = input_ids.to(self.device)
        with self.precision():
            output = self.model.base_model(input_ids=input_ids, use_cache=False)
        hidden = output.last_hidden_state[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten()
        chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True)
        losses = [self._chunk_losses(h, t) for h, t in chunks]
        return torch.cat(losses).view(input_ids.shape[0], -1)

    def loss_gradient(self, hidden: Tensor, input_ids: Tensor) -> tuple[Tensor, float]:
        """Gradient of the summed token loss with respect to h_L, and that loss in nats.

        The logits exist for ``LOSS_CHUNK`` tokens at a time, in both directions.

        Args:
            hidden: h_L, the residual stream *before* the final norm, (batch, seq, d).
            input_ids: (batch, seq); token t + 1 is the target of position t.
        """
        leaf = hidden.detach().requires_grad_()
        with torch.enable_grad(), self.precision():
            normed = self.model.get_submodule(self.rules.norm)(leaf)
        flat = normed.detach()[:, :-1].flatten(0, 1)
        targets = input_ids[:, 1:].flatten().to(flat.device)
        total, gradients = 0.0, []
        for chunk, target in zip(flat.split(LOSS_CHUNK), targets.split(LOSS_CHUNK), strict=True):
            chunk = chunk.detach().requires_grad_()
            with torch.enable_grad():
                loss = self._chunk_losses(chunk, target).sum()
                (gradient,) = torch.autograd.grad(loss, chunk)
            total += loss.item()
            gradients.append(gradient)
        # The last position of a sequence predicts nothing.
        upstream = torch.zeros_like(normed)
        upstream[:, :-1] = torch.cat(gradients).view_as(normed[:, :-1])
        (gradient,) = torch.autograd.grad(normed, leaf, upstream)
        return gradient, total

    def _chunk_losses(self, normed: Tensor, targets: Tensor) -> Tensor:
        with self.precision():
            logits = self.model.get_output_embeddings()(normed)
        return functional.cross_entropy(logits.float(), targets, reduction="none")


def _identity(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


def capture(
    module: nn.Module, keep: Callable[[Tensor, Tensor], None]
) -> AbstractContextManager[None]:
    """Call ``keep(input, output)`` at every forward pass of ``module`` inside the block."""

    @contextmanager
    def block() -> Iterator[None]:
        def hook(_: nn.Module, args: Sequence[Tensor], output: Tensor) -> None:
            keep(args[0], output)

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return block()
