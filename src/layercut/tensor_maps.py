"""Tensors by name that are not all in memory: computed when asked for, or kept in files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping

import torch
from torch import Tensor


class ComputedTensors(Mapping[str, Tensor]):
    """Tensors that are computed whenever they are asked for, and kept by nobody."""

    def __init__(self, names: Collection[str], compute: Callable[[str], Tensor]) -> None:
        """What ``compute`` makes of each of ``names``."""
        self._names, self._compute = dict.fromkeys(names), compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class FileTensors(MutableMapping[str, Tensor]):
    """Tensors in temporary files, mapped into memory: the system may drop their pages at any time.

    A file is unlinked as soon as it is mapped, so that no fault can leave it behind.
    """

    def __init__(self) -> None:
        """None yet."""
        self._mapped: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._mapped[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if tensor.numel() == 0:
            self._mapped[name] = tensor.detach().cpu()
            return
        with tempfile.NamedTemporaryFile(prefix="layercut-tensor-") as file:
            # Touching a page that the full disk cannot hold would be a SIGBUS; reserving all
            # bytes first turns that into an ordinary OSError.
            os.posix_fallocate(file.fileno(), 0, tensor.numel() * tensor.element_size())
            flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped = flat.view(tensor.shape)
        mapped.copy_(tensor.detach())
        self._mapped[name] = mapped

    def __delitem__(self, name: str) -> None:
        del self._mapped[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapped)

    def __len__(self) -> int:
        return len(self._mapped)
