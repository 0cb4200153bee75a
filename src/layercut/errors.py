"""Everything that layercut raises on purpose.

    LayercutError            exit code
    ├── RecipeError          2  a recipe key, value or flag that cannot be used
    ├── PlanError            2  a set of layers that cannot be dropped
    ├── OutputError          2  an output folder that cannot be written to
    ├── ModelError           3  a checkpoint that cannot be read or pruned
    ├── DataError            4  text or rows that cannot be used
    ├── NumericsError        5  NaN or Inf where a number is needed
    ├── VerificationError    6  the written checkpoint differs from the model in memory
    ├── ResourceError        7  disk or memory is not enough
    └── NetworkError         8  the Hub is needed and cannot be reached

A message says what is wrong, where, and what to do about it, in one or two sentences.
The command line prints it without a traceback and exits with ``exit_code``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class LayercutError(Exception):
    """Base of every error a user can cause or must hear about."""

    exit_code: ClassVar[int] = 1


class RecipeError(LayercutError):
    """A recipe key, value or flag that cannot be used."""

    exit_code = 2


class PlanError(LayercutError):
    """A set of layers that cannot be dropped."""

    exit_code = 2


class OutputError(LayercutError):
    """An output folder that cannot be written to."""

    exit_code = 2


class ModelError(LayercutError):
    """A checkpoint that cannot be read, or a model that cannot be pruned."""

    exit_code = 3


class DataError(LayercutError):
    """Text or rows that cannot be used."""

    exit_code = 4


class NumericsError(LayercutError):
    """NaN or Inf where a finite number is needed."""

    exit_code = 5


class VerificationError(LayercutError):
    """The written checkpoint does not behave as the pruned model in memory."""

    exit_code = 6


class ResourceError(LayercutError):
    """Disk or memory does not suffice."""

    exit_code = 7


class NetworkError(LayercutError):
    """The Hub is needed and cannot be reached, or refuses."""

    exit_code = 8


def suggestion(unknown: str, known: Iterable[str]) -> str:
    """``"; did you mean 'igia'?"`` for the closest known name, else an empty string."""
    close = difflib.get_close_matches(unknown, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
