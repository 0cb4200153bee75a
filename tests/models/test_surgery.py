"""The pruned model in memory equals the dense one with its dropped layers passed over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of, save_tiny
from layercut.errors import PlanError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.types import WeightPatch

FAMILIES = {
    "llama": {},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    # Layers 3 and up slide: dropping layer 1 shifts the pattern, so a stale one would be seen.
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    settings = {"model_type": request.param} | FAMILIES[request.param]
    return save_tiny(tmp_path / request.param, **settings)


@pytest.mark.parametrize("dropped", [(0,), (1, 3), (4, 5)])
def test_pruned_equals_dropped_layers_as_identity(
    family: Path, ids: torch.Tensor, dropped: tuple[int, ...]
):
    view = load(str(family), dtype="float32")
    with view.skipping(dropped), torch.no_grad():
        reference = view.model(ids, use_cache=False).logits
    apply(view, plan_of(*dropped), None)
    assert view.n_layers == 6 - len(dropped)
    assert view.model.config.num_hidden_layers == view.n_layers
    with torch.no_grad():
        assert torch.equal(view.model(ids, use_cache=False).logits, reference)


def test_cached_decoding_equals_uncached(family: Path, ids: torch.Tensor):
    view = load(str(family), dtype="float32")
    apply(view, plan_of(1, 3), None)
    with torch.no_grad():
        whole = view.model(ids[:1], use_cache=False).logits
        cache, steps = None, []
        for token in ids[:1].split(1, dim=1):
            output = view.model(token, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-5)


def test_patch_lands_under_the_new_index(view, ids: torch.Tensor):
    name = "model.layers.4.mlp.down_proj.weight"
    patched = torch.full_like(view.model.get_parameter(name), 0.5)
    apply(view, plan_of(1, 2), WeightPatch({name: patched}, "test"))
    assert torch.equal(view.layers[2].mlp.down_proj.weight, patched)


def test_patch_for_a_dropped_layer_is_refused(view):
    patch = WeightPatch({"model.layers.1.mlp.down_proj.weight": torch.zeros(16, 32)}, "test")
    with pytest.raises(PlanError, match="which the pruned model does not have"):
        apply(view, plan_of(1), patch)


def test_plan_for_another_model_is_refused(view):
    with pytest.raises(PlanError, match="plan is for 8 layers, the model has 6"):
        apply(view, plan_of(1, n_layers=8), None)
