"""Layers that the pruned configuration would make into others, and tensors without a place."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from transformers import CONFIG_MAPPING

from conftest import plan_of
from family_configs import Family
from layercut.checkpoints.config_check import check_same_layers
from layercut.checkpoints.config_edit import edit_config
from layercut.checkpoints.families import FamilyRules
from layercut.checkpoints.preflight import read_layout
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import ModelError
from saved_families import NOTHING, save_family
from toy_configs import toy_settings


def numbered(*table_indices: int | None) -> nn.ModuleList:
    layers = nn.ModuleList(nn.Module() for _ in table_indices)
    for number, (layer, index) in enumerate(zip(layers, table_indices, strict=True)):
        layer.layer_idx = number
        if index is not None:
            layer.table_index = index
    return layers


def test_a_number_that_counts_its_owners_must_not_change() -> None:
    # Old layers 2 and 3 own tables 0 and 1. Layers 0 and 2 go: layer 3 would own table 0, which
    # happens to be the new number of layer 1.
    old, new = numbered(None, None, 0, 1), numbered(None, 0)
    with pytest.raises(ModelError, match="table_index would change from 1 to 0"):
        check_same_layers(old, new, [1, 3], frozenset())


def test_a_layers_own_number_may_change() -> None:
    check_same_layers(numbered(0, 1, 2), numbered(0, 1), [1, 2], frozenset())


def test_lists_that_count_layers_from_one_are_renumbered() -> None:
    config = CONFIG_MAPPING["qwen4_exp_text"](**toy_settings("qwen4_exp_text"))
    assert config.ple_layer_ids == [3, 7]
    edited = edit_config(config.to_dict(), FamilyRules(), [1, 2, 4, 5, 6, 7])
    assert edited["ple_layer_ids"] == [2, 5]


def test_layers_that_are_stored_in_part_outside_of_themselves_are_refused(tmp_path: Path) -> None:
    source = save_family(
        tmp_path / "source", Family("inkling2_text", toy_settings("inkling2_text"))
    )
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ModelError, match="stores parts of its layers outside of them"):
        write_checkpoint(source, read_layout(source), plan_of(7, n_layers=8), NOTHING, out)
