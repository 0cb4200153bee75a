"""Equal rows of numbers: on the model's GPU where they fit, else in memory, or in a file."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

SLICE = 4096
"""Rows that are worked on at once: float32 sums of more lose digits."""

MEMORY_LIMIT_BYTES = 1024**3
"""One set of activations larger than this is spooled to a temporary file."""

DEVICE_SHARE = 0.5
"""Part of a GPU's free memory that one set of rows may take: its sums need as much again."""


CAREFUL_SHARE = 0.25
"""Part of a GPU's free memory that is used at all, once it has run out."""

_usable_share: ContextVar[float] = ContextVar("usable_share", default=1.0)


@contextmanager
def sparing_the_device() -> Iterator[None]:
    """Put fewer rows and sums onto the GPU inside the block."""
    token = _usable_share.set(CAREFUL_SHARE)
    try:
        yield
    finally:
        _usable_share.reset(token)


def choose_device(device: torch.device, n_bytes: float) -> torch.device:
    """The GPU of the model if it has ``n_bytes`` free, else the CPU.

    Between a GPU and the machine's memory, the rows of a large model take longer to copy than its
    forward passes to compute.
    """
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        # What torch holds and nothing uses is free as well: without it the second sum has no room.
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if _usable_share.get() * free > n_bytes:
            return device
    return torch.device("cpu")


class Spool:
    """Equal rows of float32 numbers, written and read in slices.

    They are on ``device`` if that is a GPU with room for them, else in memory, or in a file past
    the memory limit.

    The file is unlinked as soon as it is mapped, so that no fault can leave it behind.

    Attributes:
        rows: all of them, (n_rows, width).
        on_disk: whether they are mapped from a file.
    """

    def __init__(
        self,
        n_rows: int,
        width: int,
        *,
        device: torch.device | None = None,
        limit_bytes: int | None = None,
    ) -> None:
        n_bytes = n_rows * width * 4
        self.on_disk = False
        place = choose_device(device, n_bytes / DEVICE_SHARE) if device else torch.device("cpu")
        if place.type == "cuda":
            self.rows = torch.empty(n_rows, width, device=place)
            return
        self.on_disk = n_bytes > (MEMORY_LIMIT_BYTES if limit_bytes is None else limit_bytes)
        if not self.on_disk:
            self.rows = torch.empty(n_rows, width)
            return
        with tempfile.NamedTemporaryFile(prefix="layercut-spool-") as file:
            # Touching a page that the full disk cannot hold would be a SIGBUS; reserving all
            # bytes first turns that into an ordinary OSError.
            os.posix_fallocate(file.fileno(), 0, n_bytes)
            flat = torch.from_file(file.name, shared=True, size=n_rows * width)
        self.rows = flat.view(n_rows, width)

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def write(self, start: int, rows: Tensor) -> None:
        """Put ``rows``, flattened to (n, width), at row ``start``."""
        rows = rows.detach().reshape(-1, self.rows.shape[1])
        self.rows[start : start + rows.shape[0]].copy_(rows)

    def slices(self, n_rows: int = SLICE) -> Iterator[Tensor]:
        """All rows in order, as views of at most ``n_rows``."""
        yield from self.rows.split(n_rows)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.rows.device

    def part(self, start: int, stop: int | None) -> Spool:
        """Rows ``start`` to ``stop``, sharing their memory."""
        part = copy.copy(self)
        part.rows = self.rows[start:stop]
        return part

    @contextmanager
    def filling(self) -> Iterator[Callable[[Tensor, Tensor], None]]:
        """A hook that writes a module's outputs one after the other, from the first row on."""
        next_row = 0

        def write(_: Tensor, output: Tensor) -> None:
            nonlocal next_row
            self.write(next_row, output)
            next_row += output.numel() // self.rows.shape[1]

        yield write
