"""Finished rows of benchmarks/gradpruner.py: kept in one file, printed as one table."""

from __future__ import annotations

import fcntl
import json
import math
import statistics
from pathlib import Path
from typing import Any

from layercut.evaluation.accuracy import paired_change
from layercut.machine import provenance

RESULTS = Path(__file__).parent / "results" / "gradpruner.json"


def stored() -> dict[str, Any]:
    if RESULTS.exists():
        found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
        return found
    origin = provenance("benchmarks/gradpruner.py")
    return {"versions": origin.versions, "hardware": origin.hardware, "budgets": {}, "rows": {}}


def save(digest: str, budget: dict[str, Any], key: str, row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        results = stored()
        results["budgets"][digest] = budget
        results["rows"][key] = row
        partial = RESULTS.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        partial.replace(RESULTS)


def print_table(rows: dict[str, Any], digest: str) -> None:
    """Means over seeds; the change is paired by test row within each seed."""
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for key, row in rows.items():
        budget, method, size, seed = key.split("/")
        if budget == digest:
            groups.setdefault((int(size), method), {})[seed] = row
    dense = groups.get((0, "dense"), {})
    print(
        f"{'layers':>6} {'method':16} {'zero-shot':>9} {'tuned':>7} {'to dense, points':>18} "
        f"{'train s':>8} {'prune s':>8} {'tokens/s':>9}  seeds"
    )
    for (n_dropped, method), seeds in sorted(groups.items()):
        pairs = [(dense[seed], row) for seed, row in seeds.items() if seed in dense]
        changes = [paired_change(*(bits(row) for row in pair)) for pair in pairs]
        change = ""
        if changes and n_dropped:
            mean = statistics.fmean(c.value for c in changes)
            spread = statistics.fmean(c.stderr for c in changes)
            change = f"{100 * mean:+.2f} ± {100 * spread:.2f}"
        print(
            f"{n_dropped:6} {method:16} {100 * mean_of(seeds, 'zero_shot'):9.2f} "
            f"{100 * mean_of(seeds, 'accuracy'):7.2f} {change:>18} "
            f"{mean_of(seeds, 'train_seconds'):8.0f} {mean_of(seeds, 'prune_seconds'):8.0f} "
            f"{mean_of(seeds, 'prefill_tokens_per_second'):9.0f}  {', '.join(sorted(seeds))}"
        )


def bits(row: dict[str, Any]) -> tuple[bool, ...]:
    return tuple(outcome == "1" for outcome in row["outcomes"])


def mean_of(seeds: dict[str, Any], name: str) -> float:
    """Over the rows that have measured it; NaN where none has."""
    values = [row[name] for row in seeds.values() if row[name] is not None]
    return statistics.fmean(values) if values else math.nan
