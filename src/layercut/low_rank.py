"""Sums over products B·A of low rank, without ever forming them.

Source   METHODS §1; ‖BA‖²_F = Σ_jk (BA)²_jk = tr((BᵀB)(AAᵀ))
         A (rank, in), B (out, rank): the Gram matrices BᵀB and AAᵀ are rank × rank
Cost     rank²·(in + out) operations per product instead of rank·in·out, and no out × in memory
"""

from __future__ import annotations

import torch
from torch import Tensor

GRAM_BLOCK = 8192
"""Factor entries that are widened to float64 at once: 64 KiB, so that they stay in the cache."""

SQUARE_BLOCK = 2**18
"""Entries of one product that exist at once: 1 MiB of float32, so that they stay in the cache."""


def squared_norms(a: Tensor, b: Tensor) -> Tensor:
    """‖b_i a_i‖²_F of every pair of factors, (n,) float64.

    Args:
        a: (n, rank, in).
        b: (n, out, rank).
    """
    _, rank, n_in = a.shape
    n_pairs = max(1, GRAM_BLOCK // (rank * max(n_in, b.shape[1])))
    parts = zip(a.split(n_pairs), b.mT.split(n_pairs), strict=True)
    return torch.cat([(_gram(wide) * _gram(tall)).sum(dim=(1, 2)) for wide, tall in parts])


def _gram(rows: Tensor) -> Tensor:
    """``rows`` times its transpose, (n, rank, k) → (n, rank, rank), float64.

    In float32 the trace is off by a few 1e-6: Gram matrices square the condition of the factors.
    """
    n, rank, _ = rows.shape
    total = rows.new_zeros((n, rank, rank), dtype=torch.float64)
    for block in rows.split(max(1, GRAM_BLOCK // (n * rank)), dim=2):
        wide = block.double()
        total.baddbmm_(wide, wide.mT)
    return total


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """(1/n) Σ_i (b_i a_i) ⊙ (b_i a_i), (out, in) float32.

    Args:
        a: (n, rank, in).
        b: (n, out, rank).
    """
    n, _, n_in = a.shape
    total = a.new_zeros((b.shape[1], n_in), dtype=torch.float32)
    n_rows = max(1, SQUARE_BLOCK // n_in)
    for rows, tall in zip(total.split(n_rows), b.split(n_rows, dim=1), strict=True):
        for i in range(n):
            product = tall[i] @ a[i]
            rows.addcmul_(product, product, value=1 / n)
    return total
