"""Perplexity by hand and against transformers' own loss; speed is a positive number."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import processors

from conftest import byte_tokenizer, leading_tokenizer
from layercut.errors import DataError, NumericsError
from layercut.evaluation.evaluate import evaluate
from layercut.evaluation.perplexity import perplexity
from layercut.evaluation.speed import _prompt
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


def test_windows_and_prompts_start_with_the_leading_token(view: DecoderView, tmp_path: Path):
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox. " * 20)
    cut = {"text": {"fox": str(text)}, "seq_len": 22, "max_tokens": 66, "speed": False}
    plain = evaluate(view, **cut).to_json()
    assert (plain["leading_token"], plain["windows"]["fox"]["leading_token"]) == (None, None)
    view.tokenizer = leading_tokenizer()
    found = evaluate(view, **cut)
    assert found.to_json()["leading_token"] == "<bos>"
    assert found.to_json()["windows"]["fox"] == {
        "source": str(text),
        "n_windows": 3,
        "seq_len": 22,
        "detokenized": False,
        "leading_token": "<bos>",
        "document_separator": "<eos>",
    }
    # 21 bytes of text are predicted in each window, from the leading token on.
    ids = byte_tokenizer()("The quick brown fox. " * 3)["input_ids"]
    rows = torch.tensor(ids).view(3, 21)
    windows = torch.cat([torch.ones(3, 1, dtype=torch.int64), rows], dim=1)
    loss = view.model(input_ids=windows, labels=windows, use_cache=False).loss
    assert found.perplexity["fox"].value == pytest.approx(math.exp(float(loss)), rel=1e-5)
    assert found.perplexity["fox"].n == 63
    assert _prompt(view, 5).tolist() == [[1, 1, 2, 3, 4]]


def test_of_several_leading_tokens_none_is_predicted(view: DecoderView, ids: torch.Tensor):
    single = leading_tokenizer()
    whole = view.token_losses(ids)
    started = torch.cat([torch.tensor([[2, 1]]).expand(4, 2), ids[:, :20]], dim=1)
    plain, hidden = view.token_losses(started), torch.randn(4, 22, 16)
    _, plain_sum = view.loss_gradient(hidden, started)
    every = view.stream_losses(hidden, started)
    single.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <bos> $A", special_tokens=[("<pad>", 2), ("<bos>", 1)]
    )
    view.tokenizer = single
    torch.testing.assert_close(view.token_losses(started), plain[:, 1:])
    gradient, total = view.loss_gradient(hidden, started)
    assert float(total) == pytest.approx(float(plain_sum - every[:, 0].sum()), rel=1e-5)
    assert gradient.shape == hidden.shape
    torch.testing.assert_close(view.token_losses(ids), whole)


def test_evaluation_counts_tied_parameters_once_and_measures_speed(view: DecoderView, tmp_path):
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox. " * 50)
    result = evaluate(view, text={"fox": str(text)}, seq_len=32, max_tokens=128)
    assert result.n_parameters == sum(p.numel() for p in view.model.parameters())
    assert result.perplexity["fox"].n == 4 * 31
    assert result.prefill_tokens_per_second > 0
    assert result.decode_tokens_per_second > 0
