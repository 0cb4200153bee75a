"""Nothing of the machine's memory meets what is on a GPU, and both give the same.

tests/contracts has every score and recovery but those that train: their trainer chooses the place.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of
from family_configs import FAMILIES
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.layer_fit import mask_held_out_rows, refit_layers
from layercut.recovery.refit_records import RefittedLayers
from layercut.registry import available, describe
from layercut.selection.select import select
from layercut.spool import choose_device
from layercut.types import CalibrationBatches
from pretended_gpu import CPU, GPU, pretended_gpu
from saved_families import save_family

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
        assert choose_device(GPU, 999) == GPU
        assert choose_device(GPU, 1000) == CPU
    with pretended_gpu(free_bytes=600, unused_bytes=500):
        assert choose_device(GPU, 1000) == GPU
    assert choose_device(CPU, 1000) == CPU


@pytest.mark.parametrize("free_bytes", [2**40, 0])
def test_refit_on_a_gpu(view: DecoderView, batches: CalibrationBatches, free_bytes: int):
    def walked() -> dict[str, torch.Tensor]:
        return refit_layers(view, plan_of(2, 3), batches, mask_held_out_rows(batches, 2)).tensors

    expected = walked()
    assert expected
    with pretended_gpu(free_bytes) as gpu:
        gpu.put(view.model)
        tensors = walked()
        assert all(gpu.has(tensor) for tensor in tensors.values())
    assert expected.keys() == tensors.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("free_bytes", [2**40, 0])
@pytest.mark.parametrize("family", ["mixtral", "afmoe"])
def test_experts_are_refitted_on_a_gpu(tmp_path: Path, family: str, free_bytes: int):
    view = load(str(save_family(tmp_path, FAMILIES[family])), dtype="float32")
    view.model.config._experts_implementation = "eager"  # the others count by a GPU's own kernels
    ids = torch.randint(3, 250, (64, 16), generator=torch.Generator().manual_seed(3))
    text = CalibrationBatches(ids, 4, 8, "random", "random")

    def walked() -> RefittedLayers:
        plan = plan_of(6, n_layers=view.n_layers)
        return refit_layers(view, plan, text, mask_held_out_rows(text, 8), layers="cuts")

    expected = walked()
    assert sum(block["fitted"] for block in expected.experts[5]) > 0
    with pretended_gpu(free_bytes) as gpu:
        gpu.put(view.model)
        found = walked()
        assert all(gpu.has(tensor) for tensor in found.tensors.values())
    assert found.experts == expected.experts
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=1e-4, atol=1e-6)


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
