"""Every method side by side, and docs/benchmarks.md from what is measured so far.

Run  python benchmarks/compare.py --data ../shared/data [--output runs] [--sizes 6 9 12]
         [--methods published] [--tokens 131072] [--test-tokens 16896] [--task-rows 500]
         [--heal-minutes 15] [--page-only] [--model FOLDER --label NAME]
Calibrates on WikiText-2 valid, the C4 sample and the embedded docs, as benchmarks/quality.py does;
measures on WikiText-2 test (detokenised, windows of 512), speeches and reviews. Ours is also healed
at every size, and the dense model in the same way, on WikiText-2 valid and as much of C4. The
zero-shot tasks, at most --task-rows rows of each by a fixed draw, are for dense, ours and the three
peers with the lowest perplexity at the middle size. Finished rows stay in --output, in a folder
per --tokens: the same call goes on, and one with other methods or sizes adds to them. After every
method benchmarks/results/ gets the rows, and the page is written from all that is there.
--task-rows 0 and --heal-minutes 0 leave theirs out; a method that takes long can have a call of its
own with fewer --tokens or --sizes. Another model's rows go to
benchmarks/results/NAME-compare-N.json, and the page stays as it is.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import layercut
from benchmark_page import page, peers, read
from layercut.comparison.entries import OURS, parse_methods
from layercut.comparison.result import Comparison
from layercut.data.tasks import read_rows
from layercut.results import Provenance
from layercut.types import CalibrationBatches
from quality import MODEL, SEQ_LEN, mixed_batches
from task_files import write_rows

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
RESULTS = Path(__file__).parent / "results"
TASKS = {
    "ARC-e": "arc/ARC-Easy.test.jsonl",
    "ARC-c": "arc/ARC-Challenge.test.jsonl",
    "PIQA": "piqa/piqa.val.jsonl",
    "WinoGrande": "winogrande/winogrande.dev.jsonl",
    "BoolQ": "boolq/boolq.val.jsonl",
}
HEAL_TEXTS = ["wikitext2/wiki.valid.raw", "c4/c4-sample.jsonl"]
"""WikiText-2 valid alone is too short for two cores: they read it 3.5 times, and overfit."""

HEAL = {
    "label_weight": 0.5,
    "lora": {"rank": 64, "alpha": 64},
    "max_tokens": 400_000,
}
"""Other than the defaults: with no label the dense model has nothing to learn from itself.

``max_tokens`` is shared by the texts, so that C4 gives no more than WikiText-2 valid has."""

N_PEERS = 3


def main() -> None:
    arguments = parsed()
    if arguments.page_only:
        write_page()
        return
    texts = {
        "wikitext2": str(arguments.data / "wikitext2/wiki.test.raw"),
        "speeches": "embedded:speeches",
        "reviews": "embedded:reviews@test",
    }
    settings: dict[str, Any] = {
        "model": arguments.model,
        "seed": arguments.seed,
        "drop_layers": arguments.sizes,
        "layer_losses": False,
        "evaluation": {"text": texts, "seq_len": SEQ_LEN, "max_tokens": arguments.test_tokens},
    }
    view = layercut.load(arguments.model)
    batches = mixed_batches(arguments.data, view, arguments.tokens, arguments.seed)
    del view
    with_tasks = settings
    if arguments.task_rows:
        sources = drawn(arguments.data, arguments.output, arguments.task_rows)
        with_tasks = {**settings, "evaluation": {**settings["evaluation"], "tasks": sources}}
    names = [entry.name for entry in parse_methods(arguments.methods)]
    result = None
    if OURS.name in names:  # all at once, because every further call would recover it again
        names.remove(OURS.name)
        result = part({**with_tasks, **heal_of(arguments)}, [OURS.name], arguments, batches)
    result = part(settings, names, arguments, batches) or result
    if result is not None and arguments.task_rows:
        best = peers(result, sorted(arguments.sizes)[len(arguments.sizes) // 2])[:N_PEERS]
        part(with_tasks, best, arguments, batches)


def heal_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings' part that heals, if anything is to be healed."""
    if not arguments.heal_minutes:
        return {}
    texts = [str(arguments.data / text) for text in HEAL_TEXTS]
    return {"heal": {"minutes": arguments.heal_minutes, "data": texts, **HEAL}}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--sizes", type=int, nargs="*", default=[6, 9, 12])
    parser.add_argument("--methods", nargs="*", default=["published"])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--test-tokens", type=int, default=16384 + SEQ_LEN)
    parser.add_argument("--task-rows", type=int, default=500, help="of each task; 0: no tasks")
    parser.add_argument("--heal-minutes", type=float, default=15, help="of each; 0: no heals")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--label", help="a name for another model's results")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    parse_methods(arguments.methods)
    if (arguments.model != MODEL) != bool(arguments.label):
        parser.error("--model and --label belong together")
    return arguments


def part(
    settings: dict[str, Any],
    names: Sequence[str],
    arguments: argparse.Namespace,
    batches: CalibrationBatches,
) -> Comparison | None:
    """What is missing of these methods, one after the other; the page after each."""
    folder = arguments.output / f"{arguments.label or 'benchmark'}-{arguments.tokens}"
    result = None
    for name in names:
        one = {**settings, "methods": [name]}
        result = layercut.compare(one, folder, batches=batches, command="benchmarks/compare.py")
        prefix = f"{arguments.label}-" if arguments.label else ""
        kept = RESULTS / f"{prefix}compare-{arguments.tokens}.json"
        shutil.copyfile(folder / "compare.json", kept)
        if not arguments.label:
            write_page()
        print(f"{name}: {summary(result, name)}", flush=True)
    if result is not None:
        show(result.provenance)
    return result


def write_page() -> None:
    """docs/benchmarks.md from every comparison in benchmarks/results/."""
    results = [read(path) for path in RESULTS.glob("compare-*.json")]
    if not results:
        raise SystemExit(f"{RESULTS} holds no comparison yet. Leave --page-only out.")
    PAGE.write_text(page(results), encoding="utf-8")


def drawn(data: Path, output: Path, n_rows: int) -> dict[str, str]:
    """Files with a fixed draw of each task's rows, in a folder beside the comparison's."""
    folder = output / "benchmark-tasks"
    folder.mkdir(parents=True, exist_ok=True)
    sources = {}
    for name, path in TASKS.items():
        rows = read_rows(str(data / path))
        random.Random(0).shuffle(rows)
        sources[name] = write_rows(rows[:n_rows], folder / f"{name}.jsonl")
    return sources


def summary(result: Comparison, name: str) -> str:
    """Ratios to dense on every text, size by size."""
    return "; ".join(
        f"{row.layers}: "
        + (row.reason or " ".join(f"{r:.3f}" for r in row.ratios(result.dense).values()))
        for row in result.rows
        if row.method == name
    )


def show(origin: Provenance) -> None:
    """Where the figures come from."""
    print({**origin.versions, **origin.hardware}, flush=True)


if __name__ == "__main__":
    main()
