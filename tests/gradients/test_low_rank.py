"""Sums over low-rank products, against the products themselves."""

from __future__ import annotations

import pytest
import torch

from layercut.gradients import low_rank
from layercut.gradients.low_rank import mean_square, squared_norms


def factors(n: int, n_out: int, n_in: int, rank: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, rank, n_in, generator=generator)
    return a, torch.randn(n, n_out, rank, generator=generator)


def test_one_product_by_hand():
    # B·A = (1, 2)ᵀ(3, 4) = ((3, 4), (6, 8)): 9 + 16 + 36 + 64 = 125
    a, b = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0], [2.0]]])
    assert squared_norms(a, b).tolist() == [125.0]
    assert mean_square(a, b).tolist() == [[9.0, 16.0], [36.0, 64.0]]


@pytest.mark.parametrize("shape", [(5, 40, 24), (3, 24, 40), (40, 192, 576), (2, 3000, 5)])
def test_squared_norms_equal_those_of_the_products(shape: tuple[int, int, int]):
    a, b = factors(*shape)
    expected = (b.double() @ a.double()).square().sum((1, 2))
    error = (squared_norms(a, b) / expected - 1).abs()
    assert float(error.median()) < 2e-7
    assert float(error.max()) < 1e-6
    # The bound of its docstring: how a processor orders its sums decides within it.
    ratio = a.double().square().sum((1, 2)) * b.double().square().sum((1, 2)) / expected
    assert bool((error <= 1e-7 * ratio).all())


@pytest.mark.parametrize("shape", [(14336, 4096), (4096, 14336)])
def test_long_rows_do_not_drift(shape: tuple[int, int]):
    # One float32 dot product per Gram entry would be off by 1e-6.
    a, b = (factor.double() for factor in factors(2, *shape))
    expected = ((a @ a.mT) * (b.mT @ b)).sum((1, 2))
    torch.testing.assert_close(squared_norms(a.float(), b.float()), expected, rtol=1e-7, atol=0)


def test_products_smaller_than_their_factors_lose_no_more_digits_than_promised():
    a, b = factors(4, 500, 600, rank=2)
    a[:, 1] = a[:, 0] + 0.1 * a[:, 1]
    b[:, :, 1] = -b[:, :, 0]
    expected = (b.double() @ a.double()).square().sum((1, 2))
    ratio = a.square().sum((1, 2)) * b.square().sum((1, 2)) / expected
    assert float(ratio.min()) > 300
    errors = (squared_norms(a, b) / expected - 1).abs()
    assert bool((errors < 1e-7 * ratio).all())


def test_slices_of_a_wider_record_are_read_in_place():
    rows = torch.randn(6, 3 * (4 * 10 + 4 * 7), generator=torch.Generator().manual_seed(0))
    a, b = rows[:, 68:108].view(6, 4, 10), rows[:, 108:136].view(6, 7, 4)
    assert a.data_ptr() == rows[0, 68].data_ptr()
    torch.testing.assert_close(squared_norms(a, b), squared_norms(a.clone(), b.clone()))


@pytest.mark.parametrize("block", [1, 64, 2**18])
def test_mean_square_is_that_of_the_products_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, block: int
):
    monkeypatch.setattr(low_rank, "SQUARE_BLOCK", block)
    a, b = factors(5, 40, 24)
    expected = (b.double() @ a.double()).square().mean(0)
    torch.testing.assert_close(mean_square(a, b).double(), expected, rtol=1e-4, atol=1e-9)
