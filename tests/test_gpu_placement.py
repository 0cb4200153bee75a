"""Nothing of the machine's memory meets what is on a GPU, and both give the same.

Left out is what trains in transformers' trainer, which chooses the place itself.
"""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.engine.residual_stream import accumulation_device
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.layer_fit import mask_held_out_rows, refit_layers
from layercut.recovery.runtime_maps import applied_maps
from layercut.registry import available, describe
from layercut.scoring.score import score
from layercut.selection.select import select
from layercut.types import CalibrationBatches
from pretended_gpu import CPU, GPU, pretended_gpu
from repairs import fitted_maps

STORED = {name for name in available("recovery") if describe("recovery", name).stores}
AT_RUN_TIME = {*available("recovery")} - STORED


def test_mixing_two_places_is_refused():
    here = torch.ones(2, 2)
    with pretended_gpu():
        there = here.to(GPU)
        assert there.device == GPU
        assert (there.T @ there).device == GPU
        assert there.cpu().device == CPU
        assert torch.zeros(2, device=GPU).device == GPU
        with pytest.raises(AssertionError, match="two places"):
            here @ there


def test_sums_are_made_where_there_is_memory():
    with pretended_gpu(free_bytes=1000):
        assert accumulation_device(GPU, 999) == GPU
        assert accumulation_device(GPU, 1000) == CPU
    with pretended_gpu(free_bytes=600, unused_bytes=500):
        assert accumulation_device(GPU, 1000) == GPU
    assert accumulation_device(CPU, 1000) == CPU


@pytest.mark.parametrize("free_bytes", [2**40, 0])
def test_refit_on_a_gpu(view: DecoderView, batches: CalibrationBatches, free_bytes: int):
    def walked() -> dict[str, torch.Tensor]:
        return refit_layers(view, plan_of(2, 3), batches, mask_held_out_rows(batches, 2))

    expected = walked()
    assert expected
    with pretended_gpu(free_bytes) as gpu:
        gpu.put(view.model)
        tensors = walked()
        assert all(gpu.has(tensor) for tensor in tensors.values())
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


def test_gradient_steps_on_a_gpu(view: DecoderView, batches: CalibrationBatches):
    plan = plan_of(2, 3)
    expected = fit(view, plan, None, batches, method="refit", held_out_every=2).notes
    assert expected["steps"][0] > 0
    with pretended_gpu() as gpu:
        gpu.put(view.model)
        notes = fit(view, plan, None, batches, method="refit", held_out_every=2).notes
    # Attention sums in another order there, which a polar factor enlarges.
    assert notes["steps"] == expected["steps"]
    assert notes["loss_after_steps"] == pytest.approx(expected["loss_after_steps"], abs=0.01)


@pytest.mark.parametrize("free_bytes", [2**40, 0])
def test_priced_cuts_on_a_gpu(view: DecoderView, batches: CalibrationBatches, free_bytes: int):
    expected, _ = select(view, batches, strategy="priced-cuts", drop_layers=2)
    with pretended_gpu(free_bytes) as gpu:
        gpu.put(view.model)
        plan, _ = select(view, batches, strategy="priced-cuts", drop_layers=2)
    assert plan == expected


@pytest.mark.parametrize("method", sorted({*available("scoring")} - {"igia"}))
def test_scores_on_a_gpu(view: DecoderView, batches: CalibrationBatches, method: str):
    expected = score(view, batches, method=method)
    with pretended_gpu() as gpu:
        gpu.put(view.model)
        assert score(view, batches, method=method).values == expected.values


@pytest.mark.parametrize("method", sorted(STORED - {"refit", "sign-merge"}))
def test_recoveries_on_a_gpu(view: DecoderView, batches: CalibrationBatches, method: str):
    plan = plan_of(2, 3)
    expected = fit(view, plan, None, batches, method=method)
    with pretended_gpu() as gpu:
        gpu.put(view.model)
        patch = fit(view, plan, None, batches, method=method)
    assert expected.tensors.keys() == patch.tensors.keys()
    assert expected.tensors or method == "none"
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(patch.tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("method", sorted(AT_RUN_TIME))
def test_matrices_in_the_cut_on_a_gpu(view: DecoderView, batches: CalibrationBatches, method: str):
    plan = plan_of(2, 3)
    expected = fitted_maps(view, plan, batches, method)
    with pretended_gpu() as gpu:
        gpu.put(view.model)
        repair = fitted_maps(view, plan, batches, method)
        with applied_maps(view, plan, repair):
            view.token_losses(batches.input_ids)
    assert expected.maps.keys() == repair.maps.keys()
    for layer, matrix in expected.maps.items():
        torch.testing.assert_close(repair.maps[layer], matrix, rtol=0, atol=0)
