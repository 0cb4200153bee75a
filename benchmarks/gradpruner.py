"""Pruning inside fine-tuning: accuracy of pruned and tuned models against the tuned dense one.

Run  python benchmarks/gradpruner.py [--rows dense ours igia+merge …] [--sizes 6 9 12] [--seeds 0 1]
         [--train-rows 6016] [--train SOURCE --test SOURCE] [--learning-rate 1e-4]
Every row of the table is one model, tuned on the same training rows in the same steps. Finished
rows are kept in benchmarks/results/gradpruner.json; the same call goes on behind them. `--rows`
takes any of METHODS; merge-10 … merge-50 sweep the share that GradPruner merges, of every dropped
layer or of three. Calibration text is the training rows themselves. Several processes may work on
different rows at once.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import layercut
from layercut.data.tasks import TaskRow, read_rows
from layercut.evaluation.accuracy import accuracy, answer
from layercut.evaluation.speed import measure_speeds
from layercut.machine import peak_rss_bytes, reset_peak_rss
from layercut.models.load import reload
from layercut.models.view import DecoderView
from layercut.recipe.finetune import DistillConfig, FinetuneConfig
from layercut.registry import describe, resolve
from layercut.selection.select import PlanOfSize, Request, plan_sizes
from layercut.training.finetune import finetune, n_steps, trained_names
from layercut.types import CalibrationBatches, PruningPlan, take_median
from row_store import RESULTS, print_table, save, stored
from task_files import write_rows

MODEL = "embedded:smollm2-135m"
DENSE = "dense"
MAIN = (DENSE, "ours", "igia+merge", "reverse-order", "random", "block-influence")
PLANS: dict[tuple[Any, ...], PlanOfSize] = {}
"""One early run of a seed serves every size and share of the same process; its seconds are booked
with the first row that needs it."""

DISTILL: dict[str, Any] = {"over": "choices"}
METHODS: dict[str, Any] = {
    "ours": {"scoring": "reverse-order", "recovery": "refit", "distill": DISTILL},
    "ours-labels": {"scoring": "reverse-order", "recovery": "refit"},
    "reverse+distill": {"scoring": "reverse-order", "recovery": "none", "distill": DISTILL},
    "igia+merge+distill": {"scoring": "igia", "recovery": "sign-merge", "distill": DISTILL},
    "cuts+refit": {
        "strategy": "priced-cuts",
        "scoring": "residual-sensitivity",
        "recovery": "refit",
    },
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
METHODS["merge-20-of-3"] = METHODS["merge-20"] | {"n_merged": 3}
"""The released script's number of merged layers: the three highest-scored of those dropped."""


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
        "sequences": arguments.sequences,
        "steps": arguments.steps,
    }
    digest = hashlib.sha256(json.dumps(budget, sort_keys=True).encode()).hexdigest()[:12]
    batches = calibration(train, view.tokenizer, arguments.sequences)
    for seed in arguments.seeds:
        for size, method in jobs(arguments):
            key = f"{digest}/{method}/{size}/{seed}"
            if key in stored()["rows"]:
                continue
            how = METHODS.get(method, {}).get("distill")
            distill = DistillConfig(**how) if how else None
            own = settings.model_copy(update={"seed": seed, "distill": distill})
            weights = RESULTS.with_name(f"gradpruner-{digest}-{seed}.safetensors")
            teacher = tuned_dense(view, train, own, weights) if distill else None
            plan = None
            start = time.perf_counter()
            if size:
                plan = prune(view, batches, train, own, method, size, arguments.steps)
            seconds = time.perf_counter() - start
            row = measure(view, plan, train, test, own, teacher, not arguments.no_zero_shot)
            row["prune_seconds"] = seconds
            if not size:
                keep_tuned(view, own, weights)
            view = reload(view)
            save(digest, budget, key, row)
            print(key, f"{row['accuracy']:.4f}", f"{row['train_seconds']:.0f} s", flush=True)
    print_table(stored()["rows"], digest)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    known = [DENSE, *METHODS]
    parser.add_argument("--rows", nargs="*", default=MAIN, choices=known, metavar="METHOD")
    parser.add_argument("--sizes", type=int, nargs="*", default=[6, 9, 12])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--train", default="embedded:reviews@train")
    parser.add_argument("--test", default="embedded:reviews@test")
    parser.add_argument("--train-rows", type=int, default=6016)
    parser.add_argument("--test-rows", type=int, default=0, help="0: all")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=None)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="early steps behind IGIA")
    parser.add_argument("--no-zero-shot", action="store_true", help="answer after tuning only")
    parser.add_argument("--sequences", type=int, default=64, help="calibration windows of 256")
    return parser.parse_args()


def task_rows(arguments: argparse.Namespace) -> tuple[list[TaskRow], list[TaskRow]]:
    """Training rows, a fixed draw for every seed, and test rows."""
    train, test = read_rows(arguments.train), read_rows(arguments.test)
    random.Random(0).shuffle(train)
    if arguments.test_rows:
        random.Random(0).shuffle(test)
        test = test[: arguments.test_rows]
    return train[: arguments.train_rows], test


def tuning_settings(arguments: argparse.Namespace, n_train: int) -> FinetuneConfig:
    batch_size = min(arguments.batch_size, n_train)
    return FinetuneConfig(
        data=arguments.train,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        batch_size=batch_size,
        accumulation=min(arguments.accumulation, n_train // batch_size),
        max_length=arguments.max_length,
    )


def calibration(rows: Sequence[TaskRow], tokenizer: Any, n_sequences: int) -> CalibrationBatches:
    """Windows of the rows' prompts and right answers."""
    with tempfile.TemporaryDirectory(prefix="layercut-rows-") as folder:
        source = write_rows(rows, Path(folder) / "train.jsonl")
        section = {"data": f"rows:{source}", "n_sequences": n_sequences, "seq_len": 256}
        return layercut.calibration_batches(section, tokenizer)


def jobs(arguments: argparse.Namespace) -> list[tuple[int, str]]:
    """(layers dropped, method), dense first: the others are compared with it."""
    pruned = [method for method in arguments.rows if method != DENSE]
    dense = [(0, DENSE)] if DENSE in arguments.rows else []
    return dense + [(size, method) for size in arguments.sizes for method in pruned]


def measure(
    view: DecoderView,
    plan: PruningPlan | None,
    train: Sequence[TaskRow],
    test: Sequence[TaskRow],
    settings: FinetuneConfig,
    teacher: DecoderView | None,
    zero_shot: bool,
) -> dict[str, Any]:
    """Tune and answer; ``view`` is changed."""
    before = accuracy(answer(view, test).correct).value if zero_shot else None
    reset_peak_rss()
    tuning = finetune(view, train, settings, teacher=teacher)
    after = accuracy(answer(view, test).correct)
    speeds = measure_speeds({"": lambda: nullcontext(view)})[""]
    return {
        "dropped": plan.dropped if plan else (),
        "zero_shot": before,
        "accuracy": after.value,
        "stderr": after.stderr,
        "outcomes": "".join(str(int(right)) for right in after.outcomes),
        "train_seconds": tuning.train_seconds,
        "steps": tuning.n_steps,
        "loss": tuning.loss,
        "prefill_tokens_per_second": take_median(speeds.prefill).value,
        "n_parameters": view.n_parameters,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def prune(
    view: DecoderView,
    batches: CalibrationBatches,
    train: Sequence[TaskRow],
    settings: FinetuneConfig,
    method: str,
    size: int,
    steps: int,
) -> PruningPlan:
    how = METHODS[method]
    scoring_options: dict[str, Any] = {"seed": settings.seed} if how["scoring"] == "random" else {}
    protect = {0} if describe("recovery", how["recovery"]).needs_previous_layer else set()
    strategy = how.get("strategy", "lowest")
    shared = (strategy, how["scoring"], settings.seed, bool(protect))
    with tempfile.TemporaryDirectory(prefix="layercut-rows-") as folder:
        if how["scoring"] == "igia":
            data = write_rows(train, Path(folder) / "train.jsonl")
            n_run = n_steps(settings, len(train))
            scoring_options = early_run(settings, data, n_run, steps)
        if shared not in PLANS:
            scoring = resolve("scoring", how["scoring"], scoring_options)
            request = Request(scoring=scoring, strategy=strategy, protect=frozenset(protect))
            own = reload(view)  # plans go on using it; `view` is about to be pruned
            PLANS[shared] = plan_sizes(own, batches, request)
        plan, evidence = PLANS[shared](size)
    options = how.get("recovery_options", {})
    if "n_merged" in how:
        options = options | {"merge": "beyond-safe", "n_safe": size - how["n_merged"]}
    patch = layercut.fit(view, plan, evidence, batches, method=how["recovery"], **options)
    layercut.apply(view, plan, patch)
    return plan


def early_run(settings: FinetuneConfig, data: str, n_run: int, steps: int) -> dict[str, Any]:
    """Options of igia for the very run that the pruned model is tuned in."""
    same = {"batch_size", "accumulation", "max_length", "warmup_ratio", "scheduler", "weight_decay"}
    return settings.model_dump(include={*same, "seed"}) | {
        "data": data,
        "steps": min(steps, n_run),
        "max_steps": n_run,
        "learning_rate": settings.rate,
    }


def tuned_dense(
    view: DecoderView, train: Sequence[TaskRow], settings: FinetuneConfig, path: Path
) -> DecoderView:
    """The tuned dense model of this seed, the teacher; its weights are kept in ``path``."""
    teacher = reload(view)
    if path.exists():
        state = teacher.model.state_dict()
        for name, tensor in load_file(path).items():
            state[name].copy_(tensor)
        return teacher
    own = settings.model_copy(update={"distill": None})
    finetune(teacher, train, own)
    keep_tuned(teacher, own, path)
    return teacher


def keep_tuned(view: DecoderView, settings: FinetuneConfig, path: Path) -> None:
    state = view.model.state_dict()
    path.parent.mkdir(exist_ok=True)
    save_file({name: state[name] for name in trained_names(view, settings)}, path)


if __name__ == "__main__":
    main()
