"""The polar factor of a gradient: a direction in which all singular values count alike.

Source   Muon, arXiv:2502.16982
Formula  U Vᵀ of U S Vᵀ
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-8
"""Part of the largest squared singular value below which one is noise, and not raised to 1."""
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5 + ((1.875, -1.25, 0.375),) * 2
"""Coefficients of every iteration: Muon's five, arXiv:2502.16982, and two that converge to 1."""


@torch.no_grad()
def orthogonalize(gradient: Tensor) -> Tensor:
    """U Vᵀ of a matrix U S Vᵀ, float32: all its singular values become 1, but for noise's.

    On a CPU from the eigenvectors Q of the smaller Gram matrix, G Gᵀ = Q Λ Qᵀ, as
    U Vᵀ = Q Λ^(−½) Qᵀ G; on a GPU by products alone, which takes a tenth of the time there.
    """
    is_wide = gradient.shape[0] <= gradient.shape[1]
    wide = (gradient if is_wide else gradient.T).float()
    wide = wide / wide.norm().clamp_min(torch.finfo(torch.float32).tiny)
    factor = _iterate(wide) if wide.is_cuda else _decompose(wide)
    return factor if is_wide else factor.T


def _decompose(wide: Tensor) -> Tensor:
    """U Vᵀ by the eigenvalues of the Gram matrix; ``wide`` has norm 1, or is zero."""
    double = wide.double()  # in float32, singular values below 3e-4 would drown in rounding
    values, vectors = torch.linalg.eigh(double @ double.T)
    least = max(float(values[-1]) * SMALLEST, 1e-30)  # of zeros nothing is raised
    raised = values.clamp_min(least).rsqrt()
    factor: Tensor = ((vectors * raised) @ vectors.T).float() @ wide
    return factor


def _iterate(wide: Tensor) -> Tensor:
    """U Vᵀ by Newton–Schulz in bfloat16: each step maps every singular value s to as + bs³ + cs⁵.

    The first steps raise small values fast and leave all between 0.7 and 1.2; the last ones, which
    converge, bring those to within a hundredth of 1.
    """
    x = wide.bfloat16()
    for a, b, c in NEWTON_SCHULZ:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()
