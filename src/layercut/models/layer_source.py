"""Decoder layers that are in memory only while they are held: read from files, then forgotten.

A layer is held while it runs, by hooks, and for as long as somebody says so. While one is held, a
thread reads the next one's bytes, so that two layers are in memory at most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layercut.checkpoints.layout import Layout
from layercut.errors import ModelError
from layercut.models.stored_parts import Stored, check_finite, load_part, read_decodable
from layercut.tensor_maps import ComputedTensors


@dataclass(slots=True)
class _Layer:
    """One layer: its files, and what stands in their place.

    Attributes:
        module: the layer; its parameters have no memory while nobody holds it.
        stored: what its weights are made of, by name on disk.
        prefix: of its names in the model's state dict.
        empty: its state dict without memory.
        holders: how many hold it.
        replaced: tensors that are used in the place of the files', by name in the model's state
            dict; later ones before earlier ones.
        is_checked: whether its values were found finite.
    """

    module: nn.Module
    stored: Stored
    prefix: str
    empty: dict[str, Tensor]
    holders: int = 0
    replaced: list[Mapping[str, Tensor]] = field(default_factory=list)
    is_checked: bool = False


class LayerSource:
    """The layers of one model, by index.

    Attributes:
        bytes_of_layer: what one layer takes in memory at most.
    """

    def __init__(
        self,
        model: Any,
        layout: Layout,
        stored: Sequence[Stored],
        *,
        dtype: torch.dtype,
        device: torch.device,
        skipped: Callable[[], Collection[int]],
    ) -> None:
        """Let every layer of ``model`` forget its weights but while it runs.

        Args:
            model: its layers have no memory yet.
            layout: where they are in it.
            stored: what each is made of.
            dtype: of the weights in memory.
            device: where they go.
            skipped: the layers that are passed over at the moment, and need no weights.
        """
        self._model, self._dtype, self._device, self._skipped = model, dtype, device, skipped
        self._prefix = layout.layers
        self._layers = [
            _Layer(
                module,
                stored[index],
                f"{layout.layers}.{index}.",
                {name: tensor.detach() for name, tensor in module.state_dict().items()},
            )
            for index, module in enumerate(layout.layer_list(model))
        ]
        paths = {tensor.path for layer in stored for tensor in layer.values()}
        self._files = {path: _identify(path) for path in paths}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layercut-read")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._last, self._step = -1, 1
        for index, layer in enumerate(self._layers):
            self._hold_while_running(index, layer.module)

    @property
    def bytes_of_layer(self) -> int:
        """What one layer takes in memory at most."""
        itemsize = self._dtype.itemsize
        return max(
            itemsize * sum(tensor.numel() for tensor in layer.empty.values())
            for layer in self._layers
        )

    def hold(self, index: int) -> None:
        """Have a layer's weights in memory until `release` was called as often.

        Raises:
            ModelError: the files lack one of its tensors, or have changed.
            NumericsError: a weight is NaN or Inf.
        """
        layer = self._layers[index]
        layer.holders += 1
        if layer.holders > 1:
            return
        try:
            self._fill(index, layer)
        except BaseException:
            self.release(index)
            raise
        for tensors in layer.replaced:
            self._replace(layer, tensors)

    def release(self, index: int) -> None:
        """Let go of a layer; the last one to do so lets its weights be forgotten."""
        layer = self._layers[index]
        layer.holders -= 1
        if layer.holders == 0:
            layer.module.load_state_dict(layer.empty, assign=True)

    @contextmanager
    def replacing(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Use ``tensors`` in place of the layers' own inside the block.

        A tensor is asked for when its layer is read, and may be computed from the weight that is
        in memory then.

        Args:
            tensors: by name in the model's state dict; those that are no layer's are left alone.
        """
        by_layer: dict[int, list[str]] = defaultdict(list)
        for name in filter(self.is_layers, tensors):
            by_layer[self.number(name)].append(name)
        before: list[tuple[nn.Parameter, Tensor]] = []
        parts = []
        for index, names in by_layer.items():
            layer, part = self._layers[index], ComputedTensors(names, tensors.__getitem__)
            layer.replaced.append(part)
            parts.append((layer, part))
            if layer.holders:
                before += self._replace(layer, part)
        try:
            yield
        finally:
            for layer, part in parts:
                layer.replaced = [one for one in layer.replaced if one is not part]
            for parameter, data in before:
                parameter.data = data

    def is_layers(self, name: str) -> bool:
        """Whether a tensor of the state dict belongs to a layer."""
        return name.startswith(f"{self._prefix}.")

    def number(self, name: str) -> int:
        """The layer that a layer's tensor belongs to."""
        return int(name.removeprefix(f"{self._prefix}.").partition(".")[0])

    def rebuild(
        self,
        model: Any,
        layout: Layout,
        kept: Sequence[int],
        tensors: Mapping[str, Tensor],
        skipped: Callable[[], Collection[int]],
    ) -> LayerSource:
        """The source of the pruned model: the kept layers' files under their new numbers.

        Args:
            model: the pruned one, its layers without memory.
            layout: the input model's.
            kept: layers of the input model that stay, in order.
            tensors: replacements for good, by name in the pruned model's state dict.
            skipped: as for the class.
        """
        stored = []
        for new, old in enumerate(kept):
            names = self._layers[old].stored
            renamed = {layout.new_stored_name(n, {old: new}): t for n, t in names.items()}
            stored.append({name: tensor for name, tensor in renamed.items() if name is not None})
        source = LayerSource(
            model, layout, stored, dtype=self._dtype, device=self._device, skipped=skipped
        )
        source._files = self._files
        by_layer: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            by_layer[source.number(name)][name] = tensor
        for index, layer in enumerate(source._layers):
            if index in by_layer:
                layer.replaced.append(by_layer[index])
            layer.is_checked = self._layers[kept[index]].is_checked
        return source

    def _hold_while_running(self, index: int, module: nn.Module) -> None:
        n_held = 0  # a pass that could not hold the layer must not let go of it

        def before(*_: Any) -> None:
            nonlocal n_held
            if index not in self._skipped():
                self.hold(index)
                n_held += 1

        def after(*_: Any) -> None:
            nonlocal n_held
            if n_held:
                n_held -= 1
                self.release(index)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, always_call=True)

    def _fill(self, index: int, layer: _Layer) -> None:
        content = self._take(index, layer)
        missing = load_part(self._model, content, self._dtype, self._device)
        layer.module.requires_grad_(False)
        own = {layer.prefix + name for name in layer.empty}
        if absent := own & missing:
            raise ModelError(f"the files hold nothing for {min(absent)}. Use the whole checkpoint.")
        if not layer.is_checked:
            named = layer.module.named_parameters()
            check_finite((layer.prefix + name, parameter) for name, parameter in named)
            layer.is_checked = True

    def _take(self, index: int, layer: _Layer) -> dict[str, Tensor]:
        """The layer's stored tensors, read ahead or now; starts to read the next one's."""
        self._check_files(layer)
        if self._ahead is not None and self._ahead[0] == index:
            content = self._ahead[1].result()
            self._ahead = None
        else:
            content = read_decodable(layer.stored)
        self._check_files(layer)  # again: what was read meanwhile may be half of each
        if index != self._last:
            self._step = 1 if index > self._last else -1
        self._last = index
        following = index + self._step
        while 0 <= following < len(self._layers) and following in self._skipped():
            following += self._step
        known = self._ahead is not None and self._ahead[0] == following
        if 0 <= following < len(self._layers) and not known:
            stored = self._layers[following].stored
            self._ahead = following, self._thread.submit(read_decodable, stored)
        return content

    def _check_files(self, layer: _Layer) -> None:
        for path in {tensor.path for tensor in layer.stored.values()}:
            if _identify(path) != self._files[path]:
                raise ModelError(
                    f"{path} was written to while the model was in use. Run again from a copy that "
                    "nothing changes."
                )

    def _replace(
        self, layer: _Layer, tensors: Mapping[str, Tensor]
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Put tensors into a layer that is in memory; what was there before."""
        before = []
        for name in tensors:
            parameter = layer.module.get_parameter(name.removeprefix(layer.prefix))
            before.append((parameter, parameter.data))
            parameter.data = tensors[name].to(parameter.data)
        return before


def _identify(path: Path) -> tuple[int, ...]:
    """What is another where a file's content is.

    Raises:
        ModelError: it is gone.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise ModelError(
            f"{path} is gone while the model is in use ({error.strerror}). Run again from a copy "
            "that nothing changes."
        ) from error
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
