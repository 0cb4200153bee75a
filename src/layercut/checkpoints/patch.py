"""A patch between memory and disk: the names, shapes and dtypes that a checkpoint stores.

A patch names tensors as the input model's state dict does. On disk some families store them in
pieces (one tensor per expert), or under other names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from layercut.checkpoints.config_check import build_meta_model
from layercut.checkpoints.config_edit import read_config
from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.safetensors_file import (
    DTYPES,
    StoredTensor,
    read_stored_tensors,
    read_tensor,
)
from layercut.checkpoints.weight_names import Conversion
from layercut.errors import PlanError
from layercut.types import PruningPlan, WeightPatch


class Names:
    """How one checkpoint stores the tensors of the model's state dict.

    Attributes:
        stored: every stored tensor by its name on disk.
    """

    def __init__(self, source: Path, layout: Layout) -> None:
        self.stored: Mapping[str, StoredTensor] = read_stored_tensors(source)
        self._layout = layout
        self._model: Any = build_meta_model(read_config(read_json_object(source / "config.json")))
        conversion = Conversion(self._model)
        self._sources = {
            conversion.convert(name): name for name in self.stored if conversion.copies(name)
        }

    def on_disk(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """The pieces of a tensor by their names on disk; ``None`` if the checkpoint has none."""
        if name in self._sources:
            pieces = {self._sources[name]: tensor}
        else:
            try:
                with guard(name, PlanError, "Fit the patch again."):
                    pieces = revert_weight_conversion(self._model, {name: tensor})
            except PlanError:
                return None
            pieces = {self._spell(piece): value for piece, value in pieces.items()}
        fits = all(
            piece in self.stored and self.stored[piece].shape == tuple(value.shape)
            for piece, value in pieces.items()
        )
        return pieces if fits and pieces else None

    def _spell(self, name: str) -> str:
        """The checkpoint's own spelling: another prefix of the layers, or none of the model."""
        if name in self.stored:
            return name
        spelled = name.replace(f"{self._layout.layers}.", f"{self._layout.stored}.", 1)
        return spelled if spelled in self.stored else name.partition(".")[2]

    def dtype(self, pieces: Mapping[str, Tensor]) -> torch.dtype:
        """What the pieces of one tensor are stored in."""
        return DTYPES[self.stored[next(iter(pieces))].dtype]


def round_patch(source: Path, layout: Layout, patch: WeightPatch) -> WeightPatch:
    """The patch as a checkpoint can hold it: every tensor in the dtype that the source stores.

    Rounding before ``apply`` keeps memory and file equal when a model is computed in a wider
    dtype than it is stored in.

    Raises:
        PlanError: the patch names a tensor that the source lacks, or gives it another shape.
    """
    if not patch.tensors:
        return patch
    names = Names(source, layout)
    return replace(
        patch,
        tensors={
            name: tensor.to(names.dtype(_pieces(names, name, tensor, source)))
            for name, tensor in patch.tensors.items()
        },
    )


def encode_patch(
    source: Path, layout: Layout, plan: PruningPlan, patch: WeightPatch
) -> dict[str, Tensor]:
    """What the writer puts in the place of stored tensors, by name on disk, in their dtype.

    Raises:
        PlanError: the patch does not fit the source, or changes a layer that is dropped.
    """
    patch = rescale_queries(source, layout, plan, patch)
    if not patch.tensors:
        return {}
    dropped = [n for n in patch.tensors if layout.new_name(n, plan.new_index) is None]
    if dropped:
        raise PlanError(f"the patch changes {dropped[0]}, whose layer is dropped. Fit it again.")
    names = Names(source, layout)
    encoded: dict[str, Tensor] = {}
    for name, tensor in patch.tensors.items():
        pieces = _pieces(names, name, tensor, source)
        encoded |= {piece: value.to(names.dtype(pieces)) for piece, value in pieces.items()}
    return encoded


@torch.no_grad()
def patch_trained(
    source: Path,
    layout: Layout,
    plan: PruningPlan,
    patch: WeightPatch,
    state: Mapping[str, Tensor],
    changed: Iterable[str],
) -> WeightPatch:
    """The patch with tensors as training left them, rounded alike in memory and for the file.

    Args:
        source: the input checkpoint.
        layout: its layout.
        plan: the layers that went.
        patch: what changed before training.
        state: the trained model's tensors, which are rounded to what the source stores.
        changed: names of the trained ones in ``state``; those that the source does not store are
            tied to one that it does.
    """
    names = Names(source, layout)
    before = dict(enumerate(plan.kept))
    olds = {name: layout.new_name(name, before) for name in changed}
    trained = {
        name: old
        for name, old in olds.items()
        if old is not None and names.on_disk(old, state[name]) is not None
    }
    patch = rescale_queries(source, layout, plan, patch)
    tensors = {old: state[name] for name, old in trained.items()}
    rounded = round_patch(source, layout, replace(patch, tensors={**patch.tensors, **tensors}))
    for name, old in trained.items():
        state[name].copy_(rounded.tensors[old])
    return rounded


def rescale_queries(
    source: Path, layout: Layout, plan: PruningPlan, patch: WeightPatch
) -> WeightPatch:
    """The patch, with the queries of layers that divide by their number scaled for the new one.

    GPT-2's ``scale_attn_by_inverse_layer_idx``: layer i divides its attention scores by i + 1, so
    what was layer i and becomes layer j needs queries times (j + 1) / (i + 1).

    Args:
        source: the input checkpoint.
        layout: its layout.
        plan: which layers go.
        patch: replacements fitted in the intact model; one that is rescaled already stays.
    """
    if not layout.index_scaled or patch.rescaled:
        return patch
    assert layout.rules.index_scaled is not None
    projection = layout.rules.index_scaled[1]
    names = Names(source, layout)
    tensors = dict(patch.tensors)
    for old, new in plan.new_index.items():
        for part in ("weight", "bias") if old != new else ():
            name = f"{layout.layers}.{old}.{projection}.{part}"
            disk = f"{layout.stored}.{old}.{projection}.{part}"
            tensor = tensors.get(name)
            if tensor is None:
                tensor = read_tensor(names.stored[disk])
            dtype = tensor.dtype
            tensor = tensor.detach().float().clone()
            # Conv1D stores (in, out), and out is queries, keys and values one after the other.
            tensor[..., : tensor.shape[-1] // 3] *= (new + 1) / (old + 1)
            tensors[name] = tensor.to(dtype)
    return round_patch(source, layout, replace(patch, tensors=tensors, rescaled=True))


def _pieces(names: Names, name: str, tensor: Tensor, source: Path) -> dict[str, Tensor]:
    pieces = names.on_disk(name, tensor)
    if pieces is None:
        raise PlanError(
            f"the patch changes {name} {list(tensor.shape)}, which the checkpoint in {source} "
            "does not hold. Fit it to this model."
        )
    return pieces
