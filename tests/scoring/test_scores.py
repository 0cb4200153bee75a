"""Every score: hand-worked cases, independent references, planted redundancy."""

from __future__ import annotations

import pytest
import torch

from layercut.errors import NumericsError, RecipeError
from layercut.models.view import DecoderView
from layercut.registry import available
from layercut.scoring.methods.gradmap import magnitude
from layercut.scoring.score import score
from layercut.types import CalibrationBatches

CONTROLS = {"random", "reverse-order"}
BLIND_TO_IDENTITY = {"magnitude", "perplexity"}
"""Weights stay as large as they are; a loss may also fall without a layer that does something."""


def make_identity(view: DecoderView, layer: int) -> None:
    """Zero both norm gains of one block: it becomes the identity and its gradients vanish."""
    block = view.layers[layer]
    block.input_layernorm.weight.data.zero_()
    block.post_attention_layernorm.weight.data.zero_()


@pytest.mark.parametrize("method", sorted(set(available("scoring")) - CONTROLS - BLIND_TO_IDENTITY))
@pytest.mark.parametrize("planted", [1, 4])
def test_planted_redundancy_ranks_last(
    view: DecoderView, batches: CalibrationBatches, method: str, planted: int
):
    make_identity(view, planted)
    values = score(view, batches, method=method).values
    assert min(range(view.n_layers), key=lambda i: values[i]) == planted


@pytest.mark.parametrize("norm", ["l1", "l2", "l2sq"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradmap_equals_autograd_group_by_group(
    view: DecoderView, batches: CalibrationBatches, norm: str, reduction: str
):
    expected = [0.0] * view.n_layers
    for group in batches.groups():
        for i in range(view.n_layers):
            for weight in view.linear_weights(i).values():
                weight.requires_grad_(True)
        logits = view.model(group, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, group[:, 1:].flatten(), reduction="sum")
        (loss / batches.n_targets).backward()
        for i in range(view.n_layers):
            weights = view.linear_weights(i).values()
            for weight in weights:
                order = {"l1": 1, "l2": 2, "l2sq": 2}[norm]
                value = float(weight.grad.flatten().norm(order))
                expected[i] += value**2 if norm == "l2sq" else value
                weight.grad = None
                weight.requires_grad_(False)
    if reduction == "mean":
        # per layer: q, o 16×16; k, v 8×16; gate, up 32×16; down 16×32
        expected = [e / (2 * 256 + 2 * 128 + 3 * 512) for e in expected]
    values = score(view, batches, method="gradmap", norm=norm, reduction=reduction).values
    assert values == pytest.approx(expected, rel=1e-4)


def test_gradmap_does_not_depend_on_the_micro_batch(view: DecoderView, batches: CalibrationBatches):
    small = CalibrationBatches(batches.input_ids, 2, 1, "test", "0")
    assert score(view, small, method="gradmap").values == pytest.approx(
        score(view, batches, method="gradmap").values, rel=1e-5
    )


def test_gradmap_does_depend_on_the_gradient_groups(view: DecoderView, batches: CalibrationBatches):
    one_group = CalibrationBatches(batches.input_ids, 4, 4, "test", "0")
    # ‖a + b‖ < ‖a‖ + ‖b‖
    pairs = zip(
        score(view, one_group, method="gradmap").values,
        score(view, batches, method="gradmap").values,
        strict=True,
    )
    assert all(whole < parts for whole, parts in pairs)


def test_magnitude_by_hand():
    gradient = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    # |3| + |−4| = 7; √(9 + 16) = 5; 9 + 16 = 25
    assert [magnitude(gradient, n) for n in ("l1", "l2", "l2sq")] == [7.0, 5.0, 25.0]


def test_magnitude_survives_squares_beyond_float16_and_sums_beyond_float32():
    gradient = torch.full((4096, 256), 1.0)
    gradient[0, 0] = 3e4
    # 9e8 + (2^20 − 1): float32 would round the sum of squares
    assert magnitude(gradient, "l2sq") == 9e8 + 2**20 - 1


def test_block_influence_by_hand(view: DecoderView, batches: CalibrationBatches):
    # A layer whose output is orthogonal to its input scores 1 − cos 90° = 1.
    def orthogonal(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        even, odd = hidden_states[..., 0::2], hidden_states[..., 1::2]
        return torch.stack([-odd, even], dim=-1).flatten(-2)

    view.layers[2].forward = orthogonal
    values = score(view, batches, method="block-influence").values
    assert values[2] == pytest.approx(1.0, abs=1e-6)


def test_reverse_order_drops_from_the_end(view: DecoderView, batches: CalibrationBatches):
    values = score(view, batches, method="reverse-order").values
    assert sorted(range(6), key=lambda i: values[i]) == [5, 4, 3, 2, 1, 0]
    values = score(view, batches, method="reverse-order", keep_last=True).values
    assert sorted(range(6), key=lambda i: values[i]) == [4, 3, 2, 1, 0, 5]


def test_random_follows_its_seed(view: DecoderView, batches: CalibrationBatches):
    draws = [score(view, batches, method="random", seed=seed).values for seed in (0, 1)]
    assert draws[0] != draws[1]
    assert all(0 <= v < 1 for v in draws[0])


def test_unknown_method_and_option_suggest(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match="unknown scoring method 'gradmpa'; did you mean 'gradm"):
        score(view, batches, method="gradmpa")
    with pytest.raises(RecipeError, match=r"scoring\.options\.nrom.*did you mean 'norm'"):
        score(view, batches, method="gradmap", nrom="l2")


def test_a_score_that_is_not_finite_names_the_layer(view: DecoderView, batches: CalibrationBatches):
    view.layers[3].forward = lambda hidden_states, *a, **k: hidden_states * float("nan")
    with pytest.raises(NumericsError, match="score of layer 3 is nan"):
        score(view, batches, method="block-influence")
