"""What a model's work and memory follow from: the sizes of its layers, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from layercut.checkpoints.config_check import build_meta_model
from layercut.checkpoints.config_edit import read_config
from layercut.checkpoints.folder import read_model_config
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.safetensors_file import StoredTensor
from layercut.evaluation.flops import attention_width, count_active_entries
from layercut.models.dtypes import has_bfloat16, weights_dtype
from layercut.models.output_projections import attention_output, down_projection, in_features
from layercut.models.view import DecoderView


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One decoder layer.

    Attributes:
        n_parameters: those that no earlier layer has as well.
        active: entries of the matrices that one token passes through; ``None`` if the
            configuration of its experts does not say.
        attention: width of all heads' queries and values; 0 without softmax attention.
        written: numbers that its matrices write for one token.
        matrices: (out, in) of every linear map that is a weight of its own.
        down: what its only down-projection reads; 0 if it has none or several.
        output: what its attention's output projection reads; 0 if it has none.
        stored_bytes: in the files.
    """

    n_parameters: int
    active: float | None
    attention: int
    written: float
    matrices: tuple[tuple[int, int], ...]
    down: int = 0
    output: int = 0
    stored_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes.

    Attributes:
        layers: its decoder layers.
        width: of the residual stream.
        vocabulary: rows of the embedding.
        heads: of the attention; 0 if the configuration does not say.
        n_outside: parameters outside of the layers, tied ones counted once.
        item_bytes: of one weight in memory.
        stored_bytes: of all weight files.
        largest_file: the weight file with the most bytes.
        n_files: weight files.
        product_dtype: in which its matrix products run.
        device: where it computes.
    """

    layers: tuple[LayerShape, ...]
    width: int
    vocabulary: int
    heads: int
    n_outside: int
    item_bytes: int
    stored_bytes: int
    largest_file: Path
    n_files: int
    product_dtype: torch.dtype
    device: torch.device

    @property
    def n_parameters(self) -> int:
        """Of the whole model, tied ones counted once."""
        return self.n_outside + sum(layer.n_parameters for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Of all parameters in memory."""
        return self.n_parameters * self.item_bytes

    @property
    def largest_layer(self) -> int:
        """Parameters of the layer that has the most."""
        return max(layer.n_parameters for layer in self.layers)

    @property
    def inner(self) -> int:
        """The widest rows that a projection into the residual stream reads."""
        return max((max(e.down, e.output) for e in self.layers), default=0) or 4 * self.width


def read_shape(
    folder: Path,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    *,
    dtype: str,
    device: torch.device,
) -> ModelShape:
    """The sizes of a checkpoint's model; no weight is read.

    Args:
        folder: the checkpoint.
        layout: where its layers are.
        stored: its tensors, by name.
        dtype: of the recipe: ``auto``, ``float32`` or ``bfloat16``.
        device: where it will compute.
    """
    model = build_meta_model(read_config(read_model_config(folder)))
    view = DecoderView(
        model,
        None,
        name=str(folder),
        path=folder,
        layout=layout,
        fingerprint="",
        mixed_precision=False,
    )
    held = weights_dtype(dtype, stored, device)
    mixed = dtype == "auto" and held == torch.float32 and has_bfloat16(device)
    on_disk: dict[int | None, int] = {}
    files: dict[Path, int] = {}
    for name, tensor in stored.items():
        number = layout.stored_number(name)
        on_disk[number] = on_disk.get(number, 0) + tensor.nbytes
        files[tensor.path] = files.get(tensor.path, 0) + tensor.nbytes
    seen: set[int] = set()
    layers = tuple(
        _read_layer(view, layer, seen, on_disk.get(layer, 0)) for layer in range(layout.n_layers)
    )
    text = view.model.config.get_text_config(decoder=True)
    return ModelShape(
        layers=layers,
        width=view.hidden_size,
        vocabulary=view.vocabulary_size,
        heads=int(getattr(text, "num_attention_heads", None) or 0),
        n_outside=view.n_parameters - sum(layer.n_parameters for layer in layers),
        item_bytes=held.itemsize,
        stored_bytes=sum(files.values()),
        largest_file=max(files, key=lambda path: files[path]),
        n_files=len(files),
        product_dtype=torch.bfloat16 if mixed else held,
        device=device,
    )


def _read_layer(view: DecoderView, layer: int, seen: set[int], stored_bytes: int) -> LayerShape:
    """One layer; ``seen`` are the parameters of earlier ones, which some families share."""
    modules = view.linear_modules(layer)
    new = [p for p in view.layers[layer].parameters() if id(p) not in seen]
    own = {id(p) for p in new}
    active = count_active_entries(view, layer)
    dense = sum(m.weight.numel() for m in modules.values())
    routed = ((active or dense) - dense) / view.hidden_size
    matrices = tuple(
        (int(m.weight.shape[0]), int(m.weight.shape[1]))
        for m in modules.values()
        if id(m.weight) in own
    )
    seen |= own
    output, down = attention_output(view, layer), down_projection(view, layer)
    return LayerShape(
        n_parameters=sum(p.numel() for p in new),
        active=active,
        attention=attention_width(view, layer),
        written=sum(m.weight.numel() // in_features(m) for m in modules.values()) + routed,
        matrices=matrices,
        down=in_features(down[1]) if down else 0,
        output=in_features(output[1]) if output else 0,
        stored_bytes=stored_bytes,
    )
