"""`torch.topk` with a rule for equal values, of which it otherwise takes whichever it likes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor


@contextmanager
def ties_broken_alike() -> Iterator[None]:
    """Of equal values the first ones are taken, however many values there are."""
    with patch.object(torch, "topk", _topk), patch.object(Tensor, "topk", _topk):
        yield


def _topk(values: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    ordered, indices = torch.sort(values, dim=dim, descending=largest, stable=True)
    return torch.return_types.topk((ordered.narrow(dim, 0, k), indices.narrow(dim, 0, k)))
