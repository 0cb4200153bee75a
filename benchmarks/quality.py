"""Quality without training: the default selection and recovery at 6, 9 and 12 of 30 layers.

Run  python benchmarks/quality.py --data ../shared/data [--sizes 6 9 12] [--tokens 131072]
     [--seeds 0] [--random 20 --random-tokens 16384]
Calibrates on WikiText-2 valid, the C4 sample and the embedded docs; judges on WikiText-2 test
(detokenised, windows of 512) and on text that calibration never saw. A seed draws other
calibration windows. Prints one table, with every stage's share of the 25 forward passes of the
calibration set that the default may take, and writes benchmarks/results/quality.json after every
row. With --random N: how often `refit` is accepted on N random sets of 6 layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import layercut
from layercut.data.calibration import pack_tokens
from layercut.data.sources import read_texts
from layercut.machine import provenance
from layercut.models.view import DecoderView
from layercut.registry import resolve
from layercut.selection.select import PlanOfSize, Request, plan_sizes
from layercut.types import CalibrationBatches, PruningPlan

MODEL = "embedded:smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "quality.json"
SEQ_LEN = 512
TIMED_TOKENS = 8192
SHARES = {"wikitext2/wiki.valid.raw": 0.5, "c4/c4-sample.jsonl": 0.35, "embedded:docs": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[6, 9, 12])
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--test-tokens", type=int, default=16384 + SEQ_LEN)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--random", type=int, default=0)
    parser.add_argument("--random-tokens", type=int, default=16384)
    arguments = parser.parse_args()
    origin = provenance("benchmarks/quality.py")
    results: dict[str, Any] = {"versions": origin.versions, "hardware": origin.hardware, "rows": []}
    view = layercut.load(MODEL)
    if arguments.sizes:
        judge(results, view, arguments)
    if arguments.random:
        batches = mixed_batches(arguments.data, view, arguments.random_tokens, 0)
        results["random"] = random_sets(view, batches, arguments.random)
        save(results)


def judge(results: dict[str, Any], view: DecoderView, arguments: argparse.Namespace) -> None:
    """One row per seed and size; what all sizes share is computed once and counted in each."""
    texts = {
        "wikitext2": str(arguments.data / "wikitext2/wiki.test.raw"),
        "speeches": "embedded:speeches",
        "reviews": "embedded:reviews@test",
    }
    dense = measure(view, texts, arguments.test_tokens)
    results |= {"dense": dense, "calibration_tokens": arguments.tokens}
    print(f"dense {rounded(dense)}", flush=True)
    for seed in arguments.seeds:
        batches = mixed_batches(arguments.data, view, arguments.tokens, seed)
        forward = forward_seconds(view, batches)
        start = time.perf_counter()
        scoring = resolve("scoring", "residual-sensitivity")
        request = Request(scoring=scoring, strategy="priced-cuts")
        plan_of_size = plan_sizes(view, batches, request)
        price = time.perf_counter() - start
        print(f"seed {seed}: one forward pass of {arguments.tokens} tokens {forward:.0f} s")
        print(f"{'layers':6} {'ratio to dense':56} {'passes: price + search + refit':32} dropped")
        for size in arguments.sizes:
            row = prune(view, batches, plan_of_size, size, {"price": price})
            with view.skipping(row["dropped"]), view.patched(row.pop("tensors")):
                pruned = measure(view, texts, arguments.test_tokens)
            row |= {"seed": seed, "forward_seconds": forward, "perplexity": pruned}
            row["ratio"] = {name: pruned[name] / dense[name] for name in dense}
            row["passes"] = {k: round(v / forward, 2) for k, v in row["seconds"].items()}
            shares = " + ".join(f"{v:.1f}" for v in row["passes"].values())
            total = f"{shares} = {sum(row['passes'].values()):.1f}"
            print(f"{size:6} {rounded(row['ratio'])!s:56} {total:32} {row['dropped']}", flush=True)
            results["rows"].append(row)
            save(results)


def save(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2))


def mixed_batches(data: Path, view: DecoderView, n_tokens: int, seed: int) -> CalibrationBatches:
    """Windows drawn from the three texts by their shares, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    n_windows = n_tokens // SEQ_LEN
    parts: list[Tensor] = []
    for source, share in SHARES.items():
        name = source if source.startswith("embedded:") else str(data / source)
        windows = pack_tokens(read_texts(name), view.tokenizer, seq_len=SEQ_LEN, max_tokens=10**7)
        wanted = round(share * n_windows)
        parts.append(windows[torch.randperm(len(windows), generator=generator)[:wanted]])
    mixed = torch.cat(parts)
    mixed = mixed[torch.randperm(len(mixed), generator=generator)]
    return CalibrationBatches(mixed, 8, 4, "wikitext2 valid + c4 + docs", f"mix-{n_tokens}-{seed}")


def measure(view: DecoderView, texts: dict[str, str], max_tokens: int) -> dict[str, float]:
    evaluation = layercut.evaluate(view, text=texts, max_tokens=max_tokens, speed=False)
    return {name: figure.value for name, figure in evaluation.perplexity.items()}


@torch.no_grad()
def forward_seconds(view: DecoderView, batches: CalibrationBatches) -> float:
    """One forward pass over the calibration set, with the loss.

    The median of five passes over TIMED_TOKENS of it, scaled to all: time grows linearly.
    """
    timed = batches.input_ids[: TIMED_TOKENS // batches.seq_len]
    runs = []
    for _ in range(5):
        start = time.perf_counter()
        for ids in timed.split(batches.micro_batch):
            view.token_losses(ids)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs) * batches.input_ids.numel() / timed.numel()


def prune(
    view: DecoderView,
    batches: CalibrationBatches,
    plan_of_size: PlanOfSize,
    size: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    start = time.perf_counter()
    plan, evidence = plan_of_size(size)
    searched = time.perf_counter()
    patch = layercut.fit(view, plan, evidence, batches)
    fitted = time.perf_counter()
    return {
        "layers": size,
        "dropped": list(plan.dropped),
        "seconds": {**seconds, "search": searched - start, "refit": fitted - searched},
        "notes": dict(patch.notes),
        "tensors": patch.tensors,
    }


def random_sets(
    view: DecoderView, batches: CalibrationBatches, n_sets: int
) -> list[dict[str, Any]]:
    """`refit` on random sets of 6 layers, layer 0 kept; seeds 0 to n − 1."""
    rows = []
    for seed in range(n_sets):
        generator = torch.Generator().manual_seed(seed)
        drawn = 1 + torch.randperm(view.n_layers - 1, generator=generator)[:6]
        dropped = tuple(sorted(drawn.tolist()))
        plan = PruningPlan(MODEL, view.n_layers, dropped, "random")
        notes = dict(layercut.fit(view, plan, None, batches).notes)
        rows.append({"seed": seed, "dropped": dropped, **notes})
        print(seed, dropped, notes, flush=True)
    print("accepted:", sum(row["accepted"] for row in rows), "of", n_sets)
    return rows


def rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    main()
