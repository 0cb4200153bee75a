"""Attention kernels of training: chosen by length, put back afterwards, the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of
from family_configs import Family
from layercut.models.attention import LONGEST, eager
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from saved_families import save_family
from toy_configs import toy_settings


def test_short_rows_attend_by_plain_products_and_long_ones_do_not(view: DecoderView):
    before = view.model.config._attn_implementation
    assert before == "sdpa"
    seen = []
    for length in (LONGEST, LONGEST + 1):
        with eager(view, length):
            seen.append(view.model.config._attn_implementation)
    assert seen == ["eager", "sdpa"]


def test_the_kernel_is_put_back_after_a_fault(view: DecoderView):
    with pytest.raises(ZeroDivisionError), eager(view, 8):
        _ = 1 / 0
    assert view.model.config._attn_implementation == "sdpa"


def test_both_kernels_give_the_same_logits(view: DecoderView):
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        fused = view.model(input_ids=ids).logits
        with eager(view, 12):
            plain = view.model(input_ids=ids).logits
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-5)


def test_a_text_decoder_beside_a_tower_with_another_kernel_keeps_its_own(tmp_path: Path):
    save_family(tmp_path, Family("got_ocr2", toy_settings("got_ocr2")))
    view = load(str(tmp_path), dtype="float32")
    before = view.model.config
    kernels = (before._attn_implementation, before.text_config._attn_implementation)
    assert kernels == ("eager", "sdpa")
    apply(view, plan_of(1, 2, n_layers=8))
    after = view.model.config
    assert (after._attn_implementation, after.text_config._attn_implementation) == kernels
