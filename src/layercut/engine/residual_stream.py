"""The residual stream of a whole calibration set, advanced one layer at a time.

Walking layer by layer lets a dense and a pruned model be compared at every depth in one pass
each, with only the current residual streams kept. Past a memory limit they live in a file.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from layercut.models.hooks import capture
from layercut.models.output_projections import LinearMap, in_features
from layercut.models.view import DecoderView, LayerInputs
from layercut.spool import Spool
from layercut.types import CalibrationBatches, split_rows

Visitor = Callable[[Tensor, Tensor], None]


class ResidualStream:
    """h_l of every token of ``batches``, for a current l, kept as (n_tokens, d) float32 rows.

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
        self.micro_batch, self.seq_len = batches.micro_batch, batches.seq_len
        self.states = Spool(
            batches.n_sequences * self.seq_len, view.hidden_size, device=view.device
        )
        self._input_ids = batches.input_ids
        self._inputs: dict[int, tuple[Any, torch.dtype]] = {}
        self._spans = self._divide(batches.n_sequences)
        for (start, _, n_sequences), ids in zip(self._spans, batches.micro_batches(), strict=True):
            inputs = view.embed(ids)
            self.states.write(start, inputs.hidden)
            self._inputs.setdefault(n_sequences, (inputs.rest, inputs.hidden.dtype))
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
        twin.states = Spool(len(self.states), self.view.hidden_size, device=self.view.device)
        twin.states.write(0, self.states.rows)
        return twin

    def take_sequences(self, sequences: Tensor) -> ResidualStream:
        """An independent stream of some of the sequences, at the same place.

        Args:
            sequences: their indices, (n,), int64.
        """
        part = copy.copy(self)
        part.history = None
        seq_len = self.seq_len
        part.states = Spool(
            len(sequences) * seq_len, self.view.hidden_size, device=self.view.device
        )
        for place, sequence in enumerate(sequences.tolist()):
            rows = self.states.rows[sequence * seq_len : (sequence + 1) * seq_len]
            part.states.write(place * seq_len, rows)
        part._spans = self._divide(len(sequences))
        return part

    def _divide(self, n_sequences: int) -> list[tuple[int, int, int]]:
        """Micro-batches: first row, row behind the last, number of sequences."""
        starts = range(0, n_sequences, self.micro_batch)
        sizes = [min(self.micro_batch, n_sequences - start) for start in starts]
        return [
            (start * self.seq_len, (start + size) * self.seq_len, size)
            for start, size in zip(starts, sizes, strict=True)
        ]

    def _arguments(self, n_sequences: int) -> tuple[Any, torch.dtype]:
        """What the layers of a micro-batch are given beside the stream, and the stream's dtype.

        Packed windows have no padding: masks and rotary tables depend on the shape alone.
        """
        if n_sequences not in self._inputs:
            inputs = self.view.embed(self._input_ids[:n_sequences])
            self._inputs[n_sequences] = inputs.rest, inputs.hidden.dtype
        return self._inputs[n_sequences]

    @torch.no_grad()
    def normed_states(self, input_ids: Tensor) -> Iterator[Tensor]:
        """What the final norm makes of the stream behind the last layer, by micro-batch.

        Args:
            input_ids: the stream's sequences, (n, seq).
        """
        for hidden, ids in self._last_states(input_ids):
            yield self.view.norm_states(hidden, ids)

    @torch.no_grad()
    def losses(self, input_ids: Tensor) -> Iterator[Tensor]:
        """Cross-entropy of every predicted token behind the last layer, by micro-batch.

        Args:
            input_ids: the stream's sequences, (n, seq).
        """
        for hidden, ids in self._last_states(input_ids):
            yield self.view.stream_losses(hidden, ids)

    def _last_states(self, input_ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for (start, stop, n_sequences), ids in zip(
            self._spans, split_rows(input_ids, self.micro_batch), strict=True
        ):
            rows = self.states.rows[start:stop].view(n_sequences, self.seq_len, -1)
            yield rows.to(self.view.device, self._arguments(n_sequences)[1]), ids

    @torch.no_grad()
    def advance(self, layer: int, visit: Visitor | None = None) -> None:
        """Run every token through ``layer``; the stream then enters ``layer + 1``.

        In the pruned model, call it with the kept layers only: the dropped ones do not change
        the stream.

        Args:
            layer: which one.
            visit: is given h_l and h_{l+1} of every micro-batch, (batch, seq, d) each.
        """
        begun = time.perf_counter()
        if self.history is not None:
            if layer + 1 < len(self.history):
                self.rewind(layer + 1)
                self.saved_seconds += self.layer_seconds[layer]
                return
            self.states = Spool(len(self.states), self.view.hidden_size, device=self.view.device)
            self.states.write(0, self.history[layer].rows)
            self.history.append(self.states)
        with self.view.holding(layer):
            for start, stop, n_sequences in self._spans:
                rest, dtype = self._arguments(n_sequences)
                rows = self.states.rows[start:stop]
                hidden = rows.view(n_sequences, -1, rows.shape[1]).to(self.view.device, dtype)
                output = self.view.run_layer(layer, hidden, LayerInputs(hidden, rest))
                if visit is not None:
                    visit(hidden, output)
                self.states.write(start, output.float())
        self.layer = layer + 1
        if self.history is not None:
            float(self.states.rows[-1:].sum())  # a GPU works behind the clock's back: wait for it
            self.layer_seconds.append(time.perf_counter() - begun)


def split_for_walk(view: DecoderView, batches: CalibrationBatches) -> list[CalibrationBatches]:
    """Parts that walk through the layers one after the other, for what keeps many streams.

    They are micro-batches, or everything at once where every walk reads the layers from files.
    """
    if view.source is not None:
        return [batches]
    return [replace(batches, input_ids=ids) for ids in batches.micro_batches()]


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


def advance_and_record(stream: ResidualStream, layer: int, module: LinearMap) -> Spool:
    """Move ``stream`` past ``layer`` and keep what one of its linear maps read, (n_tokens, in)."""
    read = Spool(len(stream.states), in_features(module), device=stream.view.device)
    with read.filling() as write, capture(module, lambda a, _: write(a, a)):
        stream.advance(layer)
    return read


def advance_and_record_outputs(stream: ResidualStream, layer: int, module: nn.Module) -> Spool:
    """Move ``stream`` past ``layer`` and return what ``module`` adds to it, (n_tokens, d)."""
    outputs = Spool(len(stream.states), stream.states.rows.shape[1], device=stream.view.device)
    with outputs.filling() as write, capture(module, write):
        stream.advance(layer)
    return outputs


def history_bytes(view: DecoderView, batches: CalibrationBatches) -> int:
    """What a stream with ``remember`` holds after the last layer."""
    return (view.n_layers + 1) * batches.input_ids.numel() * view.hidden_size * 4
