"""Gradient steps towards the dense model: against autograd on a model that is really cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM

from conftest import plan_of, save_tiny
from layercut.engine.loss import mean_loss
from layercut.errors import NumericsError
from layercut.models.load import load, reload
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.recovery import gradient_steps
from layercut.recovery import orthogonalize as orthogonalization
from layercut.recovery.fit import fit
from layercut.recovery.gradient_steps import (
    find_trained_weights,
    take_steps,
    walk_divergence_gradients,
)
from layercut.recovery.orthogonalize import orthogonalize
from layercut.types import CalibrationBatches, WeightPatch


def find_gradients(*arguments: Any, micro_batch: int) -> dict[str, Tensor]:
    """All layers' gradients by name."""
    found: dict[str, Tensor] = {}
    for layer in walk_divergence_gradients(*arguments, micro_batch):
        found |= layer
    return found


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
def test_polar_is_that_of_the_singular_value_decomposition(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(orthogonalize(1e-6 * matrix), u @ vh, rtol=0, atol=1e-4)


def test_polar_keeps_the_directions_of_small_singular_values():
    generator = torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -3.6, 40, dtype=torch.float64)
    found = orthogonalize((u * values @ v.T).float())
    # float32 leaves 6e-8 of noise beside the smallest value, 2.5e-4: a few thousandths of it.
    assert float((found - u @ v.T).abs().max()) < 2e-3


def test_polar_does_not_raise_noise():
    left, right = torch.randn(8, 2), torch.randn(2, 12)
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    found = orthogonalize(left @ right + 1e-7 * torch.randn(8, 12))
    torch.testing.assert_close(found, u[:, :2] @ vh[:2], rtol=0, atol=0.01)
    assert s[1] > 1e-3
    assert not orthogonalize(torch.zeros(3, 4)).any()


def test_gradients_are_autograds_on_the_model_that_is_cut(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2, 3)
    name = "model.layers.1.mlp.down_proj.weight"
    changed = {name: 1.5 * view.model.get_parameter(name).data}
    found = find_gradients(view, plan, changed, batches.input_ids, micro_batch=1)
    cut = reload(view)
    apply(cut, plan, WeightPatch(changed, "none"))
    cut.model.requires_grad_(True)
    with torch.no_grad():
        q = view.model(input_ids=batches.input_ids).logits.log_softmax(-1)
    p = cut.model(input_ids=batches.input_ids).logits.log_softmax(-1)
    functional.kl_div(
        p.flatten(0, 1), q.flatten(0, 1), reduction="batchmean", log_target=True
    ).backward()
    assert len(found) == 7 * (view.n_layers - 2)
    for old, gradient in found.items():
        new = view.layout.new_name(old, plan.new_index)
        expected = cut.model.get_parameter(new).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-7)


def test_the_model_is_as_it_was(view: DecoderView, batches: CalibrationBatches):
    before = {n: p.detach().clone() for n, p in view.model.named_parameters()}
    kernel = view.model.config._attn_implementation
    take_steps(view, plan_of(2), {}, batches.input_ids, n_steps=2, micro_batch=2)
    for name, parameter in view.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert not parameter.requires_grad
        assert parameter.grad is None
    assert view.model.config._attn_implementation == kernel
    assert not view.skipped


def test_a_layer_that_did_nothing_leaves_nothing_to_learn(
    view: DecoderView, batches: CalibrationBatches
):
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        view.model.get_submodule(f"model.layers.2.{part}").weight.data.zero_()
    gradients = find_gradients(view, plan_of(2), {}, batches.input_ids, micro_batch=2)
    assert max(float(g.abs().max()) for g in gradients.values()) < 1e-7


@pytest.mark.parametrize(
    ("losses", "eta"),
    [
        ([5.0, 4.0, 3.0, 3.5], 0.002),  # longer pays, and then no more
        ([5.0, 4.0, 4.5], 0.001),
        ([5.0, 6.0, 5.5, 4.9], 0.00025),  # shorter until it pays
        ([5.0, 6.0, 5.8, 5.6, 5.4], 0.0),  # it never does
    ],
)
def test_a_step_is_as_long_as_the_other_half_allows(
    view: DecoderView,
    batches: CalibrationBatches,
    monkeypatch: pytest.MonkeyPatch,
    losses: list[float],
    eta: float,
):
    given = iter(losses)
    monkeypatch.setattr(gradient_steps, "mean_loss", lambda *_: next(given))
    tensors, lengths = take_steps(view, plan_of(2), {}, batches.input_ids, n_steps=1, micro_batch=2)
    assert lengths == (eta,)
    assert next(given, None) is None
    for name, tensor in tensors.items():
        weight = view.model.get_parameter(name)
        # The gradient's rank is all but full here, so that the whole length is made.
        assert float((tensor - weight).norm() / weight.norm()) == pytest.approx(eta, rel=0.1)


def test_halves_change_places_also_after_a_step_not_made(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    learnt: list[torch.Tensor] = []
    original = gradient_steps.find_directions

    def remember(*arguments, **options):
        learnt.append(arguments[3])
        return original(*arguments, **options)

    monkeypatch.setattr(gradient_steps, "find_directions", remember)
    given = iter([5.0, 6.0, 6.0, 6.0, 6.0, 5.0, 4.0, 4.5])
    monkeypatch.setattr(gradient_steps, "mean_loss", lambda *_: next(given))
    _, lengths = take_steps(view, plan_of(2), {}, batches.input_ids, n_steps=2, micro_batch=2)
    assert lengths == (0.0, gradient_steps.ETA)
    assert [len(half) for half in learnt] == [2, 2]
    assert torch.equal(torch.stack(learnt, dim=1).flatten(0, 1), batches.input_ids)


def test_weights_that_layers_share_are_left_alone(view: DecoderView):
    layers = view.layers
    layers[3].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    names = find_trained_weights(view, plan_of(2))
    assert "model.layers.1.mlp.up_proj.weight" not in names
    assert "model.layers.3.mlp.up_proj.weight" not in names
    assert "model.layers.1.mlp.gate_proj.weight" in names
    assert not any(".layers.2." in name for name in names)


def test_what_is_not_finite_is_an_error(view: DecoderView, batches: CalibrationBatches):
    view.model.get_parameter("model.layers.1.mlp.up_proj.weight").data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="gradient_steps: 0"):
        find_gradients(view, plan_of(2), {}, batches.input_ids, micro_batch=2)


def test_transposed_weights_step_alike(tmp_path: Path, batches: CalibrationBatches):
    view = load(str(save_tiny(tmp_path / "gpt2", "gpt2")), dtype="float32")
    tensors, (eta,) = take_steps(view, plan_of(2), {}, batches.input_ids, n_steps=1, micro_batch=2)
    assert eta > 0
    with view.skipping((2,)):
        before = mean_loss(view, batches.input_ids[1::2], 2)
        with view.patched(tensors):
            assert mean_loss(view, batches.input_ids[1::2], 2) < before


def test_a_refit_ends_with_steps_that_lower_the_held_out_loss(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(2, 3)
    options = {"method": "refit", "held_out_every": 2}
    plain = fit(view, plan, None, batches, **options, gradient_steps=0)
    stepped = fit(view, plan, None, batches, **options)
    held_out = batches.input_ids[1::2]
    losses = []
    for patch in (plain, stepped):
        cut = reload(view)
        apply(cut, plan, patch)
        losses.append(mean_loss(cut, held_out, 2))
    assert not plain.notes["accepted"]  # random weights, four sequences: the steps alone help
    assert plain.notes["held_out_loss_without"] == pytest.approx(losses[0], rel=1e-5)
    assert stepped.notes["accepted"]
    assert stepped.notes["loss_after_steps"] == pytest.approx(losses[1], rel=1e-5)
    assert "steps" not in plain.notes
    assert any(stepped.notes["steps"])
    assert losses[1] < losses[0]


def test_steps_help_in_a_checkpoint_of_bfloat16(tmp_path: Path, ids: torch.Tensor):
    folder = save_tiny(tmp_path / "narrow")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    view = load(str(folder), dtype="float32")
    batches = CalibrationBatches(ids, gradient_batch=2, micro_batch=2, source="t", fingerprint="0")
    patch = fit(view, plan_of(2, 3), None, batches, method="refit", held_out_every=2)
    assert any(patch.notes["steps"])
    assert {tensor.dtype for tensor in patch.tensors.values()} == {torch.bfloat16}
    cut = reload(view)
    apply(cut, plan_of(2, 3), patch)
    assert mean_loss(cut, ids[1::2], 2) < patch.notes["held_out_loss_without"]


def test_iterated_factor_is_close_to_the_decomposed_one():
    # Singular values from 1 down to a two-hundredth.
    u, _, vh = torch.linalg.svd(
        torch.randn(48, 96, generator=torch.manual_seed(0)), full_matrices=False
    )
    matrix = (u * torch.logspace(0, -2.3, 48)) @ vh
    found = orthogonalization._iterate(matrix / matrix.norm())
    values = torch.linalg.svdvals(found)
    assert float((values - 1).abs().max()) < 0.05
    assert float((found - u @ vh).norm() / (u @ vh).norm()) < 0.05
    assert not orthogonalization._iterate(torch.zeros(3, 4)).any()
