"""One layer run with what some of its modules write set by hand, to see what it adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layercut.models.view import DecoderView, LayerInputs

TOLERANCE = 0.03
"""Share of y that a form may miss: bfloat16 rounds to 1/256, another form misses wholly."""


class LayerProbe:
    """Runs one layer with the outputs of some modules replaced."""

    def __init__(
        self,
        view: DecoderView,
        layer: int,
        inputs: LayerInputs,
        streams: Sequence[Tensor],
        silent: Sequence[nn.Module],
    ) -> None:
        """Take what the layer makes of each stream, (1, tokens, d), while they write nothing."""
        self._view, self._layer, self._inputs, self._silent = view, layer, inputs, silent
        self._streams = streams
        self._without = [self._run(stream, {}) for stream in streams]

    def write(self, module: nn.Module, z: Tensor) -> list[Tensor]:
        """What each stream receives, (tokens, d) float32, where one of them gives z."""
        pairs = zip(self._streams, self._without, strict=True)
        return [self._run(stream, {module: z}) - without for stream, without in pairs]

    def is_alone(self, module: nn.Module, z: Tensor, y: Tensor) -> bool:
        """Whether y, what z becomes, is the same while the other modules write what they do."""
        stream = self._streams[1]
        own = self._run(stream, {module: z}, [module]) - self._run(stream, {}, [module])
        return bool((own - y).norm() <= TOLERANCE * y.norm())

    def _run(
        self,
        stream: Tensor,
        outputs: Mapping[nn.Module, Tensor],
        silent: Sequence[nn.Module] | None = None,
    ) -> Tensor:
        with ExitStack() as stack:
            for module in self._silent if silent is None else silent:
                hook = _replace_output(outputs.get(module))
                stack.callback(module.register_forward_hook(hook).remove)
            output = self._view.run_layer(self._layer, stream, self._inputs)
        return output.float().flatten(0, 1)


@contextmanager
def noting_readers(layer: nn.Module, z: Tensor, found: dict[str, nn.Module]) -> Iterator[None]:
    """Note the modules with a gain that read just z inside the block, by path in the layer."""
    with ExitStack() as stack:
        for path, reader in layer.named_modules():
            if _has_gain(reader, z.shape[1]):
                look = _look_for(z, found, path, reader)
                stack.callback(reader.register_forward_pre_hook(look).remove)
        yield


def _replace_output(output: Tensor | None) -> Any:
    def hook(_: nn.Module, __: Any, own: Any) -> Any:
        if isinstance(own, tuple):  # a block of experts may return its router's scores as well
            return (torch.zeros_like(own[0]), *own[1:])
        if output is None:
            return torch.zeros_like(own)
        if own.numel() > output.numel():  # every expert's own output: the first one's is z
            own = torch.zeros_like(own)
            own.view(-1, output.shape[-1])[: len(output)] = output.to(own.dtype)
            return own
        return output.view_as(own).to(own.dtype)

    return hook


def _look_for(z: Tensor, found: dict[str, nn.Module], path: str, reader: nn.Module) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        read = args[0] if args and isinstance(args[0], Tensor) else None
        if read is not None and read.numel() == z.numel() and torch.equal(read.view_as(z).to(z), z):
            found[path] = reader

    return hook


def _has_gain(module: nn.Module, width: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.shape == (width,)
