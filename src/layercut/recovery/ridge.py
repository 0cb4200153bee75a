"""Ridge regression D = argmin Σ ‖e − D·a‖² + λ̂ ‖D‖², on the smaller of two sides.

Source   docs/methods.md#ridge-solver
Formula  D = C (G + λ̂ I)⁻¹ = Eᵀ (K + λ̂ I)⁻¹ A,  λ̂ = λ · tr(G)/in = λ · tr(K)/in
         A (n, in), E (n, out): rows a and e; G = AᵀA (in, in), K = AAᵀ (n, n), C = EᵀA (out, in)
Cost     in³ or n³, whichever is smaller: with fewer tokens than features the tokens' side, exactly
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from layercut.models.ranks import ALONE, Ranks

PENALTY_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
SMALLER_PENALTIES = (3e-4, 3e-5, 3e-6, 3e-7)
"""Tried one by one where the least of the grid is the best: nearly all can be explained then."""

Rows = Iterable[tuple[Tensor, Tensor]]
"""Slices of the rows a, (n, in), and e, (n, out), float32."""


class Shape(NamedTuple):
    """Sizes of a problem: rows to fit, rows to judge by, features of a, and those of e.

    Rows are counted on one rank; which side is smaller is a matter of all ranks' rows.
    """

    n_fitted: int
    n_held_out: int
    width: int
    out: int


@contextmanager
def fast_products(device: torch.device) -> Iterator[None]:
    """Let a GPU's float32 products round their factors to TF32 inside the block.

    Their errors, a two-thousandth each, average out over the tokens of a sum.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def factor_ridge(gram: Tensor, penalty: float, width: int | None = None) -> Tensor | None:
    """Cholesky factor of G + λ̂ I or K + λ̂ I; ``None`` if that is not positive definite.

    Args:
        gram: G, (in, in), or K, (n, n), float64.
        penalty: λ, as a share of the mean square of a.
        width: the number of features; default: that of ``gram``.
    """
    factor, info = _factor(gram, penalty, width or len(gram))
    return None if int(info) else factor


def _factor(gram: Tensor, penalty: float, width: int) -> tuple[Tensor, Tensor]:
    ridged = gram.clone()
    ridged.diagonal().add_(penalty * gram.diagonal().sum() / width)
    factor, info = torch.linalg.cholesky_ex(ridged)
    return factor, info


def fit_best_penalty(
    fitted: Rows, held_out: Rows, shape: Shape, device: torch.device, ranks: Ranks = ALONE
) -> Tensor | None:
    """D of the λ that lowers the held-out error most, (out, in); ``None`` if none lowers it.

    The device is waited for once, unless the least λ is the best. Several ranks share the grid.

    Args:
        fitted: rows to fit.
        held_out: rows to choose λ by.
        shape: how many they are, and how wide.
        device: where the rows are, and D will be.
        ranks: who has the other rows.
    """
    n_fitted, n_held_out = ranks.total(shape.n_fitted, shape.n_held_out)
    with fast_products(device):
        by_tokens = n_fitted < shape.width
        side = (_TokenSide if by_tokens else _FeatureSide)(fitted, shape, device, ranks)
        from_sums = not by_tokens and n_held_out > shape.width
        errors = (_ErrorSums if from_sums else _ErrorRows)(held_out, shape, device, ranks, side)
        if ranks.world > 1:
            return _share_penalties(side, errors, shape, device, ranks)
        best: Tensor | None = None
        lowest = torch.zeros((), dtype=torch.float64, device=device)
        is_least = torch.zeros((), dtype=torch.bool, device=device)
        for penalty in PENALTY_GRID:
            solution, change, better = _try(side, errors, penalty, shape.width, lowest)
            best = solution if best is None else torch.where(better, solution, best)
            lowest = torch.where(better, change, lowest)
            is_least = better if penalty == PENALTY_GRID[0] else is_least & ~better
        assert best is not None
        improves, more = torch.stack([lowest < 0, is_least]).tolist()
        for penalty in SMALLER_PENALTIES if more else ():
            solution, change, better = _try(side, errors, penalty, shape.width, lowest)
            if not bool(better):
                break
            best, lowest = solution, change
        return side.update(best) if improves else None


def solve_ridge(
    rows: Rows, shape: Shape, penalty: float, device: torch.device, ranks: Ranks = ALONE
) -> Tensor | None:
    """D of one λ, (out, in) float32; ``None`` if the sums are not positive definite.

    Args:
        rows: rows to fit.
        shape: how many they are, and how wide.
        penalty: λ, as a share of the mean square of a.
        device: where the rows are, and D will be.
        ranks: who has the other rows.
    """
    with fast_products(device):
        by_tokens = ranks.total(shape.n_fitted)[0] < shape.width
        side = (_TokenSide if by_tokens else _FeatureSide)(rows, shape, device, ranks)
        factor, info = _factor(side.gram, penalty, shape.width)
        if ranks.agree(bool(info)):
            return None
        return side.update(torch.cholesky_solve(side.right, factor)).float()


def _share_penalties(
    side: _FeatureSide | _TokenSide,
    errors: _ErrorRows | _ErrorSums,
    shape: Shape,
    device: torch.device,
    ranks: Ranks,
) -> Tensor | None:
    """D of the best λ, where each rank solves for its own part of the grid.

    The smaller ones are tried as many at once as there are ranks, until one is no better.
    """
    rounds: list[tuple[float, ...]] = [PENALTY_GRID]
    rounds += [
        SMALLER_PENALTIES[i : i + ranks.world]
        for i in range(0, len(SMALLER_PENALTIES), ranks.world)
    ]
    lowest, owner, is_least = 0.0, 0, False
    best: Tensor | None = None
    for penalties in rounds:
        mine: dict[int, Tensor] = {}
        changes = torch.zeros(len(penalties), dtype=torch.float64, device=device)
        for place in range(ranks.rank, len(penalties), ranks.world):
            factor, info = _factor(side.gram, penalties[place], shape.width)
            mine[place] = torch.cholesky_solve(side.right, factor)
            change = errors.change(mine[place])
            changes[place] = torch.where(info.bool(), torch.inf, change)
        ranks.sum_(changes)
        goes_on = penalties != PENALTY_GRID
        for place, change in enumerate(changes.tolist()):
            if change < lowest:
                lowest, owner, best = change, place % ranks.world, mine.get(place)
                is_least = place == (len(penalties) - 1 if goes_on else 0)
            elif goes_on:
                is_least = False
                break
        if not lowest < 0:
            return None
        if not is_least:
            break
    if ranks.rank == owner:
        assert best is not None
        update = side.update(best).contiguous()
    else:
        update = torch.empty(shape.out, shape.width, dtype=side.dtype, device=device)
    ranks.broadcast_(update, owner)
    return update


def _try(
    side: _FeatureSide | _TokenSide,
    errors: _ErrorRows | _ErrorSums,
    penalty: float,
    width: int,
    lowest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The solution for one λ, the change of the held-out error, and whether that is the lowest."""
    factor, info = _factor(side.gram, penalty, width)
    solution = torch.cholesky_solve(side.right, factor)
    change = errors.change(solution)
    return solution, change, (info == 0) & (change < lowest)


class _FeatureSide:
    """G and Cᵀ, summed as the rows pass; a solution is Dᵀ, (in, out) float64."""

    dtype = torch.float64

    def __init__(self, rows: Rows, shape: Shape, device: torch.device, ranks: Ranks) -> None:
        width, out = shape.width, shape.out
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.right = torch.zeros(width, out, dtype=torch.float64, device=device)
        for a, e in rows:  # products in float32, their sums in float64
            self.gram += a.T @ a
            self.right += a.T @ e
        ranks.sum_(self.gram, self.right)

    def basis(self, a: Tensor) -> Tensor:
        """What times a solution predicts e of other rows."""
        return a

    def update(self, solution: Tensor) -> Tensor:
        return solution.T


class _TokenSide:
    """K and E of all ranks' rows; a solution is (K + λ̂ I)⁻¹ E, (n, out) float64."""

    dtype = torch.float32

    def __init__(self, rows: Rows, shape: Shape, device: torch.device, ranks: Ranks) -> None:
        a, e = _stack(rows, shape.n_fitted, shape, device)
        self.a = ranks.gather_rows(a)
        self.gram = ranks.gather_rows(a @ self.a.T).double()
        self.right = ranks.gather_rows(e).double()

    def basis(self, a: Tensor) -> Tensor:
        return a @ self.a.T

    def update(self, solution: Tensor) -> Tensor:
        return solution.T.float() @ self.a


class _ErrorRows:
    """‖e − D·a‖² − ‖e‖² over the held-out rows, those of all ranks."""

    def __init__(
        self,
        rows: Rows,
        shape: Shape,
        device: torch.device,
        ranks: Ranks,
        side: _FeatureSide | _TokenSide,
    ) -> None:
        a, e = _stack(rows, shape.n_held_out, shape, device)
        self.basis, self.e = side.basis(ranks.gather_rows(a)), ranks.gather_rows(e)
        self.before = self.e.square().sum(dtype=torch.float64)

    def change(self, solution: Tensor) -> Tensor:
        residual = self.e - self.basis @ solution.float()
        return residual.square().sum(dtype=torch.float64) - self.before


class _ErrorSums:
    """The same from the held-out rows' G and C, which are smaller than many rows."""

    def __init__(
        self,
        rows: Rows,
        shape: Shape,
        device: torch.device,
        ranks: Ranks,
        side: _FeatureSide | _TokenSide,
    ) -> None:
        self.sums = _FeatureSide(rows, shape, device, ranks)

    def change(self, solution: Tensor) -> Tensor:
        return (solution * (self.sums.gram @ solution - 2 * self.sums.right)).sum()


def _stack(rows: Rows, n: int, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """All rows a and e, (n, in) and (n, out)."""
    a = torch.empty(n, shape.width, device=device)
    e = torch.empty(n, shape.out, device=device)
    start = 0
    for part_a, part_e in rows:
        stop = start + len(part_a)
        a[start:stop], e[start:stop] = part_a, part_e
        start = stop
    return a, e
