"""The processes that share one run: who walks which sequences, and how their sums meet.

A function that knows nothing of ranks walks all sequences on every one of them, and is right. One
that is to be faster walks ``ranks.share(…)`` and adds its sums up by ``ranks.sum_(…)``. Whatever is
decided, is decided from numbers that all ranks have, so that all go the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from layercut.errors import LayercutError, RecipeError, ResourceError
from layercut.types import CalibrationBatches

PART = 1 << 24
"""Numbers that travel at once: a sum made in the machine's memory may not fit on the GPU whole."""

CPU = torch.device("cpu")

Items = TypeVar("Items", Tensor, list[Tensor], range)


@dataclass(frozen=True, slots=True)
class Ranks:
    """One process's view of all that share the run; by default it is the only one.

    Attributes:
        rank: its number.
        world: how many there are.
        local_rank: its number among those of its machine.
        gpus: of every rank, whether there is a GPU for it.
        device: where tensors travel from: the model's device.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    gpus: tuple[bool, ...] = (False,)
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """Whether it is the one that measures speed, writes and speaks."""
        return self.rank == 0

    def on(self, device: torch.device) -> Ranks:
        """The same with tensors that travel from ``device``, which is of one type on all ranks."""
        return replace(self, device=device)

    def share(self, items: Items) -> Items:
        """The part of ``items`` that this rank works on, in order; it may be empty.

        The ranks' parts, one behind the other, are ``items``; their lengths differ by one at most.
        """
        each, more = divmod(len(items), self.world)
        start = self.rank * each + min(self.rank, more)
        return items[start : start + each + (self.rank < more)]

    def share_batches(self, batches: CalibrationBatches) -> CalibrationBatches:
        """The same with this rank's share of the sequences."""
        return replace(batches, input_ids=self.share(batches.input_ids))

    def sum_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all ranks, in place; they are contiguous."""
        if self.world == 1:
            return
        for tensor in tensors:
            for part in self._parts(tensor.view(-1)):
                with _naming_a_lost_rank():
                    dist.all_reduce(part)

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all ranks."""
        totals = torch.tensor(numbers, dtype=torch.float64)
        self.sum_(totals)
        return totals.tolist()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All ranks' rows, one rank's behind the other's: those of `share` in their old order.

        Args:
            rows: (n, …), where n differs between ranks and may be 0.
        """
        if self.world == 1:
            return rows
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(rows)
        self.sum_(counts)
        gathered = rows.new_empty(int(counts.sum()), *rows.shape[1:])
        for source, place in enumerate(gathered.split(counts.tolist())):
            if source == self.rank:
                place.copy_(rows)
            self.broadcast_(place, source)
        return gathered

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replace a contiguous tensor by that of rank ``source`` modulo their number, in place."""
        if self.world == 1 or not tensor.numel():
            return
        # As bytes: not every dtype travels everywhere.
        for part in self._parts(tensor.view(-1).view(torch.uint8)):
            with _naming_a_lost_rank():
                dist.broadcast(part, source % self.world)

    def agree(self, flag: bool) -> bool:
        """Rank 0's answer, where another machine's rounding might give another one."""
        answer = torch.tensor([flag])
        self.broadcast_(answer)
        return bool(answer)

    def check_same(self, what: str, value: str, error: type[LayercutError]) -> None:
        """Refuse ranks that do not work on the same thing.

        Args:
            what: the thing, for the message.
            value: it, or its fingerprint.
            error: what is raised, on every rank.
        """
        digest = hashlib.sha256(value.encode()).digest()
        found = self.gather_rows(torch.frombuffer(bytearray(digest), dtype=torch.uint8)[None])
        other = (found != found[:1]).any(dim=1).nonzero()
        if len(other):
            raise error(
                f"rank {int(other[0])} has another {what} than rank 0. Give every process the same "
                "recipe, model and text."
            )

    def wait(self) -> None:
        """Go on when all ranks are here."""
        self.total(0)

    def choose_device(self, device: str) -> str:
        """The recipe's ``device`` as this rank uses it: one GPU each.

        Raises:
            RecipeError: all ranks would use one GPU, or some have none.
        """
        if self.world == 1 or device == "cpu" or not any(self.gpus):
            return device
        if device not in ("auto", "cuda"):
            raise RecipeError(
                f"device '{device}' would be used by {self.world} processes at once. "
                "Leave device: auto, which gives each its own GPU."
            )
        if not all(self.gpus):
            raise RecipeError(
                f"rank {self.gpus.index(False)} finds no GPU of its own, while other ranks do. "
                "Start one process for each GPU, or set device: cpu."
            )
        return f"cuda:{self.local_rank}"

    def _parts(self, flat: Tensor) -> Iterator[Tensor]:
        """Slices on `device`, written back where ``flat`` is elsewhere.

        All ranks' tensors travel the same way, wherever each found room for its own.
        """
        for part in flat.split(PART):
            moved = part.to(self.device)
            yield moved
            if moved is not part:
                part.copy_(moved)


ALONE = Ranks()
"""The only process."""


@contextmanager
def _naming_a_lost_rank() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ResourceError(
            "another rank has ended without a word: it was killed, perhaps for lack of memory, or "
            "its machine is gone. Nothing was written; start the run again."
        ) from error
