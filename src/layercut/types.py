"""The values that flow from stage to stage, all immutable.

Layers are numbered 0…L−1 from the embedding, always in the numbering of the *input* model.
A score is higher = keep.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

LayerSet = tuple[int, ...]
"""Sorted layer indices."""

Cut = tuple[int, int]
"""A contiguous run of layers: the first one, and how many."""


def split_rows(rows: Tensor, n_rows: int) -> tuple[Tensor, ...]:
    """``rows`` in parts of at most ``n_rows``; none where there are no rows (torch makes one)."""
    return rows.split(n_rows) if len(rows) else ()


@dataclass(frozen=True, slots=True)
class Median:
    """The median of repeated measurements and their spread.

    Attributes:
        value: the median.
        spread: lowest and highest measurement, without the extreme one at either end.
        n_rounds: measurements behind it.
    """

    value: float
    spread: tuple[float, float]
    n_rounds: int

    def is_clear_change(self) -> bool:
        """Of a ratio: whether the spread leaves 1 out and is no wider than the change itself."""
        low, high = self.spread
        return not low <= 1 <= high and high - low <= abs(self.value - 1)

    def to_json(self) -> dict[str, Any]:
        """``{"value", "spread": [low, high], "n_rounds"}``."""
        return {"value": self.value, "spread": list(self.spread), "n_rounds": self.n_rounds}


def take_median(values: Sequence[float]) -> Median:
    """Of one value at least; below three, no value is extreme."""
    ordered = sorted(values)
    inner = ordered[1:-1] or ordered
    return Median(statistics.median(ordered), (inner[0], inner[-1]), len(ordered))


@dataclass(frozen=True, slots=True)
class CalibrationBatches:
    """Calibration text as packed windows of equal length, without padding.

    Attributes:
        input_ids: token ids, shape (n_sequences, seq_len), int64.
        gradient_batch: sequences whose summed loss is differentiated as one term of a score.
        micro_batch: sequences that are in memory at once; changes no result beyond rounding.
        source: where the text came from, as the recipe names it.
        fingerprint: hash of the token ids.
        n_unscored: tokens at a window's start that are never predicted: the first, or all leading
            tokens where a tokenizer has several.
    """

    input_ids: Tensor
    gradient_batch: int
    micro_batch: int
    source: str
    fingerprint: str
    n_unscored: int = 1

    @property
    def n_sequences(self) -> int:
        """Number of packed windows."""
        return int(self.input_ids.shape[0])

    @property
    def seq_len(self) -> int:
        """Tokens per window."""
        return int(self.input_ids.shape[1])

    @property
    def n_targets(self) -> int:
        """Predicted tokens: every token of a window but its first ones."""
        return self.n_sequences * (self.seq_len - self.n_unscored)

    def groups(self) -> Iterator[Tensor]:
        """Gradient groups in order: (≤ gradient_batch, seq_len) each."""
        yield from self.input_ids.split(self.gradient_batch)

    def micro_batches(self) -> Iterator[Tensor]:
        """Slices in order: (≤ micro_batch, seq_len) each."""
        yield from split_rows(self.input_ids, self.micro_batch)


class GradientRecord(Protocol):
    """Gradients that a score recorded, by the weight that received them."""

    @property
    def weights(self) -> Mapping[str, Any]:
        """Every recorded weight by its name in the model."""

    @property
    def n_steps(self) -> int:
        """Optimiser steps that were recorded."""

    def elementwise(self, name: str) -> Tensor:
        """Mean squared gradient of one weight, (out, in)."""

    def layer_scores(self) -> LayerScores:
        """One number per layer from all of them."""


@dataclass(frozen=True, slots=True)
class LayerScores:
    """One importance per layer of the input model; higher = keep.

    Attributes:
        values: in layer order; ``None`` where the layer had already been dropped.
        method: scoring method, as the recipe names it.
        options: that method's options, resolved.
        n_targets: calibration tokens whose loss was used.
        seconds: wall-clock time.
        fingerprint: hash of model files, data, options and seed.
        gradient_log: the recorded gradients, where the method makes such a record.
    """

    values: tuple[float | None, ...]
    method: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    n_targets: int = 0
    seconds: float = 0.0
    fingerprint: str = ""
    gradient_log: GradientRecord | None = field(default=None, repr=False, compare=False)

    def to_json(self, model: str) -> dict[str, Any]:
        """Content of ``scores.json``."""
        return {
            "schema": 1,
            "model": model,
            "method": self.method,
            "options": dict(self.options),
            "scores": list(self.values),
            "n_targets": self.n_targets,
            "seconds": self.seconds,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class Round:
    """One pruning decision: the scores it saw and the layers it dropped.

    ``margin`` is how much higher the best-scored dropped layer's kept neighbour in rank stood,
    relative to the spread of the scores: near 0, the decision was a coin toss.
    """

    scores: tuple[float | None, ...]
    dropped: LayerSet
    margin: float | None


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Which layers go.

    Attributes:
        model: the input model, as the recipe names it.
        n_layers: layers of the input model.
        dropped: sorted layer indices that go.
        method: what chose them, e.g. ``gradmap``.
        rounds: every decision in order.
        fingerprint: that of the scores it rests on.
        curve: layers dropped → price of the cheapest plan of that size, in nats per token (a
            bound: it ranks sizes, it does not predict the loss), where the strategy knows it.
        trials: layers dropped → perplexity as a multiple of the dense model's, on held-out text
            after recovery, where a perplexity budget made the pipeline try several sizes.
    """

    model: str
    n_layers: int
    dropped: LayerSet
    method: str
    rounds: tuple[Round, ...] = ()
    fingerprint: str = ""
    curve: Mapping[int, float] = field(default_factory=dict)
    trials: Mapping[int, float] = field(default_factory=dict)

    @property
    def kept(self) -> LayerSet:
        """Sorted layer indices that stay."""
        dropped = set(self.dropped)
        return tuple(i for i in range(self.n_layers) if i not in dropped)

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Contiguous dropped runs as (first layer, number of layers)."""
        runs: list[Cut] = []
        for layer in self.dropped:
            if runs and sum(runs[-1]) == layer:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((layer, 1))
        return tuple(runs)

    @property
    def new_index(self) -> dict[int, int]:
        """Old index → new index, for the kept layers."""
        return {old: new for new, old in enumerate(self.kept)}

    def target_of(self, layer: int) -> int:
        """The dense residual stream that kept ``layer``'s output stands in for.

        That is the input of the next kept layer, or L (before the final norm) for the last one.
        """
        return next((k for k in self.kept if k > layer), self.n_layers)

    def to_json(self) -> dict[str, Any]:
        """The ``plan`` object of ``result.json``."""
        return {
            "n_layers": self.n_layers,
            "dropped": list(self.dropped),
            "kept": list(self.kept),
            "method": self.method,
            "cuts": [list(cut) for cut in self.cuts],
            "rounds": [
                {"scores": list(r.scores), "dropped": list(r.dropped), "margin": r.margin}
                for r in self.rounds
            ],
            "curve": {str(n): cost for n, cost in self.curve.items()},
            "trials": {str(n): ratio for n, ratio in self.trials.items()},
        }


@dataclass(frozen=True, slots=True)
class Evidence:
    """What scoring leaves for recovery.

    Attributes:
        scores: those of every round.
        gradient_log: the record of the first round, which saw every layer; igia's alone.
    """

    scores: tuple[LayerScores, ...]
    gradient_log: GradientRecord | None = None


@dataclass(frozen=True, slots=True)
class WeightPatch:
    """Replacement tensors, by their name in the input model's state dict.

    Attributes:
        tensors: full replacements, in the dtype the source checkpoint stores.
        method: recovery method, as the recipe names it.
        notes: figures worth showing, e.g. which layer was changed and the error before and after.
        rescaled: whether factors that depend on a layer's new number are in the tensors already.
    """

    tensors: Mapping[str, Tensor]
    method: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    rescaled: bool = False


@dataclass(frozen=True, slots=True)
class RuntimeMaps:
    """What no weight can hold: a matrix behind a kept layer, applied to the residual stream.

    Attributes:
        maps: kept layer before a cut → A, (d, d) float32; the stream x becomes x·A behind it.
        method: recovery method.
        notes: numbers worth showing.
    """

    maps: Mapping[int, Tensor]
    method: str
    notes: Mapping[str, Any] = field(default_factory=dict)
