"""Attention kernels of training: chosen by length, put back afterwards, the same numbers."""

from __future__ import annotations

import pytest
import torch

from layercut.models.attention import LONGEST, eager
from layercut.models.view import DecoderView


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
