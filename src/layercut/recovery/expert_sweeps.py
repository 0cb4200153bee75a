"""Many maps into one sum, each fitted in turn towards what all others leave (Gauss–Seidel).

Formula  D_k = argmin Σ_t w_t² ‖r_t + D_k·a_kt − D·a_kt‖² + λ̂ ‖D‖²,   r ← r + (D_k before − D_k)·a_k
         r_t (d): what the sum still lacks; a_kt (in): what map k reads, of tokens that reach it
Rule     one λ for all. It is large at first, when most of what a map sees is what the others
         leave, and goes down from sweep to sweep as long as the held-out error falls
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layercut.models.ranks import Ranks
from layercut.recovery.ridge import PENALTY_GRID, SMALLER_PENALTIES, Shape, solve_ridge
from layercut.spool import SLICE, Spool

SWEEPS = 10
LEAST_GAIN = 0.003
"""Sweeps end where the held-out error falls by a smaller share."""
PENALTIES = tuple(sorted((*PENALTY_GRID, *SMALLER_PENALTIES)))
FIRST_PENALTY = PENALTIES.index(0.1)

Part = tuple[Tensor, Tensor]
"""Tokens, (n,) int64, and what a map reads of them, (n, in) float32."""
Changes = dict[str, Tensor]
"""D of every map that has one, (out, in), by its name."""


@dataclass(frozen=True, slots=True)
class Member:
    """One of the maps.

    Attributes:
        name: of the map.
        width: what it reads, in.
        parts: reads the tokens that reach it, on this rank, slice by slice.
    """

    name: str
    width: int
    parts: Callable[[], Sequence[Part]]


@dataclass(slots=True)
class _State:
    """What sweeps have reached: the held-out error, every change, and what the sum still lacks."""

    error: float
    changes: Changes
    residual: Spool


class Sweeps:
    """The fit of all members.

    Args:
        members: the maps.
        residual: r, (n_tokens, d); unchanged.
        weights: w, (n_tokens, 1).
        held_out: mask of the tokens that judge and are not fitted.
        ranks: who has the other rows.
        device: where it is computed.
    """

    def __init__(
        self,
        members: Sequence[Member],
        residual: Spool,
        weights: Tensor,
        held_out: Tensor,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.members, self.first = members, residual
        self.weights, self.held_out = weights.to(device), held_out.to(device)
        self.ranks, self.device = ranks, device

    def run(self) -> tuple[Changes, Spool]:
        """The changes that lower the held-out error most, none if none does; how the sum moves."""
        moved = Spool(len(self.first), self.first.rows.shape[1], device=self.first.device)
        moved.rows.zero_()
        if not self.members:
            return {}, moved
        before = self._error(self.first)
        penalty = FIRST_PENALTY
        best = self._sweep({}, self.first, PENALTIES[penalty])
        while penalty + 1 < len(PENALTIES):
            more = self._sweep({}, self.first, PENALTIES[penalty + 1])
            if not more.error < best.error:
                break
            best, penalty = more, penalty + 1
        if not best.error < before:
            return {}, moved
        for _ in range(SWEEPS):
            for smaller in (1, 0):
                if smaller > penalty:
                    continue
                more = self._sweep(best.changes, best.residual, PENALTIES[penalty - smaller])
                if more.error < best.error * (1 - LEAST_GAIN):
                    break
            else:
                break
            best, penalty = more, penalty - smaller
        for place, first, left in zip(
            moved.slices(), self.first.slices(), best.residual.slices(), strict=True
        ):
            place.copy_(first.to(left.device) - left)
        return best.changes, moved

    def _sweep(self, changes: Changes, before: Spool, penalty: float) -> _State:
        """One D_k after the other, from ``changes``, which leave the residuals ``before``."""
        residual = Spool(len(before), before.rows.shape[1], device=before.device)
        residual.rows.copy_(before.rows)
        new = dict(changes)
        for member in self.members:
            parts = [(tokens.to(self.device), a) for tokens, a in member.parts()]
            old = changes.get(member.name)
            n_fitted = sum(int((~self.held_out[tokens]).sum()) for tokens, _ in parts)
            shape = Shape(n_fitted, 0, member.width, residual.rows.shape[1])
            rows = self._rows_to_fit(parts, residual, old)
            change = solve_ridge(rows, shape, penalty, self.device, self.ranks)
            if change is None:
                new.pop(member.name, None)
            else:
                new[member.name] = change
            for tokens, a in parts:
                left = self._left(tokens, a, residual, old)
                if change is not None:
                    left -= a.to(self.device) @ change.T
                residual.rows[tokens.to(residual.device)] = left.to(residual.device)
        return _State(self._error(residual), new, residual)

    def _rows_to_fit(
        self, parts: Sequence[Part], residual: Spool, old: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for tokens, a in parts:
            fitted = ~self.held_out[tokens]
            left, weight = self._left(tokens, a, residual, old), self.weights[tokens]
            a = a.to(self.device)
            yield (a * weight)[fitted], (left * weight)[fitted]

    def _left(self, tokens: Tensor, a: Tensor, residual: Spool, old: Tensor | None) -> Tensor:
        """What the sum lacks without this map's change, (n, d)."""
        left = residual.rows[tokens.to(residual.device)].to(self.device)
        return left if old is None else left + a.to(self.device) @ old.T

    def _error(self, residual: Spool) -> float:
        """The weighted squared residual of the held-out tokens, of all ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for rows, mask, weights in zip(
            residual.slices(), self.held_out.split(SLICE), self.weights.split(SLICE), strict=True
        ):
            judged = rows.to(self.device)[mask] * weights[mask]
            total += judged.square().sum(dtype=torch.float64)
        return self.ranks.total(float(total))[0]
