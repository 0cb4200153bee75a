"""The layered backward pass against plain autograd, and what it promises about memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from layercut.engine.layerwise import walk_gradients
from layercut.errors import NumericsError
from layercut.models.view import DecoderView
from pretended_gpu import pretended_gpu


def autograd_reference(view: DecoderView, ids: Tensor) -> dict[str, Tensor]:
    """Gradients of transformers' own mean loss, by plain backward."""
    weights = {n: p for i in range(view.n_layers) for n, p in view.linear_weights(i).items()}
    for parameter in weights.values():
        parameter.requires_grad_(True)
    view.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    gradients = {}
    for name, parameter in weights.items():
        gradients[name] = parameter.grad.clone()
        parameter.grad = None
        parameter.requires_grad_(False)
    return gradients


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_layered_gradients_equal_plain_autograd(view: DecoderView, ids: Tensor, micro_batch: int):
    expected = autograd_reference(view, ids)
    n_targets = ids.shape[0] * (ids.shape[1] - 1)
    seen = {}
    for result in walk_gradients(view, [ids], micro_batch=micro_batch, n_targets=n_targets):
        seen |= {name: g.clone() for name, g in result.weights.items()}
    assert seen.keys() == expected.keys()
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("free_bytes", "passes"), [(2**40, 1), (0, 2)])
def test_a_gpu_with_room_keeps_the_graphs_of_several_micro_batches(
    view: DecoderView, ids: Tensor, free_bytes: int, passes: int, monkeypatch: pytest.MonkeyPatch
):
    runs = []
    run_layer = DecoderView.run_layer

    def count(self: DecoderView, layer: int, *arguments: Any) -> Tensor:
        runs.append(layer)
        return run_layer(self, layer, *arguments)

    monkeypatch.setattr(DecoderView, "run_layer", count)
    expected = {
        g.layer: g.weights.copy() for g in walk_gradients(view, [ids], micro_batch=2, n_targets=1)
    }
    runs.clear()
    with pretended_gpu(free_bytes) as gpu:
        gpu.put(view.model)
        found = {
            g.layer: g.weights.copy()
            for g in walk_gradients(view, [ids], micro_batch=2, n_targets=1)
        }
    assert len(runs) == passes * 2 * view.n_layers
    for layer, weights in expected.items():
        for name, gradient in weights.items():
            torch.testing.assert_close(found[layer][name], gradient, rtol=1e-5, atol=1e-7)


def test_layers_come_from_the_last_to_the_first(view: DecoderView, ids: Tensor):
    order = [g.layer for g in walk_gradients(view, [ids], micro_batch=4, n_targets=1)]
    assert order == [5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_never_two_layers_weight_gradients_alive(view: DecoderView, ids: Tensor, micro_batch: int):
    alive: list[weakref.ref[Tensor]] = []
    for result in walk_gradients(view, [ids], micro_batch=micro_batch, n_targets=1):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]
        assert all(p.grad is None for p in view.model.parameters())
        alive = [weakref.ref(g) for g in result.weights.values()]
        del result


def test_skipped_layers_get_no_gradient_and_do_not_act(view: DecoderView, ids: Tensor):
    with view.skipping([1, 4]):
        seen = [g.layer for g in walk_gradients(view, [ids], micro_batch=4, n_targets=1)]
    assert seen == [5, 3, 2, 0]


def test_activation_gradients_need_no_weight_gradient(view: DecoderView, ids: Tensor):
    for result in walk_gradients(view, [ids], micro_batch=2, n_targets=1, weights=False):
        assert result.weights == {}
        assert all(p.grad is None and not p.requires_grad for p in view.model.parameters())
        assert [g.shape for g in result.grad_out] == [(2, 32, 16)] * 2


def test_activation_gradient_predicts_a_small_change(view: DecoderView, ids: Tensor):
    # d loss ≈ ⟨∇h_6, δ⟩ for a small δ added to the stream before the final norm.
    result = next(walk_gradients(view, [ids], micro_batch=4, n_targets=1, weights=False))
    delta = 1e-3 * torch.randn(result.hidden_out[0].shape, generator=torch.manual_seed(1))
    _, before = view.loss_gradient(result.hidden_out[0], ids)
    _, after = view.loss_gradient(result.hidden_out[0] + delta, ids)
    predicted = float((result.grad_out[0] * delta).sum())
    assert after - before == pytest.approx(predicted, rel=0.05)


def test_model_is_unchanged(view: DecoderView, ids: Tensor):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    list(walk_gradients(view, [ids], micro_batch=2, n_targets=1))
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())
    assert not any(p.requires_grad for p in view.model.parameters())


def test_a_loss_that_is_not_finite_is_an_error(view: DecoderView, ids: Tensor):
    view.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NumericsError, match="the calibration loss is nan"):
        list(walk_gradients(view, [ids], micro_batch=4, n_targets=1))


def test_a_gradient_that_is_not_finite_names_its_weight(view: DecoderView, ids: Tensor):
    view.model.model.layers[3].mlp.act_fn.register_full_backward_hook(
        lambda module, inner, outer: (inner[0] * float("inf"),)
    )
    with pytest.raises(NumericsError, match=r"gradient of model\.layers\.3\.\S+ is not finite"):
        list(walk_gradients(view, [ids], micro_batch=4, n_targets=1))
