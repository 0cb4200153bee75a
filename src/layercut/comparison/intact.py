"""Whether a method changed the dense model in place, told at a cost far below a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut.training.resume import model_hash

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

N_SAMPLED = 1024
"""Numbers of each parameter that the quick check reads."""


class IntactModel:
    """A model as it was, against which it can be held again and again.

    torch counts most writes in place, but not those through ``.data``, under inference mode or by
    NumPy. So the quick check also reads a sample of every parameter; what changes other numbers
    alone is seen by the whole check, which hashes all of them.

    Args:
        view: the model.
    """

    def __init__(self, view: DecoderView) -> None:
        self._view = view
        self._hash = model_hash(view)
        self._places = self._read_places()
        self._samples = [sample.clone() for sample in self._read_samples()]

    def is_same(self) -> bool:
        """Whether neither torch's counters nor a sample of the numbers tell of a change.

        Where counters do, as after a change that was undone, all numbers are compared.
        """
        if not all(map(torch.equal, self._samples, self._read_samples())):
            return False
        places = self._read_places()
        if places == self._places:
            return True
        same = self.is_same_throughout()
        if same:
            self._places = places
        return same

    def is_same_throughout(self) -> bool:
        """Whether all numbers are the same; reads the whole model."""
        return model_hash(self._view) == self._hash

    def _read_places(self) -> list[tuple[int, int, int]]:
        """Identity, address and torch's counter of writes of every parameter."""
        now = self._view.model.parameters()
        return [(id(p), p.data_ptr(), p._version) for p in now]

    def _read_samples(self) -> Iterator[Tensor]:
        """Evenly spaced numbers of every parameter, (n,) each."""
        for parameter in self._view.model.parameters():
            flat = parameter.detach().reshape(-1)
            # Odd: an even step through rows of even length would only visit some columns.
            step = max(1, flat.numel() // N_SAMPLED) | 1
            yield flat[::step]
