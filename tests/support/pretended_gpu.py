"""A GPU that is pretended: tensors stay where they are, but are refused where a real one refuses.

It finds what mixes a tensor of the machine's memory with one of the GPU's, which no CPU notices. It
knows nothing of a GPU's arithmetic, speed or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.weak import WeakIdKeyDictionary

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
COPIES = {"copy_", "__set__"}
"""What brings a tensor of the one place to the other by itself."""


class PretendedGpu(TorchFunctionMode):
    """Knows which tensors would be on the GPU, and refuses operations on tensors of both places."""

    def __init__(self) -> None:
        super().__init__()
        self._there = WeakIdKeyDictionary()

    def put(self, module: nn.Module) -> None:
        """Take a module's parameters and buffers for the GPU's."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._there[tensor] = True

    def has(self, tensor: Tensor) -> bool:
        """Whether a tensor would be on the GPU."""
        return tensor in self._there

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [one for one in tree_iter((args, kwargs)) if isinstance(one, Tensor)]
        name = getattr(function, "__name__", "")
        if name == "__get__" and function.__self__ is Tensor.device:
            return GPU if self.has(given[0]) else CPU
        if name == "__get__" and function.__self__ is Tensor.is_cuda:
            return self.has(given[0])
        there = self._place(name, given, args, kwargs)
        args, kwargs = tree_map(lambda one: CPU if _is_gpu(one) else one, (args, kwargs))
        result = function(*args, **kwargs)
        if name in ("to", "cpu") and self.has(given[0]) != there:
            result = result.clone()  # what moves is another tensor
        for one in tree_iter(result):
            if isinstance(one, Tensor):
                self._mark(one, there)
        return result

    def _place(
        self, name: str, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether the result is on the GPU."""
        if name == "cpu":
            return False
        wanted = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.device | str)]
        places = [torch.device(one) for one in wanted if str(one).split(":")[0] in ("cpu", "cuda")]
        if places:
            return places[0].type == "cuda"
        if name in ("to", "type_as"):
            return self.has(given[-1])  # of two tensors the second says where
        # Single numbers of the machine's memory are read by any operation.
        bound = [one for one in given if one.dim() or self.has(one)]
        if name not in COPIES:
            assert len({self.has(one) for one in bound}) < 2, f"{name} on tensors of two places"
        return bool(bound) and self.has(bound[0])

    def _mark(self, tensor: Tensor, there: bool) -> None:
        if there:
            self._there[tensor] = True
        elif tensor in self._there:
            del self._there[tensor]


def _is_gpu(value: Any) -> bool:
    return isinstance(value, torch.device | str) and str(value).split(":")[0] == "cuda"


@contextmanager
def pretended_gpu(free_bytes: int = 2**40, unused_bytes: int = 0) -> Iterator[PretendedGpu]:
    """Inside the block, what is put on ``GPU`` must not meet what is not.

    Args:
        free_bytes: what nobody has taken of its memory.
        unused_bytes: what torch has taken and holds for later.
    """
    figures = {
        "mem_get_info": (free_bytes, free_bytes),
        "memory_reserved": unused_bytes,
        "memory_allocated": 0,
    }
    told = {name: mock.Mock(return_value=figure) for name, figure in figures.items()}
    with mock.patch.multiple("torch.cuda", **told), PretendedGpu() as mode:
        yield mode
