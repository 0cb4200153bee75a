"""Ridge regression on the side of the features and of the tokens: the same, by definition."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from layercut.recovery import ridge
from layercut.recovery.ridge import Shape, factor_ridge, fit_best_penalty

CPU = torch.device("cpu")
N, WIDTH, OUT = 20, 32, 5


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, WIDTH, generator=generator)
    change = torch.randn(WIDTH, OUT, generator=torch.Generator().manual_seed(9))
    return a, a @ change + 0.1 * torch.randn(n, OUT, generator=generator)


def sliced(pair: tuple[Tensor, Tensor], size: int = 7) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(pair[0].split(size), pair[1].split(size), strict=True)


def fit_by_definition(fitted: tuple[Tensor, Tensor], penalty: float) -> Tensor:
    a, e = (part.double() for part in fitted)
    gram = a.T @ a
    ridged = gram + penalty * gram.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    return torch.linalg.solve(ridged, a.T @ e).T


@pytest.mark.parametrize("n_fitted", [20, 31, 32, 200])
@pytest.mark.parametrize("n_held_out", [3, 50])
def test_the_best_penalty_is_that_of_the_definition(n_fitted: int, n_held_out: int):
    # Fewer tokens than features are solved on the tokens' side, others on the features'; held-out
    # errors come from rows or from sums. All four must choose and give the same.
    fitted, held_out = rows(n_fitted, 0), rows(n_held_out, 1)
    found = fit_best_penalty(
        sliced(fitted), sliced(held_out), Shape(n_fitted, n_held_out, WIDTH, OUT), CPU
    )
    errors: dict[float, float] = {}
    for penalty in (*ridge.PENALTY_GRID, *ridge.SMALLER_PENALTIES):
        # Below the grid, one by one as long as the least is the best.
        if penalty < ridge.PENALTY_GRID[0] and min(errors, key=errors.__getitem__) != min(errors):
            break
        change = fit_by_definition(fitted, penalty)
        errors[penalty] = float((held_out[1] - held_out[0] @ change.T.float()).square().sum())
    best = min(errors, key=lambda penalty: errors[penalty])
    assert found is not None
    expected = fit_by_definition(fitted, best)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n_fitted", [20, 200])
def test_what_lowers_no_held_out_error_is_not_found(n_fitted: int):
    fitted, (a, e) = rows(n_fitted, 0), rows(9, 1)
    shape = Shape(n_fitted, 9, WIDTH, OUT)
    assert fit_best_penalty(sliced(fitted), sliced((a, -e)), shape, CPU) is None
    silent = torch.zeros(n_fitted, WIDTH), fitted[1]
    assert fit_best_penalty(sliced(silent), sliced((a, e)), shape, CPU) is None


def test_the_penalty_is_a_share_of_the_features_mean_square_on_both_sides():
    a, _ = rows(N, 0)
    by_features = factor_ridge((a.T @ a).double(), 0.1)
    by_tokens = factor_ridge((a @ a.T).double(), 0.1, WIDTH)
    assert by_features is not None
    assert by_tokens is not None
    added = [
        float((factor @ factor.T).trace() - (a**2).sum()) / len(factor)
        for factor in (by_features, by_tokens)
    ]
    assert added[0] == pytest.approx(added[1], rel=1e-4)
