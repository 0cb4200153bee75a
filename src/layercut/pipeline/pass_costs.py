"""Seconds of passes through a model and of the sums over their tokens, from sizes and rates.

Formula  a layer's forward pass over one token: 2·(entries)/product + 2·T·(attention)/product
         + TOUCHES·(numbers written)/elements; the head: 2·V·d/product
         + VOCABULARY_TOUCHES·V/elements
         T: tokens of the sequence; V: vocabulary; d: width
Meaning  the constants are measured: docs/results/2026-11-28-estimates.md
"""

from __future__ import annotations

from dataclasses import dataclass

from layercut.machine import Rates
from layercut.pipeline.model_shape import LayerShape, ModelShape
from layercut.recovery.ridge import PENALTY_GRID

TOUCHES = 1.5
"""Times that a layer's norms, rotations, gates and sums touch each number that it writes."""
VOCABULARY_TOUCHES = 2.2
"""Of a cross-entropy, for each logit."""
CALL_SECONDS = 4e-4
"""Of Python for one call of a layer."""
SOLVE_SPEED = 2.5
"""Of a triangular solve, against the factorisation's rate."""
EIGEN_OPERATIONS = 3.0
"""Of an eigendecomposition, in n³, at the factorisation's rate; its vectors' products included."""


@dataclass(frozen=True, slots=True)
class PassCosts:
    """Seconds of what the stages are made of; tokens are shared out over the ranks.

    Attributes:
        shape: the model's sizes.
        rates: the machine's.
        ranks: processes that walk their own sequences.
        micro_batch: tokens that pass at once.
    """

    shape: ModelShape
    rates: Rates
    ranks: int
    micro_batch: int

    def run_layer(self, layer: LayerShape, tokens: float, seq_len: int) -> float:
        """Forward through one layer."""
        operations = 2 * (layer.active or 0) + 2 * seq_len * layer.attention
        each = operations / self.rates.product + TOUCHES * layer.written / self.rates.elements
        calls = max(1.0, tokens / self.ranks / self.micro_batch)
        return tokens / self.ranks * each + calls * CALL_SECONDS

    def run_layers(self, tokens: float, seq_len: int, *, first: int = 0) -> float:
        """Forward through all layers from ``first`` on."""
        return sum(self.run_layer(e, tokens, seq_len) for e in self.shape.layers[first:])

    def run_head(self, tokens: float, *, losses: bool = True) -> float:
        """Logits, and the cross-entropy of each token."""
        operations = 2.0 * self.shape.vocabulary * self.shape.width
        touched = VOCABULARY_TOUCHES * self.shape.vocabulary if losses else 0.0
        each = operations / self.rates.product + touched / self.rates.elements
        return tokens / self.ranks * each

    def run_model(self, tokens: float, seq_len: int, *, kept: float = 1.0) -> float:
        """Forward to the losses; ``kept`` is the share of layers that are not skipped."""
        return kept * self.run_layers(tokens, seq_len) + self.run_head(tokens)

    def fit_ridge(self, n_fitted: float, n_held_out: float, width: int) -> float:
        """A fit of a projection into the stream, by every λ of the grid; see recovery/ridge.py."""
        out, n_penalties = self.shape.width, len(PENALTY_GRID)
        factor, exact = self.rates.factor, self.rates.sum_product
        side = min(n_fitted, width)
        solves = n_penalties * (side**3 / 3 / factor + 2 * side**2 * out / (SOLVE_SPEED * factor))
        if n_fitted < width:
            sums = 2 * n_fitted * width * (n_fitted + n_held_out + out)
            errors = n_penalties * 2 * n_held_out * n_fitted * out
        elif n_held_out > width:
            sums = 2 * (n_fitted + n_held_out) * width * (width + out) / self.ranks
            errors = n_penalties * 2 * width**2 * out
        else:
            sums = 2 * n_fitted * width * (width + out) / self.ranks
            errors = n_penalties * 2 * n_held_out * width * out
        rows = (n_fitted + n_held_out) * (2 * width + 6 * out) / self.rates.elements
        return solves + (sums + errors) / exact + rows / self.ranks

    def price_start(self, n_fitted: float, n_held_out: float, width: int, n_ends: int) -> float:
        """All cuts behind one layer; see selection/cut_prices.py."""
        out, factor, exact = self.shape.width, self.rates.factor, self.rates.sum_product
        side = min(n_fitted, width)
        seconds = side**3 / 3 / factor
        if n_fitted < width:
            seconds += 2 * n_fitted * width * (n_fitted + n_held_out) / exact
            seconds += 2 * side**2 * n_held_out / (SOLVE_SPEED * factor)
            each = 2 * n_held_out * n_fitted * out / exact
        else:
            seconds += 2 * n_fitted * width**2 / exact
            each = 2 * (n_fitted + n_held_out) * width * out / exact
            each += 2 * width**2 * out / (SOLVE_SPEED * factor)
        rows = (n_fitted + n_held_out) / self.rates.elements
        return seconds + 2 * width * rows + n_ends * (each + 6 * out * rows)

    def orthogonalize(self, matrix: tuple[int, int]) -> float:
        """The polar factor of one gradient; see recovery/gradient_steps.py."""
        small, large = min(matrix), max(matrix)
        if self.shape.device.type == "cuda":
            return 7 * (4 * small**2 * large + 2 * small**3) / self.rates.product
        products = 4 * small**2 * large / self.rates.sum_product
        return EIGEN_OPERATIONS * small**3 / self.rates.factor + products
