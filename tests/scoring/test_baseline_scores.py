"""The published baselines' scores: hand-worked cases and naive references."""

from __future__ import annotations

import math

import pytest
import torch

from layercut.engine.loss import mean_loss
from layercut.models.view import DecoderView
from layercut.scoring.methods.angular_distance import Options, angular_distances
from layercut.scoring.score import score
from layercut.selection.select import select
from layercut.types import CalibrationBatches


def loss_without(view: DecoderView, batches: CalibrationBatches, *layers: int) -> float:
    with view.skipping(layers):
        return mean_loss(view, batches.input_ids, batches.n_sequences)


def test_magnitude_by_hand(view: DecoderView, batches: CalibrationBatches):
    for weight in view.linear_weights(2).values():
        weight.data.fill_(-0.5)
    # q, o 16×16; k, v 8×16; gate, up 32×16; down 16×32: 2,304 weights of |−0.5|
    expected = 0.5 * (2 * 256 + 2 * 128 + 3 * 512)
    assert score(view, batches, method="magnitude").values[2] == expected


def test_magnitude_reads_no_text(view: DecoderView, batches: CalibrationBatches):
    other = CalibrationBatches(batches.input_ids[:1], 1, 1, "test", "1")
    assert (
        score(view, other, method="magnitude").values
        == score(view, batches, method="magnitude").values
    )


def test_taylor_equals_plain_autograd(view: DecoderView, batches: CalibrationBatches):
    layers = [list(view.linear_weights(i).values()) for i in range(view.n_layers)]
    weights = [weight for layer in layers for weight in layer]
    for weight in weights:
        weight.requires_grad_(True)
    view.model(batches.input_ids, labels=batches.input_ids, use_cache=False).loss.backward()
    expected = [sum(float((w.data * w.grad).abs().sum()) for w in layer) for layer in layers]
    for weight in weights:
        weight.grad = None
        weight.requires_grad_(False)
    values = score(view, batches, method="taylor").values
    assert values == pytest.approx(expected, rel=1e-4)


def test_taylor_adds_gradients_up_with_their_signs(view: DecoderView, batches: CalibrationBatches):
    # |a + b| ≤ |a| + |b|, with the same weights and half of the targets on each side.
    halves = [CalibrationBatches(ids, 2, 2, "test", "0") for ids in batches.input_ids.split(2)]
    whole = score(view, batches, method="taylor").values
    parts = [score(view, half, method="taylor").values for half in halves]
    assert all(w < (a + b) / 2 for w, a, b in zip(whole, *parts, strict=True))


@pytest.mark.parametrize(("gradient_batch", "micro_batch"), [(4, 1), (1, 4), (3, 3)])
def test_taylor_does_not_depend_on_how_the_set_is_divided(
    view: DecoderView, batches: CalibrationBatches, gradient_batch: int, micro_batch: int
):
    other = CalibrationBatches(batches.input_ids, gradient_batch, micro_batch, "test", "0")
    assert score(view, other, method="taylor").values == pytest.approx(
        score(view, batches, method="taylor").values, rel=1e-4
    )


def test_perplexity_is_the_loss_of_the_model_that_skips_the_layer(
    view: DecoderView, batches: CalibrationBatches
):
    expected = [loss_without(view, batches, layer) for layer in range(view.n_layers)]
    values = score(view, batches, method="perplexity").values
    assert values == pytest.approx(expected, rel=1e-6)


def test_perplexity_passes_over_what_is_skipped_already(
    view: DecoderView, batches: CalibrationBatches
):
    with view.skipping([0, 3]):
        values = score(view, batches, method="perplexity").values
    assert values[0] is None
    assert values[3] is None
    for layer in (1, 2, 4, 5):
        assert values[layer] == pytest.approx(loss_without(view, batches, 0, 3, layer), rel=1e-6)


def test_perplexity_of_a_planted_identity_is_the_dense_loss(
    view: DecoderView, batches: CalibrationBatches
):
    view.layers[2].input_layernorm.weight.data.zero_()
    view.layers[2].post_attention_layernorm.weight.data.zero_()
    values = score(view, batches, method="perplexity").values
    # The same numbers, summed in another order: no other tolerance is needed.
    assert values[2] == pytest.approx(loss_without(view, batches), rel=1e-12)


def test_perplexity_runs_no_layer_before_the_one_left_out_again(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    runs: list[int] = []
    run_layer = DecoderView.run_layer

    def counted(self: DecoderView, layer: int, *rest: object) -> torch.Tensor:
        runs.append(layer)
        return run_layer(self, layer, *rest)

    monkeypatch.setattr(DecoderView, "run_layer", counted)
    score(view, batches, method="perplexity")
    # 6 + 5 + … + 1 layers for each of two micro-batches
    assert len(runs) == 2 * 21


def test_sleb_is_greedy_search_on_the_loss(view: DecoderView, batches: CalibrationBatches):
    plan, _ = select(
        view,
        batches,
        strategy="lowest",
        scoring="perplexity",
        rounds="each",
        drop_layers=3,
        protect=[0, 5],
    )
    expected: list[int] = []
    for _ in range(3):
        free = [layer for layer in range(1, 5) if layer not in expected]
        expected.append(min(free, key=lambda i: loss_without(view, batches, *expected, i)))
    assert [r.dropped for r in plan.rounds] == [(layer,) for layer in expected]


def test_angular_distance_by_hand(view: DecoderView, batches: CalibrationBatches):
    # Orthogonal output: arccos(0)/π = 1/2; opposite output: arccos(−1)/π = 1.
    def orthogonal(hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        even, odd = hidden_states[..., 0::2], hidden_states[..., 1::2]
        return torch.stack([-odd, even], dim=-1).flatten(-2)

    view.layers[2].forward = orthogonal
    view.layers[4].forward = lambda hidden_states, *_, **__: -3 * hidden_states
    for tokens in ("last", "all"):
        values = score(view, batches, method="angular-distance", tokens=tokens).values
        assert values[2] == pytest.approx(0.5, abs=1e-7)
        assert values[4] == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("tokens", ["last", "all"])
def test_angular_distances_equal_those_of_the_models_hidden_states(
    view: DecoderView, batches: CalibrationBatches, tokens: str
):
    view.layers[3].input_layernorm.weight.data.zero_()
    output = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    # The last of these is normed.
    states = [h[:, -1:] if tokens == "last" else h for h in output.hidden_states[:-1]]
    distances = angular_distances(view, batches, Options(tokens=tokens))
    assert distances.shape == (7, 7)
    for i in range(6):
        for j in range(6):
            cosine = torch.nn.functional.cosine_similarity(
                states[i].double(), states[j].double(), dim=-1
            )
            expected = float((cosine.clamp(-1, 1).arccos() / math.pi).mean())
            assert float(distances[i, j]) == pytest.approx(expected, abs=1e-6)


def test_angular_distance_to_itself_is_zero(view: DecoderView, batches: CalibrationBatches):
    distances = angular_distances(view, batches, Options(tokens="all"))
    assert float(distances.diagonal().max()) < 1e-7
    torch.testing.assert_close(distances, distances.T)
