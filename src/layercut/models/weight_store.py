"""Where changed weights are kept: in memory, or in files beside a model that is read from files."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor

from layercut.models.view import DecoderView
from layercut.tensor_maps import FileTensors


def make_store(view: DecoderView) -> MutableMapping[str, Tensor]:
    """An empty place for tensors as many and as large as the model's weights."""
    return {} if view.source is None else FileTensors()


def collect(view: DecoderView, tensors: Mapping[str, Tensor]) -> MutableMapping[str, Tensor]:
    """Every tensor of a mapping that computes each from the weight of its name, stored.

    Args:
        view: the model.
        tensors: by name in its state dict.
    """
    store = make_store(view)
    source = view.source
    if source is None:
        store.update(tensors)
        return store
    layers = {name: source.number(name) for name in tensors if source.is_layers(name)}
    for layer in sorted(set(layers.values())):
        with view.holding(layer):
            for name in [name for name, number in layers.items() if number == layer]:
                store[name] = tensors[name]
    for name in tensors.keys() - layers.keys():
        store[name] = tensors[name]
    return store
