"""Ridge regression D = argmin Σ ‖e − D·a‖² + λ̂ ‖D‖², on the smaller of two sides.

Source   docs/methods.md#ridge-solver
Formula  D = C (G + λ̂ I)⁻¹ = Eᵀ (K + λ̂ I)⁻¹ A,  λ̂ = λ · tr(G)/in = λ · tr(K)/in
         A (n, in), E (n, out): rows a and e; G = AᵀA (in, in), K = AAᵀ (n, n), C = EᵀA (out, in)
Cost     in³ or n³, whichever is smaller: with fewer tokens than features the tokens' side, exactly
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

PENALTY_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

Rows = Iterable[tuple[Tensor, Tensor]]
"""Slices of the rows a, (n, in), and e, (n, out), float32."""


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
    fitted: Rows, held_out: Rows, n_fitted: int, width: int, out: int, device: torch.device
) -> Tensor | None:
    """D of the λ that lowers the held-out error most, (out, in); ``None`` if none lowers it.

    The device is waited for once, whatever the number of λ.

    Args:
        fitted: rows to fit.
        held_out: rows to choose λ by; at least one.
        n_fitted: number of the former.
        width: features of a.
        out: those of e.
        device: where the rows are, and D will be.
    """
    with fast_products(device):
        side = _TokenSide(fitted) if n_fitted < width else _FeatureSide(fitted, width, out, device)
        judged = _HeldOut(held_out, side)
        best: Tensor | None = None
        lowest = torch.zeros((), dtype=torch.float64, device=device)
        for penalty in PENALTY_GRID:
            factor, info = _factor(side.gram, penalty, width)
            solution = torch.cholesky_solve(side.right, factor)
            change = judged.error_change(solution)
            better = (info == 0) & (change < lowest)
            best = solution if best is None else torch.where(better, solution, best)
            lowest = torch.where(better, change, lowest)
        assert best is not None
        return side.update(best) if bool(lowest < 0) else None


class _FeatureSide:
    """G and Cᵀ; a solution is Dᵀ, (in, out) float64."""

    def __init__(self, rows: Rows, width: int, out: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.right = torch.zeros(width, out, dtype=torch.float64, device=device)
        for a, e in rows:  # products in float32, their sums in float64
            self.gram += a.T @ a
            self.right += a.T @ e

    def predict(self, a: Tensor, solution: Tensor) -> Tensor:
        return a @ solution.float()

    def update(self, solution: Tensor) -> Tensor:
        return solution.T


class _TokenSide:
    """K and E; a solution is (K + λ̂ I)⁻¹ E, (n, out) float64."""

    def __init__(self, rows: Rows) -> None:
        pairs = list(rows)
        self.a = torch.cat([a for a, _ in pairs])
        self.gram = (self.a @ self.a.T).double()
        self.right = torch.cat([e for _, e in pairs]).double()

    def predict(self, a: Tensor, solution: Tensor) -> Tensor:
        return (a @ self.a.T) @ solution.float()

    def update(self, solution: Tensor) -> Tensor:
        return solution.T.float() @ self.a


class _HeldOut:
    """‖e − D·a‖² − ‖e‖² over the held-out rows, from them or, where smaller, from their sums."""

    def __init__(self, rows: Rows, side: _FeatureSide | _TokenSide) -> None:
        pairs = list(rows)
        self.a, self.e = (torch.cat(part) for part in zip(*pairs, strict=True))
        self.side = side
        self.sums: _FeatureSide | None = None
        width, out = self.a.shape[1], self.e.shape[1]
        if isinstance(side, _FeatureSide) and len(self.a) > width:
            self.sums = _FeatureSide(pairs, width, out, self.a.device)
        self.before = self.e.square().sum(dtype=torch.float64)

    def error_change(self, solution: Tensor) -> Tensor:
        if self.sums is not None:
            products = self.sums.gram @ solution - 2 * self.sums.right
            return (solution * products).sum()
        residual = self.e - self.side.predict(self.a, solution)
        return residual.square().sum(dtype=torch.float64) - self.before
