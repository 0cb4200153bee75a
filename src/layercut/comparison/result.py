"""The rows of a comparison as figures: relative to dense, as cells of a table, as files."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from layercut.comparison.rank_correlation import spearman
from layercut.comparison.store import Store
from layercut.evaluation.accuracy import paired_change
from layercut.results import Provenance, estimate_mean

Row = dict[str, Any]
DENSE = "dense"
LAYER_LOSS = "loss without the layer"
MISSING = "–"
LAYERS = "Layers"
SPEEDS = {
    "prefill_tokens_per_second": "Prefill, tokens/s",
    "decode_tokens_per_second": "Decoding, tokens/s",
}
"""What a comparison measures with ``speed``, and its columns' titles."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that was measured in one folder.

    Attributes:
        settings: of the last call.
        provenance: versions, machine and command of the last call.
        dense: the intact model's row.
        rows: one per contestant and size, by size and then by perplexity; those that could not
            run are last, with their ``reason``.
        scores: name → one score per layer of the intact model, higher = keep.
        warnings: what the user should know of the last call, in full sentences.
        windows: text → how it is cut, in words.
    """

    settings: Mapping[str, Any]
    provenance: Provenance
    dense: Row
    rows: tuple[Row, ...]
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    windows: Mapping[str, str] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """Names of the texts, in the order in which they were first measured."""
        return tuple(self.dense["perplexity"])

    @property
    def speeds(self) -> tuple[str, ...]:
        """Which of ``SPEEDS`` some row has."""
        return tuple(key for key in SPEEDS if any(key in row for row in (self.dense, *self.rows)))

    @property
    def truth(self) -> tuple[float, ...] | None:
        """The loss without each layer, in nats per token, where it was measured."""
        return self.scores.get(LAYER_LOSS)

    def correlations(self) -> dict[str, float]:
        """Score → Spearman's correlation with the loss without each layer."""
        if self.truth is None:
            return {}
        found = {
            name: spearman(values, self.truth)
            for name, values in self.scores.items()
            if name != LAYER_LOSS
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        """Content of ``compare.json``."""
        return {
            "schema": 1,
            "layercut": self.provenance.layercut,
            "command": self.provenance.command,
            "versions": dict(self.provenance.versions),
            "hardware": dict(self.provenance.hardware),
            "settings": dict(self.settings),
            "dense": self.dense,
            "rows": list(self.rows),
            "scores": {name: list(values) for name, values in self.scores.items()},
            "correlations": self.correlations(),
            "warnings": list(self.warnings),
            "windows": dict(self.windows),
        }


def gather_results(
    store: Store, settings: Mapping[str, Any], origin: Provenance, dense: Row
) -> Comparison:
    """All that the folder holds, relative to its dense row."""
    text = next(iter(dense["perplexity"]), None)
    stored = [row for row in store.rows.known.values() if row["method"] != DENSE]
    rows = sort_rows([complete_row(row, dense) for row in stored], text)
    scores = {}
    for record in store.scores.known.values():
        if not record["skipped"]:
            name = record["method"]
            name = name if record["strategy"] == "lowest" else f"{name}, {record['strategy']}"
            scores[LAYER_LOSS if name == "perplexity" else name] = tuple(record["scores"])
    windows = store.identity["evaluation"].get("windows", {})
    return Comparison(settings, origin, dense, rows, scores, windows=windows)


def complete_row(row: Row, dense: Row) -> Row:
    """A stored row with what follows from it and the dense one.

    ``ratio``: perplexity over the dense one, ``ratio_stderr``: its error over windows, where both
    rows have the windows' losses; ``accuracy_change``: paired by row, with its error; ``passes``:
    its seconds in units of one forward pass over the calibration text.
    """
    if row["reason"] is not None:
        return row
    ratio = {
        name: figure["value"] / dense["perplexity"][name]["value"]
        for name, figure in row["perplexity"].items()
        if name in dense["perplexity"]
    }
    errors = {
        name: value * error
        for name, value in ratio.items()
        if (error := _paired_error(row, dense, name)) is not None
    }
    changes = {}
    for name, outcomes in row["outcomes"].items():
        # Of other rows, after a task's file had changed, there is no pair.
        if len(before := dense["outcomes"].get(name, "")) == len(outcomes):
            changes[name] = change(before, outcomes)
    passes = {stage: s / dense["forward_seconds"] for stage, s in row["seconds"].items()}
    return row | {
        "ratio": ratio,
        "ratio_stderr": errors,
        "accuracy_change": changes,
        "passes": passes,
        "total_seconds": sum(row["seconds"].values()),
    }


def _paired_error(row: Row, dense: Row, text: str) -> float | None:
    """Standard error of the difference of mean losses, s_d / √n over windows, in nats.

    Both models read the same windows, whose difficulty cancels out; times the ratio it is the
    ratio's error (delta method).
    """
    after, before = (r.get("losses", {}).get(text, ()) for r in (row, dense))
    if len(after) != len(before) or len(after) < 2:
        return None
    after, before = (torch.tensor(losses, dtype=torch.float64) for losses in (after, before))
    return estimate_mean(after - before).stderr


def change(before: str, after: str) -> dict[str, float]:
    """The change in accuracy between a row's and another's ``outcomes`` of one task, paired."""
    first, second = (tuple(bit == "1" for bit in outcomes) for outcomes in (before, after))
    return paired_change(first, second).to_json("n_rows")


def sort_rows(rows: Sequence[Row], text: str | None) -> tuple[Row, ...]:
    """By size, then the best perplexity first, then those that could not run."""

    def place(row: Row) -> tuple[int, float]:
        ratio = row.get("ratio", {}).get(text, float("inf"))
        return row["layers"], ratio

    return tuple(sorted(rows, key=place))


def titles(result: Comparison) -> list[str]:
    """Titles of the table's columns; `cells` fills them."""
    found = ["Method", LAYERS]
    found += [f"Perplexity, {name}" for name in result.texts] + [f"× {n}" for n in result.texts]
    if result.texts:
        found += ["Same token, %", "KL, nats", "Loops, %"]
    found += [f"Accuracy, {name}" for name in result.dense["accuracy"]]
    found += [f"Zero-shot, {name}" for name in result.dense.get("harness", {})]
    found += ["Parameters, M", "MFLOPs per token"]
    found += [SPEEDS[speed] for speed in result.speeds]
    return [*found, "Seconds", "Passes"]


def cells(result: Comparison, row: Row) -> list[str]:
    """One row as text, one cell per title; a row that could not run has its reason instead."""
    name = row["method"]
    found = [name, str(row["layers"])]
    found += [_figure(row["perplexity"].get(text), 2) for text in result.texts]
    ratios = row.get("ratio", dict.fromkeys(result.texts, 1.0))
    errors = row.get("ratio_stderr", {})
    found += [_ratio(ratios.get(text), errors.get(text)) for text in result.texts]
    if result.texts:
        fidelity = row.get("fidelity")
        found.append(f"{100 * fidelity['agreement']['value']:.1f}" if fidelity else MISSING)
        found.append(f"{fidelity['kl']['value']:.3f}" if fidelity else MISSING)
        written = row.get("generation")
        found.append(f"{100 * written['loop']['value']:.0f}" if written else MISSING)
    for task in result.dense["accuracy"]:
        found.append(_points(row["accuracy"].get(task)))
    for task in result.dense.get("harness", {}):
        # Not every task has an accuracy; the first metric is the one that it is known by.
        metrics = row.get("harness", {}).get(task, {})
        found.append(_points(metrics.get("acc", next(iter(metrics.values()), None))))
    found.append(f"{row['n_parameters'] / 1e6:,.1f}")
    flops = row["flops_per_token"]
    found.append(MISSING if flops is None else f"{flops / 1e6:,.0f}")
    for speed in result.speeds:
        value = row.get(speed)
        found.append(MISSING if value is None else f"{value:,.1f}")
    spent = row.get("total_seconds")
    found.append(MISSING if spent is None else f"{spent:,.1f}")
    found.append(MISSING if spent is None else f"{sum(row['passes'].values()):,.1f}")
    return found


def _points(figure: Mapping[str, Any] | None) -> str:
    return _figure(figure and {k: 100 * figure[k] for k in ("value", "stderr")}, 1)


def to_csv(result: Comparison) -> str:
    """Every figure of every row, one column each; ``reason`` where there is none."""
    flat = [_flat(row) for row in (result.dense, *result.rows)]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def _flat(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        if name in ("outcomes", "losses", "notes", "key"):
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = (
                " ".join(map(str, value))
                if isinstance(value, list) and name == "dropped"
                else value
            )
    return found


def _ratio(ratio: float | None, error: float | None) -> str:
    if ratio is None:
        return MISSING
    return f"{ratio:,.3f}" if error is None else f"{ratio:,.3f} ± {error:.3f}"


def _figure(figure: Mapping[str, Any] | None, digits: int) -> str:
    if not figure:
        return MISSING
    return f"{figure['value']:,.{digits}f} ± {figure['stderr']:.{digits}f}"
