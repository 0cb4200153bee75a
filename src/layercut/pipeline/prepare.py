"""A model that is about to be changed and written elsewhere."""

from __future__ import annotations

from pathlib import Path

from layercut.checkpoints.output_dir import check_disk_space, check_output_dir
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recipe.recipe import Recipe


def open_model(recipe: Recipe, output_dir: Path, *, overwrite: bool) -> DecoderView:
    """Load the recipe's model, once its destination is known to be usable.

    Raises:
        OutputError: the destination cannot be written to.
        ResourceError: the disk could not hold a copy of the weights.
        LayercutError: as for `load`.
    """
    check_output_dir(output_dir, Path(recipe.model), overwrite=overwrite)
    view = load(recipe.model, revision=recipe.revision, dtype=recipe.dtype, device=recipe.device)
    check_output_dir(output_dir, view.path, overwrite=overwrite)
    check_disk_space(view.path, output_dir)
    return view
