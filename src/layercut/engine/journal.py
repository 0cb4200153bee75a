"""What a run has decided so far, so that it can go on after an interruption.

A decision has a kind, ``refitted layers``, and an item of that kind, ``5``. What is computed from
recorded decisions alone is computed again: the same operations on the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Item = int | str


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision.

    Attributes:
        values: what JSON can hold, with strings as keys and lists instead of tuples.
        tensors: by name, of floating-point numbers.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


class Journal:
    """A journal that remembers nothing: everything is computed. `FileJournal` has a memory."""

    def find(self, kind: str, item: Item) -> Entry | None:
        """The recorded decision, if there is one."""
        return None

    def record(self, kind: str, item: Item, entry: Entry) -> bool:
        """Keep a decision; returns whether it is kept."""
        return False

    def discard(self, kind: str, item: Item) -> None:
        """Forget a decision that a later one has made useless."""

    def conclude(self, kind: str, item: Item) -> None:
        """Forget all others of this scope, which have led to this decision, if it is recorded."""

    def within(self, scope: str) -> Journal:
        """The part of the journal whose decisions belong to ``scope``, e.g. to one plan."""
        return self

    def recall(self, kind: str, item: Item, compute: Callable[[], Entry]) -> Entry:
        """The recorded decision, or that of ``compute``, which is then recorded."""
        return compute()

    def recall_number(self, kind: str, item: Item, compute: Callable[[], float]) -> float:
        """As `recall`, of a single number."""
        entry = self.recall(kind, item, lambda: Entry({"value": compute()}))
        return float(entry.values["value"])


NO_JOURNAL = Journal()
