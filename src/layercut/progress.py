"""Progress, from the code that does the work to whoever listens.

The pipeline names the stage, loops report their items, and a status can be shown on the way. The
command line listens with a live display; a Python caller that installs no listener pays nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Listener(Protocol):
    """Receives progress; every call must be quick and must not raise."""

    def stage(self, name: str) -> None:
        """A new stage starts."""

    def step(self, done: int, total: int) -> None:
        """``done`` of ``total`` equal steps of the current loop are finished."""

    def status(self, text: str) -> None:
        """What was measured last, e.g. ``perplexity 17.8``."""

    def line(self, text: str) -> None:
        """A sentence between two stages, which stays."""


_listener: ContextVar[Listener | None] = ContextVar("layercut_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send all progress inside the block to ``listener``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def stage(name: str) -> None:
    """Announce a stage."""
    if listener := _listener.get():
        listener.stage(name)


def status(text: str) -> None:
    """Announce what was measured last."""
    if listener := _listener.get():
        listener.status(text)


def line(text: str) -> None:
    """End the current stage and say something that stays."""
    if listener := _listener.get():
        listener.line(text)


def step(done: int, total: int) -> None:
    """Announce that ``done`` of ``total`` equal steps are finished, where no loop is ours."""
    if listener := _listener.get():
        listener.step(done, total)


def track(items: Sequence[Item] | Iterable[Item], total: int) -> Iterator[Item]:
    """Yield ``items`` and report each one as finished when the next is asked for."""
    listener = _listener.get()
    if listener:
        listener.step(0, total)
    for done, item in enumerate(items, start=1):
        yield item
        if listener:
            listener.step(done, total)
