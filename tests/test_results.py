"""An estimate: a mean with its standard error."""

from __future__ import annotations

import pytest
import torch

from layercut.results import Estimate, estimate_mean


def test_a_mean_has_the_standard_error_of_its_values():
    # mean of 1, 2, 6 = 3; s² = (4 + 1 + 9)/2 = 7; s/√3 = √(7/3)
    estimate = estimate_mean(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    assert (estimate.value, estimate.n) == (3.0, 3)
    assert estimate.stderr == pytest.approx((7 / 3) ** 0.5)


def test_a_single_value_shows_no_spread():
    assert estimate_mean(torch.tensor([2.5]).double()) == Estimate(2.5, 0.0, 1)


def test_means_of_windows_count_the_tokens_behind_them():
    assert estimate_mean(torch.tensor([1.0, 3.0]).double(), 64) == Estimate(2.0, 1.0, 64)
