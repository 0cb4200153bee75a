"""Continuations against `generate`; their figures by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import save_tiny
from layercut.errors import DataError, NumericsError
from layercut.evaluation.generation import (
    choose_prompts,
    continue_prompts,
    distinct_share,
    generation_check,
    loop_share,
)
from layercut.models.load import load
from layercut.models.view import DecoderView


def test_continuations_are_those_of_generate(view: DecoderView, ids: torch.Tensor):
    whole = view.model.generate(
        ids[:, :12],
        attention_mask=torch.ones(4, 12),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
    )
    assert continue_prompts(view, ids[:, :12], 9).equal(whole[:, 12:])


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("skipped", [(), (0,), (2, 3)])
def test_the_cache_changes_no_token(
    model_type: str, skipped: tuple[int, ...], ids: torch.Tensor, tmp_path: Path
):
    settings = {"sliding_window": 4} if model_type == "gemma3_text" else {}
    view = load(str(save_tiny(tmp_path / "m", model_type, **settings)), dtype="float32")
    text = ids[:2, :10]
    with view.skipping(skipped):
        found = continue_prompts(view, text, 6)
        for _ in range(6):
            logits = view.model(input_ids=text, use_cache=False).logits[:, -1]
            text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)
    assert found.equal(text[:, 10:])


def test_distinct_grams_are_counted():
    # 1 2 1 2 1: two of five 1-grams; 12, 21 of four 2-grams; 121, 212 of three 3-grams
    shares = [distinct_share([1, 2, 1, 2, 1], n) for n in (1, 2, 3)]
    assert shares == [2 / 5, 2 / 4, 2 / 3]
    assert distinct_share([1], 2) == 1.0


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([1, 2, 3, 4], 0.0),
        ([7, 7, 1, 2], 2 / 4),  # one period of one token, repeated once
        ([1, 2, 3, 1, 2, 4], 0.0),  # 1 2 comes back, but not the whole period 1 2 3
        ([9, 1, 2, 1, 2, 1], 5 / 6),  # 1 2 1 2 1: period 2, from its first token on
        ([5] * 8, 1.0),
    ],
)
def test_a_loop_is_a_stretch_with_one_period(tokens: list[int], share: float):
    assert loop_share(tokens) == share


def test_agreement_counts_prefix_and_places(
    view: DecoderView, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    ours = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    monkeypatch.setattr("layercut.evaluation.generation.continue_prompts", lambda *_: ours)
    theirs = torch.tensor([[1, 2, 9, 4], [0, 6, 7, 8]])
    found = generation_check(view, ids[:2, :5], theirs)
    # prefixes 2 and 0: mean 1, s = √2, se = √2/√2 = 1; 3 of 4 places in both
    assert (found.common_prefix.value, found.common_prefix.stderr) == (1.0, pytest.approx(1.0))
    assert (found.agreement.value, found.agreement.stderr) == (0.75, 0.0)
    assert found.to_json()["agreement"] == {"value": 0.75, "stderr": 0.0, "n_prompts": 2}
    assert found.to_json()["new_tokens"] == 4


def test_a_model_agrees_with_itself(view: DecoderView, ids: torch.Tensor):
    dense = generation_check(view, ids[:, :8], new_tokens=10)
    assert dense.agreement is None
    assert "agreement" not in dense.to_json()
    again = generation_check(view, ids[:, :8], dense.tokens)
    assert (again.common_prefix.value, again.agreement.value) == (10.0, 1.0)
    with view.skipping([1, 2, 3]):
        pruned = generation_check(view, ids[:, :8], dense.tokens)
    assert pruned.agreement.value < 1


def test_prompts_are_the_starts_of_evenly_spaced_windows():
    windows = torch.arange(90).view(9, 10)
    assert choose_prompts(windows, n_prompts=3, prompt_tokens=2).tolist() == [
        [0, 1],
        [40, 41],
        [80, 81],
    ]
    assert choose_prompts(windows[:1]).shape == (1, 10)


def test_what_cannot_be_continued_is_refused(view: DecoderView, ids: torch.Tensor):
    with pytest.raises(DataError, match=r"32 tokens and 97 new ones exceed .* context of 128"):
        generation_check(view, ids, new_tokens=97)
    with pytest.raises(DataError, match="4 prompts and 3 continuations"):
        generation_check(view, ids[:, :8], ids[:3, 8:])
    view.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="logits are NaN at new token 0"):
        generation_check(view, ids[:, :8])
