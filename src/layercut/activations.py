"""The residual stream of a whole calibration set, advanced one layer at a time.

Walking layer by layer lets a dense and a pruned model be compared at every depth in one pass
each, with only the current residual streams kept. Past a memory limit they live in a file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layercut.models.view import DecoderView, LayerInputs
from layercut.types import CalibrationBatches

MEMORY_LIMIT_BYTES = 2 * 1024**3
"""One set of activations larger than this is spooled to a temporary file."""


class Spool:
    """Equal rows of float32 numbers, written and read in slices; a file past the memory limit.

    The file is unlinked as soon as it is mapped, so that no fault can leave it behind.
    """

    def __init__(self, n_rows: int, width: int, *, limit_bytes: int = MEMORY_LIMIT_BYTES) -> None:
        self.on_disk = n_rows * width * 4 > limit_bytes
        if self.on_disk:
            with tempfile.NamedTemporaryFile(prefix="layercut-spool-") as file:
                # A mapping shorter than its file's future pages would die with SIGBUS on a full
                # disk; reserving the bytes first turns that into an ordinary OSError.
                _reserve(file.fileno(), n_rows * width * 4)
                flat = torch.from_file(
                    str(Path(file.name)), shared=True, size=n_rows * width, dtype=torch.float32
                )
            self._rows = flat.view(n_rows, width)
        else:
            self._rows = torch.empty(n_rows, width)

    def __len__(self) -> int:
        return int(self._rows.shape[0])

    def write(self, start: int, rows: Tensor) -> None:
        """Put ``rows``, flattened to (n, width), at row ``start``."""
        rows = rows.detach().reshape(-1, self._rows.shape[1])
        self._rows[start : start + rows.shape[0]].copy_(rows)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as a view, (stop − start, width)."""
        return self._rows[start:stop]

    def slices(self, n_rows: int = 4096) -> Iterator[Tensor]:
        """All rows in order, as views of at most ``n_rows``."""
        yield from self._rows.split(n_rows)


def _reserve(descriptor: int, n_bytes: int) -> None:
    import os

    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.ftruncate(descriptor, n_bytes)


class ResidualStream:
    """h_l of every calibration token, for a current l, kept as (n_tokens, d) float32 rows.

    Attributes:
        layer: the layer that the stream enters next.
        states: the rows, sequences in order.
    """

    def __init__(self, view: DecoderView, batches: CalibrationBatches) -> None:
        self.view = view
        self.layer = 0
        n_tokens = batches.n_sequences * batches.seq_len
        self.states = Spool(n_tokens, view.hidden_size)
        self._inputs: dict[int, tuple[tuple[dict[str, Any], ...], torch.dtype]] = {}
        self._spans: list[tuple[int, int, int]] = []
        start = 0
        for ids in batches.micro_batches():
            inputs = view.embed(ids)
            self.states.write(start, inputs.hidden)
            self._spans.append((start, start + ids.numel(), ids.shape[0]))
            # Packed windows have no padding: masks and rotary tables depend on the shape alone.
            self._inputs.setdefault(ids.shape[0], (inputs.kwargs, inputs.hidden.dtype))
            start += ids.numel()

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Run every token through ``layer``; the stream then enters ``layer + 1``.

        In the pruned model, call it with the kept layers only: the dropped ones do not change
        the stream.
        """
        for start, stop, n_sequences in self._spans:
            kwargs, dtype = self._inputs[n_sequences]
            rows = self.states.read(start, stop)
            hidden = rows.view(n_sequences, -1, rows.shape[1]).to(self.view.device, dtype)
            inputs = LayerInputs(hidden=hidden, kwargs=kwargs)
            self.states.write(start, self.view.run_layer(layer, hidden, inputs).float())
        self.layer = layer + 1
