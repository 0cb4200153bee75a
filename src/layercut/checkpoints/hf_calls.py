"""The one place where calls into other people's libraries are guarded.

A library that stumbles over a user's file raises whatever it likes: `KeyError`, `AttributeError`,
a panic of its Rust part. `guard` wraps such a call, and nothing of ours, so that it ends in one
line that names the file, while a mistake of our own still shows its traceback.
"""

from __future__ import annotations

import errno
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers.utils import logging as hf_logging

from layercut.errors import LayercutError

MAX_REASON = 240
"""Characters of a library's own words that a message repeats."""
TELLING = (StrictDataclassError, ValueError, OSError, RuntimeError, ImportError)
"""Exceptions whose text is a sentence; others, such as ``KeyError: 'model'``, need their name."""
SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


@contextmanager
def guard(what: str, error: type[LayercutError], remedy: str) -> Iterator[None]:
    """Run a library's call on a user's input: silently, and with one kind of failure.

    Put the call alone inside: an exception of our own code would be blamed on the input.

    Args:
        what: the file and what is wrong with it, such as ``x/config.json does not describe a
            model``; the library's reason follows it.
        error: what to raise.
        remedy: what the user can do, as a sentence.

    Raises:
        LayercutError: ``error``, whatever the library raised. Errors of layercut, interruptions
            and a full disk or memory pass as they are.
    """
    try:
        with quiet():
            yield
    except (LayercutError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as failure:  # a panic of a library's Rust part is no `Exception`
        if _is_shortage(failure):
            raise
        raise error(f"{what}: {describe_failure(failure)}. {remedy}") from failure


def describe_failure(failure: BaseException) -> str:
    """A library's reason on one line, without the full stop at its end."""
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
