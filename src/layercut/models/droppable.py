"""Which layers of a model may go, before anything is computed."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from layercut.checkpoints.config_check import prune_config
from layercut.checkpoints.config_edit import (
    edit_config,
    get_section,
    layer_values,
    read_config,
    section_path,
)
from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.layout import Layout
from layercut.errors import ModelError

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def layers_to_keep(view: DecoderView) -> dict[int, str]:
    """Layers that selection must not choose → why.

    They are those that the family pins, and those without which the configuration cannot be
    expressed.

    Raises:
        ModelError: no layer is left.
    """
    layout = view.layout
    fixed = dict(layout.pinned) | _inexpressible(view, layout)
    if len(fixed) == layout.n_layers:
        raise ModelError(
            f"no layer of this {layout.model_type} model can be dropped on its own: {fixed[0]} "
            "Name whole periods of its layer pattern with selection.drop."
        )
    return fixed


def check_dropped(view: DecoderView, dropped: Collection[int]) -> None:
    """Refuse a set of layers that this family cannot do without.

    Raises:
        ModelError: a layer is pinned, or the rest cannot be expressed in the configuration.
    """
    layout = view.layout
    prune_config(view.path, layout, [i for i in range(layout.n_layers) if i not in set(dropped)])


def _inexpressible(view: DecoderView, layout: Layout) -> dict[int, str]:
    raw = read_json_object(view.path / "config.json")
    config = read_config(raw)
    if not layer_values(get_section(config, section_path(config))):
        return {}
    reasons = {}
    for layer in range(layout.n_layers):
        try:
            edit_config(raw, layout.rules, [i for i in range(layout.n_layers) if i != layer])
        except ModelError as error:
            reasons[layer] = str(error)
    return reasons
