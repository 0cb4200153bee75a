"""The one place where calls into other people's libraries are guarded.

A library that stumbles over a user's file raises whatever it likes: `KeyError`, `AttributeError`,
a panic of its Rust part. `guard` wraps such a call, and nothing of ours, so that it ends in one
line that names the file, while a mistake of our own still shows its traceback. `fetch_each` does
so for every item that a library reads. `tests/contracts/test_guards.py` looks for calls without.
"""

from __future__ import annotations

import errno
import logging
import os
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import dropwhile
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HTTPError,  # the transport's base class, which the Hub's errors do not re-export
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from transformers.utils import logging as hf_logging

from layercut.errors import LayercutError, NetworkError

Item = TypeVar("Item")

MAX_REASON = 240
"""Characters of a library's own words that a message repeats."""
TELLING = (StrictDataclassError, ValueError, OSError, RuntimeError, ImportError)
"""Exceptions whose text is a sentence; others, such as ``KeyError: 'model'``, need their name."""
SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)
UNREACHABLE = (ConnectionError, TimeoutError, HTTPError, LocalEntryNotFoundError)
TRANSPORTS = frozenset({"aiohttp", "requests", "urllib3"})
"""Libraries whose every exception is about a connection."""
WRAPPERS = frozenset({"DatasetGenerationError"})
"""Exceptions that only say that something failed; their cause says what."""
PACKAGE = str(Path(__file__).parents[1]) + os.sep
DECORATOR = str(Path("torch") / "utils" / "_contextlib.py")
"""Where `torch.no_grad` calls what it decorates: no library that calls back."""
_END = object()


@contextmanager
def guard(
    what: str, error: type[LayercutError], remedy: str, *, offline: str = ""
) -> Iterator[None]:
    """Run a library's call on a user's input: silently, and with one kind of failure.

    Put the call alone inside: an exception of our own code would be blamed on the input. Only what
    the library calls back is known as ours.

    Args:
        what: the file and what is wrong with it, such as ``x/config.json does not describe a
            model``; the library's reason follows it.
        error: what to raise.
        remedy: what the user can do, as a sentence.
        offline: the same where the Hub was needed and did not answer; empty: it is not needed.

    Raises:
        LayercutError: ``error``, whatever the library raised. Errors of layercut, of its code that
            a library called back, interruptions and a full disk or memory pass as they are.
        NetworkError: with ``offline``: the Hub cannot be reached, or refuses.
    """
    try:
        with quiet():
            yield
    except (LayercutError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failure:  # a panic of a library's Rust part is no `Exception`
        if _is_shortage(failure) or _is_ours(failure.__traceback__):
            raise
        text = f"{what}: {describe_failure(failure)}."
        if offline and _is_unreachable(failure):
            raise NetworkError(f"{text} {offline}") from failure
        raise error(f"{text} {remedy}") from failure


def fetch_each(
    items: Iterable[Item], what: str, error: type[LayercutError], remedy: str, *, offline: str = ""
) -> Iterator[Item]:
    """The items that a library reads one by one, each under `guard`; their use is outside of it.

    Args:
        items: of the library.
        what: as for `guard`, like the rest.
        error: what to raise.
        remedy: what the user can do.
        offline: the same where the Hub did not answer.

    Raises:
        LayercutError: as `guard`.
    """
    with guard(what, error, remedy, offline=offline):
        iterator = iter(items)
    while True:
        with guard(what, error, remedy, offline=offline):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]


def describe_failure(failure: BaseException) -> str:
    """A library's reason on one line, without the full stop at its end."""
    if type(failure).__name__ in WRAPPERS and failure.__cause__ is not None:
        return describe_failure(failure.__cause__)
    text = " ".join(str(failure).split()).rstrip(" .:")
    name = type(failure).__name__
    if not text:
        return name
    if len(text) > MAX_REASON:
        text = text[:MAX_REASON] + " …"
    told = isinstance(failure, TELLING) and not isinstance(failure, RecursionError)
    return text if told else f"{name}: {text}"


def _is_shortage(failure: BaseException) -> bool:
    """Whether disk or memory ran out, which the program reports by itself."""
    if isinstance(failure, OSError) and failure.errno in SHORTAGES:
        return True
    return type(failure).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(failure)


def _is_ours(raised: TracebackType | None) -> bool:
    """Whether the library had called back into layercut, whose own mistake it then is."""
    places = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(raised)]
    called = [place for place in places if not place.endswith(DECORATOR)]
    below = dropwhile(lambda place: place.startswith(PACKAGE), called)
    return any(place.startswith(PACKAGE) for place in below)


def _is_unreachable(failure: BaseException) -> bool:
    """Whether the connection failed, and not what came through it."""
    cause: BaseException | None = failure
    while cause is not None:
        kind = type(cause)
        if kind.__name__ == "DatasetNotFoundError":  # the Hub answered that there is none
            return False
        if isinstance(cause, UNREACHABLE) or kind.__module__.partition(".")[0] in TRANSPORTS:
            return True
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return False


@contextmanager
def muted() -> Iterator[None]:
    """Keep what a library's Rust part prints by itself from the terminal, panics included."""
    kept: dict[int, int] = {}
    try:
        for descriptor in (1, 2):
            with suppress(OSError):  # closed: nothing can be printed there
                kept[descriptor] = os.dup(descriptor)
        with Path(os.devnull).open("wb") as nowhere:
            for descriptor in kept:
                os.dup2(nowhere.fileno(), descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, advice and warnings from the terminal."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    before = logging.root.manager.disable
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
