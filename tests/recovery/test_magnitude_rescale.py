"""Prune&Comp: the published form on an untied model, tied heads, planted gaps, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of, save_tiny
from layercut.errors import ModelError, NumericsError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.methods.magnitude_rescale import (
    channel_ratios,
    check_scale_free,
    measure_magnitude_gaps,
)
from layercut.types import CalibrationBatches, PruningPlan
from spools import spool


def published(view: DecoderView, plan: PruningPlan, alphas: dict[int, float]) -> dict:
    """The embedding and every output and down-projection before each cut, times its α."""
    tensors = {"model.embed_tokens.weight": view.model.get_input_embeddings().weight.data.clone()}
    for layer in plan.kept:
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}.weight"
            tensors[name] = view.model.get_parameter(name).data.clone()
    for first, alpha in alphas.items():
        tensors["model.embed_tokens.weight"] *= alpha
        for layer in (layer for layer in plan.kept if layer < first):
            for part in ("self_attn.o_proj", "mlp.down_proj"):
                tensors[f"model.layers.{layer}.{part}.weight"] *= alpha
    return tensors


def test_ratios_by_hand():
    # Two sequences of two tokens and two channels.
    before = spool(torch.tensor([[1.0, 1.0], [-1.0, 3.0], [2.0, 1.0], [0.0, -1.0]]))
    after = spool(torch.tensor([[2.0, 1.0], [-2.0, 1.0], [1.0, 4.0], [-1.0, 0.0]]))
    # channel 0: 4/2 and 2/2, mean 1.5; channel 1: 2/4 and 4/2, mean 1.25
    assert channel_ratios(before, after, 2).tolist() == [1.5, 1.25]
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert channel_ratios(before, after, 2, swap).tolist() == [1.25, 1.5]


def test_alpha_equals_the_ratio_of_hidden_states(view: DecoderView, batches: CalibrationBatches):
    states = view.model(batches.input_ids, output_hidden_states=True, use_cache=False).hidden_states
    alphas = measure_magnitude_gaps(view, plan_of(1, 3, 4), batches)
    for first, after in ((1, 2), (3, 5)):
        norms = [states[i].double().abs().sum(dim=1) for i in (first, after)]
        assert alphas[first] == pytest.approx(float((norms[1] / norms[0]).mean()), rel=1e-5)


@pytest.mark.parametrize("dropped", [(2,), (1, 3, 4), (0, 4), (4, 5)])
def test_logits_are_those_of_the_published_form(
    view: DecoderView, batches: CalibrationBatches, dropped: tuple[int, ...]
):
    plan = plan_of(*dropped)
    patch = fit(view, plan, None, batches, method="magnitude-rescale")
    tensors = published(view, plan, measure_magnitude_gaps(view, plan, batches))
    with view.skipping(dropped):
        with view.patched(tensors):
            expected = view.model(batches.input_ids, use_cache=False).logits
        with view.patched(patch.tensors):
            found = view.model(batches.input_ids, use_cache=False).logits
        bare = view.model(batches.input_ids, use_cache=False).logits
    # A norm's ε is all that tells the two forms apart.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    if dropped != (4, 5):
        assert float((bare - expected).abs().max()) > 0.05


def test_only_what_writes_behind_a_cut_changes(view: DecoderView, batches: CalibrationBatches):
    patch = fit(view, plan_of(1, 4), None, batches, method="magnitude-rescale")
    alphas = patch.notes["alpha"]
    factors = {2: 1 / alphas["1"], 3: 1 / alphas["1"], 5: 1 / alphas["1"] / alphas["4"]}
    expected = {
        f"model.layers.{layer}.{part}.weight": factor
        for layer, factor in factors.items()
        for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert set(patch.tensors) == set(expected)
    for name, factor in expected.items():
        torch.testing.assert_close(patch.tensors[name], view.model.get_parameter(name) * factor)


def test_a_cut_at_the_end_changes_nothing(view: DecoderView, batches: CalibrationBatches):
    # The final norm removes every factor that stands behind the last layer.
    assert not fit(view, plan_of(4, 5), None, batches, method="magnitude-rescale").tensors


def test_a_planted_identity_leaves_no_gap(view: DecoderView, batches: CalibrationBatches):
    view.layers[2].input_layernorm.weight.data.zero_()
    view.layers[2].post_attention_layernorm.weight.data.zero_()
    assert measure_magnitude_gaps(view, plan_of(2), batches) == {2: 1.0}
    assert not fit(view, plan_of(2), None, batches, method="magnitude-rescale").tensors


def test_a_planted_gain_is_undone(view: DecoderView, batches: CalibrationBatches):
    # Layer 2 trebles the stream: without it, the rest must add a third.
    view.layers[2].forward = lambda hidden_states, *_, **__: 3 * hidden_states
    dense = view.model(batches.input_ids, use_cache=False).logits
    patch = fit(view, plan_of(2), None, batches, method="magnitude-rescale")
    assert patch.notes["alpha"]["2"] == pytest.approx(3)
    with view.skipping([2]), view.patched(patch.tensors):
        pruned = view.model(batches.input_ids, use_cache=False).logits
    torch.testing.assert_close(pruned, dense, rtol=1e-3, atol=1e-3)


def test_a_tied_head_stays_as_it_is(batches: CalibrationBatches, tmp_path: Path):
    view = load(str(save_tiny(tmp_path / "tied", tie_word_embeddings=True)), dtype="float32")
    plan = plan_of(2, 3)
    patch = fit(view, plan, None, batches, method="magnitude-rescale")
    before = view.model.lm_head.weight.clone()
    apply(view, plan, patch)
    assert torch.equal(view.model.lm_head.weight, before)
    assert view.model.lm_head.weight is view.model.get_input_embeddings().weight


def test_fitting_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    fit(view, plan_of(2, 3), None, batches, method="magnitude-rescale")
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def test_a_silent_channel_is_an_error(view: DecoderView, batches: CalibrationBatches):
    view.model.get_input_embeddings().weight.data[:, 3] = 0
    with pytest.raises(NumericsError, match="around layer 0 have a ratio of inf"):
        fit(view, plan_of(0), None, batches, method="magnitude-rescale")


def test_a_layer_that_does_not_follow_the_scale_is_refused(
    view: DecoderView, batches: CalibrationBatches
):
    view.layers[3].input_layernorm.forward = lambda hidden: hidden
    with pytest.raises(ModelError, match=r"layer 3 .* does not follow the scale"):
        fit(view, plan_of(2), None, batches, method="magnitude-rescale")


def test_a_model_without_a_final_norm_is_refused(view: DecoderView):
    view.model.model.norm.forward = lambda hidden: hidden
    with pytest.raises(ModelError, match="what follows the last layer of this llama model does"):
        check_scale_free(view, [])
