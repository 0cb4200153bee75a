"""A stack of residual layers with what is before it: run one at a time, skipped, patched, held."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from layercut.checkpoints.layout import Layout, decoder_path
from layercut.models.hooks import identity, prepare_for_inference
from layercut.models.layer_source import LayerSource
from layercut.models.ranks import ALONE, Ranks
from layercut.models.special_tokens import leading_tokens


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What the layers of one micro-batch receive.

    Attributes:
        hidden: embeddings = the residual stream entering layer 0, shape (batch, seq, d).
        rest: the further arguments of every layer (mask, rotary tables, positions): those given
            by position and those by name.
    """

    hidden: Tensor
    rest: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class _SeenEnoughError(Exception):
    """Ends a forward pass of which the first layers were of interest."""


class LayerStack:
    """A loaded model with named access to what pruning reads, up to its last layer.

    Attributes:
        model: the transformers model, in evaluation mode, without gradients.
        tokenizer: its tokenizer.
        name: what the user called it.
        path: the local checkpoint folder it was loaded from.
        layout: where its layers are.
        fingerprint: hash of the checkpoint's files.
        mixed_precision: run float32 weights through bfloat16 matrix products.
        skipped: layers that pass their input through at the moment.
        source: where layers are read from when they run; ``None``: all are in memory.
        ranks: the processes that share the run; the only one, but for `layercut.run` under a
            launcher.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str,
        path: Path,
        layout: Layout,
        fingerprint: str,
        mixed_precision: bool,
    ) -> None:
        self.model = prepare_for_inference(model)
        self.tokenizer = tokenizer
        self.name = name
        self.path = path
        self.layout = layout
        self.fingerprint = fingerprint
        self.mixed_precision = mixed_precision
        self.skipped: frozenset[int] = frozenset()
        self.source: LayerSource | None = None
        self.ranks: Ranks = ALONE
        self._n_outputs: int | None = None
        self._leading: tuple[Any, tuple[int, ...]] | None = None

    @property
    def leading(self) -> tuple[int, ...]:
        """Ids of the tokens that the tokenizer puts in front of every text."""
        if self._leading is None or self._leading[0] is not self.tokenizer:
            self._leading = self.tokenizer, leading_tokens(self.tokenizer)
        return self._leading[1]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, from the embedding up."""
        return self.layout.layer_list(self.model)

    @property
    def decoder(self) -> Any:
        """The module around the layers: token ids in, normed states out."""
        return self.model.get_submodule(decoder_path(self.model, self.layout.layers))

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def n_parameters(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Memory of the parameters, tied ones counted once."""
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding: token ids are below it."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def context(self) -> int:
        """Longest sequence that the configuration allows; recurrent and ALiBi models set none."""
        text = self.model.config.get_text_config(decoder=True)
        limits = (getattr(text, key, None) for key in ("max_position_embeddings", "max_seq_len"))
        return next((int(limit) for limit in limits if limit), sys.maxsize)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(iter(self.model.parameters())).device
        return device

    def linear_modules(self, layer: int) -> dict[str, nn.Linear | Conv1D]:
        """One layer's linear maps by the name of their weight in the state dict."""
        return {
            f"{self.layout.layers}.{layer}.{name}.weight": module
            for name, module in self.layers[layer].named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        }

    def expert_weights(self, layer: int) -> dict[str, Tensor]:
        """Weights that hold all experts' linear maps at once, (experts, …, …), by name."""
        return {
            f"{self.layout.layers}.{layer}.{name}": parameter
            for name, parameter in self.layers[layer].named_parameters()
            if parameter.dim() == 3 and "conv" not in name
        }

    def linear_weights(self, layer: int) -> dict[str, Tensor]:
        """Weights of all of one layer's linear maps by their name in the state dict."""
        modules = self.linear_modules(layer)
        return {n: m.weight for n, m in modules.items()} | self.expert_weights(layer)

    @contextmanager
    def skipping(self, layers: Iterable[int]) -> Iterator[None]:
        """Let ``layers`` pass their input through unchanged inside the block; nests."""
        new = frozenset(layers) - self.skipped
        before = self.skipped
        # Libraries such as accelerate wrap `forward` per instance: put theirs back, not none.
        wrapped = {i: f for i in new if (f := self.layers[i].__dict__.get("forward"))}
        n_outputs = self._layer_outputs() if new else 0
        for layer in new:
            self.layers[layer].forward = identity(n_outputs)
        self.skipped = before | new
        try:
            yield
        finally:
            for layer in new:
                del self.layers[layer].forward
            for layer, forward in wrapped.items():
                self.layers[layer].forward = forward
            self.skipped = before

    @torch.no_grad()
    def _layer_outputs(self) -> int:
        """Length of the tuple that a layer returns; 0 where it returns the residual stream."""
        if self._n_outputs is None:
            # Layers that are read from files all return what the first one does.
            layer = self.layers[-1 if self.source is None else 0]
            seen = []

            def look(_: nn.Module, __: Any, output: Any) -> None:
                seen.append(output)
                if self.source is not None:
                    raise _SeenEnoughError

            hook = layer.register_forward_hook(look)
            try:
                ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
                with suppress(_SeenEnoughError):
                    self.decoder(input_ids=ids, use_cache=False)
            finally:
                hook.remove()
            self._n_outputs = len(seen[0]) if isinstance(seen[0], tuple) else 0
        return self._n_outputs

    @contextmanager
    def holding(self, layer: int) -> Iterator[None]:
        """Have one layer's weights in memory inside the block, as they always are in most models.

        Who runs a layer several times, reads its weights, or differentiates them, holds it.
        """
        if self.source is None or layer in self.skipped:
            yield
            return
        self.source.hold(layer)
        try:
            yield
        finally:
            self.source.release(layer)

    @contextmanager
    def patched(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Use ``tensors`` in place of the parameters of these names inside the block.

        Args:
            tensors: by name; each is asked for once, one that belongs to a layer that is read from
                its files whenever that is read.
        """
        source = self.source
        own = [n for n in tensors if source is None or not source.is_layers(n)]
        parameters = {name: self.model.get_parameter(name) for name in own}
        before = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = tensors[name].to(before[name])
        try:
            with nullcontext() if source is None else source.replacing(tensors):
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
        seen: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = dict(kwargs)
            hidden = args[0] if args else rest.pop("hidden_states")
            seen.append((hidden, args[1:], rest))

        self._layer_outputs()  # which may run the model: before anything is caught
        hooks = [layer.register_forward_pre_hook(catch, with_kwargs=True) for layer in self.layers]
        try:
            with self.skipping(range(self.n_layers)), self.precision():
                self.decoder(input_ids=input_ids.to(self.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return LayerInputs(seen[0][0], tuple((args, kwargs) for _, args, kwargs in seen))

    def run_layer(self, layer: int, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """Map the residual stream entering ``layer`` to the one leaving it, (batch, seq, d)."""
        args, kwargs = inputs.rest[layer]
        with self.precision():
            output = self.layers[layer](hidden, *args, **kwargs)
        return output if isinstance(output, Tensor) else output[0]
