"""One row of a comparison: what it is, what was measured, and its line of JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch

from layercut.evaluation.evaluate import add_changes, collect_outcomes
from layercut.results import Estimate, Evaluation, Fidelity, Generation, estimate_mean, harness_name
from layercut.types import Cut, LayerSet, Median

DENSE = "dense"
SPEEDS = {
    "prefill_tokens_per_second": "Prefill, tokens/s",
    "decode_tokens_per_second": "Decoding, tokens/s",
}
"""What a comparison measures with ``speed``, and its columns' titles."""
SPEED_CHANGES = {"prefill": "× prefill", "decode": "× decoding"}
"""The changes from the dense model, and their columns' titles."""

DIGITS = 5
"""Of a window's loss in nats; its error is a thousand times as large."""

UNMEASURED = Evaluation(n_layers=0, n_parameters=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model of a comparison.

    Attributes:
        key: of its record in the folder.
        method: its name, ``dense`` for the intact model.
        layers: how many are dropped.
        pair: ``SCORE+RECOVERY``; empty for the dense model, healed or not.
        source: where the combination was published.
        reading: what the source leaves open and how it is read here.
        dropped: the layers.
        cuts: (first layer, number of layers) of each gap.
        reason: why it could not run; ``None`` for a row that did.
        notes: of the weight patch.
        seconds: stage → wall-clock seconds, as if the method ran alone.
        measured_with: version and threads; ``None`` in rows that are older than windows' losses.
        heal: what the heal took and brought, with its settings.
        model: its name; of the dense row alone.
        forward_seconds: of one pass over the calibration text; of the dense row alone.
        evaluation: all that was measured; its number of layers is not stored, and 0.
    """

    key: str
    method: str
    layers: int
    pair: str = ""
    source: str = ""
    reading: str = ""
    dropped: LayerSet = ()
    cuts: tuple[Cut, ...] = ()
    reason: str | None = None
    notes: Mapping[str, Any] | None = None
    seconds: Mapping[str, float] | None = None
    measured_with: Mapping[str, Any] | None = None
    heal: Mapping[str, Any] | None = None
    model: str | None = None
    forward_seconds: float | None = None
    evaluation: Evaluation = UNMEASURED

    @property
    def fidelity(self) -> Fidelity | None:
        """Agreement with the dense model on the first text."""
        return next(iter(self.evaluation.fidelity.values()), None)

    @property
    def generation(self) -> Generation | None:
        """Continuations of the first text's starts."""
        return next(iter(self.evaluation.generation.values()), None)

    @property
    def total_seconds(self) -> float | None:
        """Of all stages."""
        return None if self.seconds is None else sum(self.seconds.values())

    def passes(self, dense: Row) -> dict[str, float]:
        """The seconds in units of one forward pass over the calibration text."""
        unit = dense.forward_seconds
        assert unit is not None, "not the dense row"
        return {stage: seconds / unit for stage, seconds in (self.seconds or {}).items()}

    def ratios(self, dense: Row) -> dict[str, float]:
        """Perplexity over the dense model's, of each text that both read."""
        before = dense.evaluation.perplexity
        after = self.evaluation.perplexity
        return {name: after[name].value / before[name].value for name in after if name in before}

    def ratio_errors(self, dense: Row) -> dict[str, float]:
        """The ratios' standard errors, where both rows have the losses of the same windows.

        The difficulty of a window cancels out in the difference d of both models' mean losses;
        its error s_d / √n over windows, times the ratio, is the ratio's (delta method).
        """
        errors = {}
        for name, ratio in self.ratios(dense).items():
            after, before = (r.evaluation.perplexity[name].losses for r in (self, dense))
            if len(after) == len(before) >= 2:
                change = torch.tensor([after, before], dtype=torch.float64).diff(dim=0)[0]
                errors[name] = ratio * estimate_mean(change).stderr
        return errors

    def accuracy_changes(self, dense: Row) -> Mapping[str, Estimate]:
        """Change in accuracy from the dense model, paired by row."""
        return add_changes(self.evaluation, dense.evaluation).accuracy_change

    def to_json(self, dense: Row | None = None) -> dict[str, Any]:
        """A line of ``rows.jsonl``; of ``compare.json`` with what follows from the dense row."""
        measured = self.evaluation.to_json()
        content: dict[str, Any] = {"method": self.method}
        if self.method != DENSE:
            content |= {"pair": self.pair, "source": self.source, "reading": self.reading}
        content |= {"layers": self.layers, "dropped": list(self.dropped), "reason": self.reason}
        content |= {name: measured[name] for name in ("perplexity", "accuracy")}
        optional = {name: getattr(self, name) for name in ("model", "forward_seconds")}
        optional |= {"cuts": [list(cut) for cut in self.cuts] or None, "notes": self.notes}
        if self.reason is None:
            optional["n_parameters"] = self.evaluation.n_parameters
        optional |= {"seconds": self.seconds, "heal": self.heal}
        content |= {name: value for name, value in optional.items() if value is not None}
        if self.reason is None:
            content |= self._measured_json(measured)
            content |= self._relative_json(dense) if dense else {}
        return content | {"key": self.key}

    def _measured_json(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = {"flops_per_token": self.evaluation.flops_per_token}
        if self.measured_with is not None:
            losses = {name: e.losses for name, e in self.evaluation.perplexity.items() if e.losses}
            content["measured_with"] = self.measured_with
            content["losses"] = {n: [round(x, DIGITS) for x in each] for n, each in losses.items()}
        outcomes = collect_outcomes(self.evaluation)
        content["outcomes"] = {n: "".join("01"[o] for o in each) for n, each in outcomes.items()}
        if "harness" in measured:
            content["harness"] = measured["harness"]
        if self.fidelity and self.generation:
            content["fidelity"] = self.fidelity.to_json()
            content["generation"] = self.generation.to_json()
        if self.evaluation.prefill_tokens_per_second is not None:
            content |= {speed: getattr(self.evaluation, speed) for speed in SPEEDS}
            spreads = ("prefill_spread", "decode_spread", "speed_change")
            content |= {name: measured[name] for name in spreads if name in measured}
        return content

    def _relative_json(self, dense: Row) -> dict[str, Any]:
        changes = self.accuracy_changes(dense)
        return {
            "ratio": self.ratios(dense),
            "ratio_stderr": self.ratio_errors(dense),
            "accuracy_change": {name: c.to_json("n_rows") for name, c in changes.items()},
            "passes": self.passes(dense),
            "total_seconds": self.total_seconds,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """The row that `to_json` wrote."""
        own = {item.name: content[item.name] for item in fields(cls) if item.name in content}
        own["dropped"] = tuple(content["dropped"])
        own["cuts"] = tuple((first, n) for first, n in content.get("cuts", ()))
        return cls(**own, evaluation=_read_evaluation(content))


def _read_evaluation(row: Mapping[str, Any]) -> Evaluation:
    texts, tasks, losses = row["perplexity"], row["accuracy"], row.get("losses", {})
    right = {n: tuple(bit == "1" for bit in bits) for n, bits in row.get("outcomes", {}).items()}
    first = next(iter(texts), "")
    return Evaluation(
        n_layers=0,
        n_parameters=row.get("n_parameters", 0),
        perplexity={n: _estimate(e, losses=tuple(losses.get(n, ()))) for n, e in texts.items()},
        accuracy={n: _estimate(e, outcomes=right.get(n, ())) for n, e in tasks.items()},
        harness={
            task: {
                n: _estimate(e, outcomes=right.get(harness_name(task, n), ()))
                for n, e in metrics.items()
            }
            for task, metrics in row.get("harness", {}).items()
        },
        fidelity={first: _read_fidelity(row["fidelity"])} if "fidelity" in row else {},
        generation={first: _read_generation(row["generation"])} if "generation" in row else {},
        flops_per_token=row.get("flops_per_token"),
        prefill_tokens_per_second=row.get("prefill_tokens_per_second"),
        decode_tokens_per_second=row.get("decode_tokens_per_second"),
        prefill_spread=_read_spread(row.get("prefill_spread")),
        decode_spread=_read_spread(row.get("decode_spread")),
        speed_change={
            name: Median(change["value"], tuple(change["spread"]), change["n_rounds"])
            for name, change in row.get("speed_change", {}).items()
        },
    )


def _read_spread(content: Sequence[float] | None) -> tuple[float, float] | None:
    return None if content is None else (content[0], content[1])


def _read_fidelity(content: Mapping[str, Any]) -> Fidelity:
    return Fidelity(**{name: _estimate(values) for name, values in content.items()})


def _read_generation(content: Mapping[str, Any]) -> Generation:
    own: dict[str, Any] = {
        name: _estimate(value) if isinstance(value, Mapping) else value
        for name, value in content.items()
    }
    distinct = (own.pop("distinct_1"), own.pop("distinct_2"), own.pop("distinct_3"))
    return Generation(tokens=None, distinct=distinct, **own)


def _estimate(content: Mapping[str, Any], **details: Any) -> Estimate:
    value, stderr, n = content.values()  # the last by the name of its unit
    return Estimate(value, stderr, n, **details)
