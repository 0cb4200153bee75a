"""Pruning inside fine-tuning: accuracy of pruned and tuned models against the tuned dense one.

Run  python benchmarks/gradpruner.py [--rows dense ours igia+merge …] [--sizes 6 9 12] [--seeds 0 1]
         [--train-rows 6400] [--train SOURCE --test SOURCE] [--learning-rate 1e-4] [--distill 0.5]
Every row of the table is one model, tuned on the same training rows in the same steps. Finished
rows are kept in benchmarks/results/gradpruner.json; the same call goes on behind them. `--rows`
takes any of METHODS; merge-10 … merge-50 sweep the share that GradPruner merges.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import layercut
from layercut.data.tasks import TaskRow, read_rows
from layercut.evaluation.choices import accuracy, answer, paired_change
from layercut.evaluation.cost import prefill_tokens_per_second
from layercut.finetune import n_steps, trained_names, tune
from layercut.finetune_settings import DistillSettings, FinetuneSettings
from layercut.models.load import reload
from layercut.models.view import DecoderView
from layercut.report.machine import peak_rss_bytes, provenance, reset_peak_rss
from layercut.types import CalibrationBatches, PruningPlan
from task_files import write_rows

MODEL = "embedded:smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "gradpruner.json"
DENSE = "dense"
ALONE = {"distill": None}
MAIN = (DENSE, "ours", "igia+merge", "reverse-order", "random", "block-influence")
METHODS: dict[str, dict[str, Any]] = {
    "ours": {"strategy": "priced-cuts", "scoring": "residual-sensitivity", "recovery": "refit"},
    "ours+none": {"strategy": "priced-cuts", "scoring": "residual-sensitivity", "recovery": "none"},
    "igia+merge": {"scoring": "igia", "recovery": "sign-merge"},
    "igia+none": {"scoring": "igia", "recovery": "none"},
    "igia+refit": {"scoring": "igia", "recovery": "refit"},
    "reverse-order": {"scoring": "reverse-order", "recovery": "none"},
    "random": {"scoring": "random", "recovery": "none"},
    "block-influence": {"scoring": "block-influence", "recovery": "none"},
} | {
    f"merge-{share}": {
        "scoring": "igia",
        "recovery": "sign-merge",
        "recovery_options": {"keep": share / 100},
    }
    for share in (10, 20, 30, 40, 50)
}


def main() -> None:
    arguments = parsed()
    view = layercut.load(MODEL)
    train, test = task_rows(arguments)
    settings = tuning_settings(arguments, len(train))
    budget = {
        "train": arguments.train,
        "test": arguments.test,
        "n_train": len(train),
        "n_test": len(test),
        "settings": settings.model_dump(mode="json", exclude={"seed", "data", "distill"}),
        "calibration": [arguments.calibration, arguments.sequences],
        "steps": arguments.steps,
    }
    digest = hashlib.sha256(json.dumps(budget, sort_keys=True).encode()).hexdigest()[:12]
    results = stored()
    results["budgets"][digest] = budget
    batches = layercut.calibration_batches(
        {"data": arguments.calibration, "n_sequences": arguments.sequences}, view.tokenizer
    )
    for seed in arguments.seeds:
        for size, method in jobs(arguments):
            distilled = size and settings.distill
            label = f"{method}+distill-{arguments.distill}" if distilled else method
            key = f"{digest}/{label}/{size}/{seed}"
            if key in results["rows"]:
                continue
            own = settings.model_copy(update={"seed": seed} | ({} if distilled else ALONE))
            teacher = None
            if distilled:
                weights = RESULTS.with_name(f"gradpruner-{digest}-{seed}.safetensors")
                teacher = tuned_dense(view, train, own, weights)
            row = measure(view, batches, train, test, own, method, size, arguments.steps, teacher)
            view = reload(view)
            results["rows"][key] = row
            save(results)
            print(key, f"{row['accuracy']:.4f}", f"{row['train_seconds']:.0f} s", flush=True)
    print_table(results["rows"], digest)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [DENSE, *METHODS]
    parser.add_argument("--rows", nargs="*", default=MAIN, choices=known, metavar="METHOD")
    parser.add_argument("--sizes", type=int, nargs="*", default=[6, 9, 12])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--train", default="embedded:reviews@train")
    parser.add_argument("--test", default="embedded:reviews@test")
    parser.add_argument("--train-rows", type=int, default=6400)
    parser.add_argument("--test-rows", type=int, default=0, help="0: all")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--distill", type=float, default=None, help="weight of the term")
    parser.add_argument("--steps", type=int, default=40, help="early steps behind IGIA")
    parser.add_argument("--calibration", default="embedded:reviews@train")
    parser.add_argument("--sequences", type=int, default=48)
    return parser.parse_args()


def task_rows(arguments: argparse.Namespace) -> tuple[list[TaskRow], list[TaskRow]]:
    """Training rows, a fixed draw for every seed, and test rows."""
    train, test = read_rows(arguments.train), read_rows(arguments.test)
    random.Random(0).shuffle(train)
    if arguments.test_rows:
        random.Random(0).shuffle(test)
        test = test[: arguments.test_rows]
    return train[: arguments.train_rows], test


def tuning_settings(arguments: argparse.Namespace, n_train: int) -> FinetuneSettings:
    batch_size = min(arguments.batch_size, n_train)
    return FinetuneSettings(
        data=arguments.train,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        batch_size=batch_size,
        accumulation=min(arguments.accumulation, n_train // batch_size),
        max_length=arguments.max_length,
        distill=DistillSettings(weight=arguments.distill) if arguments.distill else None,
    )


def jobs(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """(layers dropped, method), dense first: the others are compared with it."""
    pruned = [method for method in arguments.rows if method != DENSE]
    dense = [(0, DENSE)] if DENSE in arguments.rows else []
    return dense + [(size, method) for size in arguments.sizes for method in pruned]


def measure(
    view: DecoderView,
    batches: CalibrationBatches,
    train: Sequence[TaskRow],
    test: Sequence[TaskRow],
    settings: FinetuneSettings,
    method: str,
    size: int,
    steps: int,
    teacher: DecoderView | None,
) -> dict[str, Any]:
    """Prune, tune and answer; ``view`` is changed."""
    start = time.perf_counter()
    plan = prune(view, batches, train, settings, method, size, steps) if size else None
    pruned_seconds = time.perf_counter() - start
    before = accuracy(answer(view, test).correct)
    reset_peak_rss()
    tuning = tune(view, train, settings, teacher=teacher)
    after = accuracy(answer(view, test).correct)
    return {
        "dropped": plan.dropped if plan else (),
        "zero_shot": before.value,
        "accuracy": after.value,
        "stderr": after.stderr,
        "outcomes": "".join(str(int(right)) for right in after.outcomes),
        "prune_seconds": pruned_seconds,
        "train_seconds": tuning.train_seconds,
        "steps": tuning.n_steps,
        "loss": tuning.loss,
        "prefill_tokens_per_second": prefill_tokens_per_second(view),
        "n_parameters": view.n_parameters,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def prune(
    view: DecoderView,
    batches: CalibrationBatches,
    train: Sequence[TaskRow],
    settings: FinetuneSettings,
    method: str,
    size: int,
    steps: int,
) -> PruningPlan:
    how = METHODS[method]
    scoring_options: dict[str, Any] = {"seed": settings.seed} if method == "random" else {}
    needs_preceding = how["recovery"] in ("refit", "sign-merge")
    with tempfile.TemporaryDirectory(prefix="layercut-rows-") as folder:
        if how["scoring"] == "igia":
            data = write_rows(train, Path(folder) / "train.jsonl")
            n_run = n_steps(settings, len(train))
            scoring_options = early_run(settings, data, n_run, steps)
        plan, evidence = layercut.select(
            view,
            batches,
            strategy=how.get("strategy", "lowest"),
            scoring=how["scoring"],
            scoring_options=scoring_options,
            drop_layers=size,
            protect=[0] if needs_preceding else [],
        )
    options = how.get("recovery_options", {})
    patch = layercut.fit(view, plan, evidence, batches, method=how["recovery"], **options)
    layercut.apply(view, plan, patch)
    return plan


def early_run(settings: FinetuneSettings, data: str, n_run: int, steps: int) -> dict[str, Any]:
    """Options of igia for the very run that the pruned model is tuned in."""
    same = {"batch_size", "accumulation", "max_length", "warmup_ratio", "scheduler", "weight_decay"}
    return settings.model_dump(include={*same, "seed"}) | {
        "data": data,
        "steps": min(steps, n_run),
        "max_steps": n_run,
        "learning_rate": settings.rate,
    }


def tuned_dense(
    view: DecoderView, train: Sequence[TaskRow], settings: FinetuneSettings, path: Path
) -> DecoderView:
    """The tuned dense model of this seed, the teacher; its weights are kept in ``path``."""
    teacher = reload(view)
    state = teacher.model.state_dict()
    if path.exists():
        for name, tensor in load_file(path).items():
            state[name].copy_(tensor)
        return teacher
    tune(teacher, train, settings.model_copy(update=ALONE))
    path.parent.mkdir(exist_ok=True)
    save_file({name: state[name] for name in trained_names(teacher, settings)}, path)
    return teacher


def stored() -> dict[str, Any]:
    if RESULTS.exists():
        found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
        return found
    origin = provenance("benchmarks/gradpruner.py")
    return {"versions": origin.versions, "hardware": origin.hardware, "budgets": {}, "rows": {}}


def save(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    partial = RESULTS.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1), encoding="utf-8")
    partial.replace(RESULTS)


def print_table(rows: dict[str, Any], digest: str) -> None:
    """Means over seeds; the change is paired by test row within each seed."""
    groups: dict[tuple[int, str], dict[str, Any]] = {}
    for key, row in rows.items():
        budget, method, size, seed = key.split("/")
        if budget == digest:
            groups.setdefault((int(size), method), {})[seed] = row
    dense = groups.get((0, DENSE), {})
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
    return statistics.fmean(row[name] for row in seeds.values())


if __name__ == "__main__":
    main()
