"""Perplexity by hand and against transformers' own loss; speed is a positive number."""

from __future__ import annotations

import math

import pytest
import torch

from layercut.errors import DataError, NumericsError
from layercut.evaluation.evaluate import evaluate
from layercut.evaluation.perplexity import perplexity
from layercut.models.view import DecoderView


def test_perplexity_equals_transformers_loss(view: DecoderView, ids: torch.Tensor):
    loss = view.model(input_ids=ids, labels=ids, use_cache=False).loss
    estimate = perplexity(view, ids)
    assert estimate.value == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert estimate.n == 4 * 31


def test_standard_error_is_that_of_the_windows(view: DecoderView, ids: torch.Tensor):
    means = view.token_losses(ids).mean(dim=1)
    estimate = perplexity(view, ids)
    # se(exp(m)) ≈ exp(m)·se(m), se(m) = s/√4
    assert estimate.stderr == pytest.approx(estimate.value * float(means.std()) / 2, rel=1e-4)


def test_one_window_shows_no_spread(view: DecoderView, ids: torch.Tensor):
    assert perplexity(view, ids[:1]).stderr == 0.0


def test_a_uniform_model_has_the_vocabulary_as_perplexity(view: DecoderView, ids: torch.Tensor):
    view.model.lm_head.weight.data.zero_()
    assert perplexity(view, ids).value == pytest.approx(259, rel=1e-5)


def test_loss_in_chunks_equals_the_loss_at_once(
    view: DecoderView, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    whole = view.token_losses(ids)
    monkeypatch.setattr("layercut.models.view.LOSS_CHUNK", 7)
    torch.testing.assert_close(view.token_losses(ids), whole)


def test_tokens_outside_the_vocabulary_are_refused(view: DecoderView):
    with pytest.raises(DataError, match="token id 259 is outside the model's vocabulary of 259"):
        perplexity(view, torch.tensor([[5, 259]]))


def test_a_loss_that_is_not_finite_is_an_error(view: DecoderView, ids: torch.Tensor):
    view.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="the evaluation loss is nan"):
        perplexity(view, ids)


def test_evaluation_counts_tied_parameters_once_and_measures_speed(view: DecoderView, tmp_path):
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox. " * 50)
    result = evaluate(view, text={"fox": str(text)}, seq_len=32, max_tokens=128)
    assert result.n_parameters == sum(p.numel() for p in view.model.parameters())
    assert result.perplexity["fox"].n == 4 * 31
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
