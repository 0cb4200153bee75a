from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import save_tiny
from family_configs import FAMILIES
from layercut.checkpoints.preflight import check_folder
from layercut.models.load import load
from layercut.pipeline.model_shape import ModelShape, read_shape
from saved_families import save_family


def shape_of(source: Path) -> ModelShape:
    layout, stored = check_folder(source)
    return read_shape(source, layout, stored, dtype="auto", device=torch.device("cpu"))


def test_tied_embeddings_are_counted_once(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    shape = shape_of(source)
    assert shape.n_parameters == load(str(source)).n_parameters
    assert shape.weight_bytes == 4 * shape.n_parameters
    # q, o: 16 × 16 with q's bias; k, v: 8 × 16 with biases; three of 32 × 16; two norms.
    assert shape.layers[0].n_parameters == 2 * 256 + 16 + 2 * 136 + 3 * 512 + 32
    assert (shape.layers[0].down, shape.layers[0].output) == (32, 16)
    assert shape.layers[0].active == 2 * 256 + 2 * 128 + 3 * 512
    assert shape.layers[0].written == 16 + 8 + 8 + 16 + 32 + 32 + 16


def test_of_experts_only_the_active_ones_take_time_and_all_take_memory(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, "mixtral", num_local_experts=4, num_experts_per_tok=1, head_dim=4)
    shape = shape_of(source)
    assert shape.n_parameters == load(str(source)).n_parameters
    experts = 3 * 32 * 16
    attention = 2 * 256 + 2 * 128
    assert shape.layers[0].active == attention + experts + 4 * 16  # the router's four rows
    assert shape.layers[0].n_parameters == attention + 4 * experts + 4 * 16 + 32
    assert shape.layers[0].down == 0


@pytest.mark.parametrize(
    "name", ["gemma3n", "gemma4", "gpt2", "granitemoehybrid", "jamba", "deepseek_v3"]
)
def test_every_familys_parameters_are_those_in_memory(name: str, tmp_path: Path) -> None:
    source = save_family(tmp_path / "source", FAMILIES[name])
    shape = shape_of(source)
    view = load(str(source), dtype="float32")
    assert shape.n_parameters == view.n_parameters
    layers = {id(p): p.numel() for layer in view.layers for p in layer.parameters()}
    assert shape.n_outside == view.n_parameters - sum(layers.values())
