"""The residual stream of a whole calibration set, advanced one layer at a time.

Walking layer by layer lets a dense and a pruned model be compared at every depth in one pass
each, with only the current residual streams kept. Past a memory limit they live in a file.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import nn

from layercut.models.hooks import capture
from layercut.models.output_projections import LinearMap, in_features
from layercut.models.view import DecoderView, LayerInputs
from layercut.spool import Spool
from layercut.types import CalibrationBatches


def accumulation_device(device: torch.device, n_bytes: int) -> torch.device:
    """Where sums over spooled rows are made: the model's GPU if it has ``n_bytes`` free.

    Rows are spooled in the machine's memory, but on its cores the products of a large model's
    activations take longer than its forward passes on a GPU.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What torch holds and nothing uses is free as well: without it the second sum has no room.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if free > n_bytes:
            return device
    return torch.device("cpu")


class ResidualStream:
    """h_l of every calibration token, for a current l, kept as (n_tokens, d) float32 rows.

    Attributes:
        layer: the layer that the stream enters next.
        states: the rows, sequences in order.
        history: with ``remember``, the rows of every boundary passed so far, so that `rewind` can
            go back to one and `advance` from there costs nothing.
        saved_seconds: what that has saved so far.
        layer_seconds: what every layer took when its rows were not known.
    """

    def __init__(
        self, view: DecoderView, batches: CalibrationBatches, *, remember: bool = False
    ) -> None:
        self.view = view
        self.layer = 0
        self.history: list[Spool] | None = None
        self.saved_seconds = 0.0
        self.layer_seconds: list[float] = []
        n_tokens = batches.n_sequences * batches.seq_len
        self.states = Spool(n_tokens, view.hidden_size)
        self._inputs: dict[int, tuple[Any, torch.dtype]] = {}
        self._spans: list[tuple[int, int, int]] = []
        start = 0
        for ids in batches.micro_batches():
            inputs = view.embed(ids)
            self.states.write(start, inputs.hidden)
            self._spans.append((start, start + ids.numel(), ids.shape[0]))
            # Packed windows have no padding: masks and rotary tables depend on the shape alone.
            self._inputs.setdefault(ids.shape[0], (inputs.rest, inputs.hidden.dtype))
            start += ids.numel()
        if remember:
            self.history = [self.states]

    def rewind(self, layer: int) -> None:
        """Go back to the rows that enter ``layer``."""
        assert self.history is not None
        self.layer, self.states = layer, self.history[layer]

    def advance_to(self, layer: int) -> None:
        """Run every token through all layers in front of ``layer``."""
        while self.layer < layer:
            self.advance(self.layer)

    def fork(self) -> ResidualStream:
        """An independent stream at the same place."""
        twin = copy.copy(self)
        twin.history = None
        twin.states = Spool(len(self.states), self.view.hidden_size)
        twin.states.write(0, self.states.rows)
        return twin

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run every token through ``layer``; the stream then enters ``layer + 1``.

        In the pruned model, call it with the kept layers only: the dropped ones do not change
        the stream.
        """
        begun = time.perf_counter()
        if self.history is not None:
            if layer + 1 < len(self.history):
                self.rewind(layer + 1)
                self.saved_seconds += self.layer_seconds[layer]
                return
            self.states = Spool(len(self.states), self.view.hidden_size)
            self.states.write(0, self.history[layer].rows)
            self.history.append(self.states)
        for start, stop, n_sequences in self._spans:
            rest, dtype = self._inputs[n_sequences]
            rows = self.states.rows[start:stop]
            hidden = rows.view(n_sequences, -1, rows.shape[1]).to(self.view.device, dtype)
            inputs = LayerInputs(hidden, rest)
            self.states.write(start, self.view.run_layer(layer, hidden, inputs).float())
        self.layer = layer + 1
        if self.history is not None:
            self.layer_seconds.append(time.perf_counter() - begun)


def start_dense_stream(
    view: DecoderView, batches: CalibrationBatches, shared: ResidualStream | None = None
) -> ResidualStream:
    """The intact model's stream at layer 0: the shared one, rewound, where there is one.

    It is only read and advanced; what changes a stream's rows works on a `fork`.
    """
    if shared is None:
        return ResidualStream(view, batches)
    shared.rewind(0)
    return shared


def advance_and_record_inputs(stream: ResidualStream, layer: int, module: LinearMap) -> Spool:
    """Move ``stream`` past ``layer`` and return what ``module`` read, (n_tokens, in)."""
    inputs = Spool(len(stream.states), in_features(module))
    with inputs.filling() as write, capture(module, lambda read, _: write(read, read)):
        stream.advance(layer)
    return inputs


def advance_and_record_outputs(stream: ResidualStream, layer: int, module: nn.Module) -> Spool:
    """Move ``stream`` past ``layer`` and return what ``module`` adds to it, (n_tokens, d)."""
    outputs = Spool(len(stream.states), stream.states.rows.shape[1])
    with outputs.filling() as write, capture(module, write):
        stream.advance(layer)
    return outputs


def history_bytes(view: DecoderView, batches: CalibrationBatches) -> int:
    """What a stream with ``remember`` holds after the last layer."""
    return (view.n_layers + 1) * batches.input_ids.numel() * view.hidden_size * 4
