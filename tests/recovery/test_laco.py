"""LaCo's merge: by hand, against a plain sum, what it changes and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of, save_tiny
from layercut.errors import ModelError, PlanError
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.types import CalibrationBatches


def test_one_weight_by_hand(view: DecoderView, batches: CalibrationBatches):
    values = {1: 1.0, 2: 4.0, 3: -2.0}
    for layer, value in values.items():
        view.model.get_parameter(f"model.layers.{layer}.mlp.up_proj.weight").data.fill_(value)
    merged = fit(view, plan_of(2, 3), None, batches, method="laco").tensors
    # 1 + (4 − 1) + (−2 − 1) = 1
    assert torch.equal(merged["model.layers.1.mlp.up_proj.weight"], torch.full((32, 16), 1.0))


def test_one_dropped_layer_replaces_the_kept_ones_weights(
    view: DecoderView, batches: CalibrationBatches
):
    patch = fit(view, plan_of(3), None, batches, method="laco")
    for name, tensor in patch.tensors.items():
        dropped = view.model.get_parameter(name.replace(".2.", ".3."))
        torch.testing.assert_close(tensor, dropped.data)


def test_merge_equals_a_plain_sum_at_every_cut(view: DecoderView, batches: CalibrationBatches):
    patch = fit(view, plan_of(1, 2, 4, 5), None, batches, method="laco")
    assert set(patch.tensors) == set(view.linear_weights(0)) | set(view.linear_weights(3))
    for kept, first, second in ((0, 1, 2), (3, 4, 5)):
        for name, weight in view.linear_weights(kept).items():
            one, two = (
                view.model.get_parameter(name.replace(f".{kept}.", f".{layer}.")).data
                for layer in (first, second)
            )
            torch.testing.assert_close(patch.tensors[name], one + two - weight.data)
    assert patch.notes["merged_into"] == {"1": 0, "2": 0, "4": 3, "5": 3}


def test_equal_layers_merge_into_themselves(view: DecoderView, batches: CalibrationBatches):
    for name, weight in view.linear_weights(2).items():
        weight.data.copy_(view.model.get_parameter(name.replace(".2.", ".1.")).data)
    patch = fit(view, plan_of(2), None, batches, method="laco")
    assert all(torch.equal(t, view.model.get_parameter(n)) for n, t in patch.tensors.items())


def test_fitting_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    fit(view, plan_of(2, 3), None, batches, method="laco")
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def test_a_cut_without_a_preceding_layer_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(PlanError, match="laco needs a kept layer before every cut"):
        fit(view, plan_of(0), None, batches, method="laco")


def test_weights_of_unlike_shape_are_refused(batches: CalibrationBatches, tmp_path: Path):
    view = load(str(save_tiny(tmp_path / "uneven")), dtype="float32")
    view.layers[1].mlp.up_proj.weight.data = torch.zeros(8, 16)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight cannot be merged"):
        fit(view, plan_of(2), None, batches, method="laco")
