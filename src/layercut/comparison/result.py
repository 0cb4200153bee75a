"""All rows of a comparison: gathered and sorted, as cells of a table, as JSON and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layercut.comparison.rank_correlation import spearman
from layercut.comparison.row import DENSE, SPEED_CHANGES, SPEEDS, Row
from layercut.comparison.store import Store
from layercut.results import Estimate, Provenance
from layercut.types import Median

LAYER_LOSS = "loss without the layer"
MISSING = "–"
LAYERS = "Layers"
SPACED = ("dropped", "spread", "prefill_spread", "decode_spread")
"""Lists that are one cell of the CSV file, with spaces in between."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Everything that was measured in one folder.

    Attributes:
        settings: of the last call.
        provenance: versions, machine and command of the last call.
        dense: the intact model's row.
        rows: one per entry and size, by size and then by perplexity; those that could not
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
        return tuple(self.dense.evaluation.perplexity)

    @property
    def speeds(self) -> tuple[str, ...]:
        """The keys of ``SPEEDS``, if some row has them."""
        evaluations = (row.evaluation for row in (self.dense, *self.rows))
        known = any(e.prefill_tokens_per_second is not None for e in evaluations)
        return tuple(SPEEDS) if known else ()

    @property
    def truth(self) -> tuple[float, ...] | None:
        """The loss without each layer, in nats per token, where it was measured."""
        return self.scores.get(LAYER_LOSS)

    def correlations(self) -> dict[str, float]:
        """Score → Spearman's correlation with the loss without each layer."""
        if self.truth is None:
            return {}
        return {
            name: correlation
            for name, values in self.scores.items()
            if name != LAYER_LOSS and (correlation := spearman(values, self.truth)) is not None
        }

    def to_json(self) -> dict[str, Any]:
        """Content of ``compare.json``."""
        return {
            "schema": 1,
            "layercut": self.provenance.layercut,
            "command": self.provenance.command,
            "versions": dict(self.provenance.versions),
            "hardware": dict(self.provenance.hardware),
            "settings": dict(self.settings),
            "dense": self.dense.to_json(),
            "rows": [row.to_json(self.dense) for row in self.rows],
            "scores": {name: list(values) for name, values in self.scores.items()},
            "correlations": self.correlations(),
            "warnings": list(self.warnings),
            "windows": dict(self.windows),
        }


def gather_results(
    store: Store, settings: Mapping[str, Any], origin: Provenance, dense: Row
) -> Comparison:
    """All that the folder holds, relative to its dense row."""
    stored = [Row.from_json(record) for record in store.rows.known.values()]
    rows = sort_rows([row for row in stored if row.method != DENSE], dense)
    scores = {}
    for record in store.scores.known.values():
        if not record["skipped"]:
            name = record["method"]
            name = name if record["strategy"] == "lowest" else f"{name}, {record['strategy']}"
            scores[LAYER_LOSS if name == "perplexity" else name] = tuple(record["scores"])
    windows = store.identity["evaluation"].get("windows", {})
    return Comparison(settings, origin, dense, rows, scores, windows=windows)


def sort_rows(rows: Sequence[Row], dense: Row) -> tuple[Row, ...]:
    """By size, then the best perplexity on the first text, then those that could not run."""
    text = next(iter(dense.evaluation.perplexity), "")
    return tuple(sorted(rows, key=lambda r: (r.layers, r.ratios(dense).get(text, float("inf")))))


def titles(result: Comparison) -> list[str]:
    """Titles of the table's columns; `cells` fills them."""
    dense = result.dense.evaluation
    return [
        "Method",
        LAYERS,
        *(f"Perplexity, {name}" for name in result.texts),
        *(f"× {name}" for name in result.texts),
        *(("Same token, %", "KL, nats", "Loops, %") if result.texts else ()),
        *(f"Accuracy, {name}" for name in dense.accuracy),
        *(f"Zero-shot, {name}" for name in dense.harness),
        *("Parameters, M", "MFLOPs per token"),
        *(SPEEDS[speed] for speed in result.speeds),
        *(title for title in SPEED_CHANGES.values() if result.speeds),
        *("Seconds", "Passes"),
    ]


def cells(result: Comparison, row: Row) -> list[str]:
    """A row that ran as text, one cell per title."""
    dense, measured = result.dense, row.evaluation
    ratios = row.ratios(dense)
    errors = {} if row is dense else row.ratio_errors(dense)
    texts = [_format_estimate(measured.perplexity.get(text), 2) for text in result.texts]
    texts += [_format_ratio(ratios.get(text), errors.get(text)) for text in result.texts]
    if result.texts:
        fidelity, generation = row.fidelity, row.generation
        texts.append(_format(100 * fidelity.agreement.value if fidelity else None, 1))
        texts.append(_format(fidelity.kl.value if fidelity else None, 3))
        texts.append(_format(100 * generation.loop.value if generation else None, 0))
    tasks = [measured.accuracy.get(task) for task in dense.evaluation.accuracy]
    for task in dense.evaluation.harness:
        # Not every task has an accuracy; the first metric is the one that it is known by.
        metrics = measured.harness.get(task, {})
        tasks.append(metrics.get("acc", next(iter(metrics.values()), None)))
    flops = measured.flops_per_token
    seconds = row.total_seconds
    return [
        row.method,
        str(row.layers),
        *texts,
        *(_format_estimate(accuracy, 1, scale=100) for accuracy in tasks),
        _format(measured.n_parameters / 1e6, 1),
        _format(None if flops is None else flops / 1e6, 0),
        *(_format(getattr(measured, speed), 1) for speed in result.speeds),
        *(_format_change(measured.speed_change.get(n)) for n in SPEED_CHANGES if result.speeds),
        _format(seconds, 1),
        _format(None if seconds is None else sum(row.passes(dense).values()), 1),
    ]


def to_csv(result: Comparison) -> str:
    """Every number of every row, one column each; ``reason`` where there is none."""
    contents = [result.dense.to_json(), *(row.to_json(result.dense) for row in result.rows)]
    lines = [_flatten(content) for content in contents]
    columns = list(dict.fromkeys(name for line in lines for name in line))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in content.items():
        if name in ("outcomes", "losses", "notes", "key"):
            continue
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = " ".join(map(str, value)) if name in SPACED else value
    return flat


def _format(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:,.{digits}f}"


def _format_change(change: Median | None) -> str:
    """The median and half its spread; ``?`` behind a change that is not clear of the spread."""
    if change is None:
        return MISSING
    low, high = change.spread
    mark = "" if change.is_clear_change() else " ?"
    return f"{change.value:.2f} ± {(high - low) / 2:.2f}{mark}"


def _format_ratio(ratio: float | None, error: float | None) -> str:
    return _format(ratio, 3) if error is None else f"{ratio:,.3f} ± {error:.3f}"


def _format_estimate(estimate: Estimate | None, digits: int, scale: float = 1) -> str:
    if estimate is None:
        return MISSING
    return f"{scale * estimate.value:,.{digits}f} ± {scale * estimate.stderr:.{digits}f}"
