"""Quality without training: the default selection and recovery at 6, 9 and 12 of 30 layers.

Run  python benchmarks/quality.py --data ../shared/data [--sizes 6 9 12] [--tokens 32768]
Calibrates on WikiText-2 valid, the C4 sample and the embedded docs; judges on WikiText-2 test
(detokenised, windows of 512) and on text that calibration never saw. Prints one table and writes
benchmarks/results/quality.json after every row. With --random N: how often `refit` is accepted on N
random sets of 6 layers.
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
from layercut.models.view import DecoderView
from layercut.report.machine import provenance
from layercut.types import CalibrationBatches, PruningPlan

MODEL = "embedded:smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "quality.json"
SEQ_LEN = 512
SHARES = {"wikitext2/wiki.valid.raw": 0.5, "c4/c4-sample.jsonl": 0.35, "embedded:docs": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="*", default=[6, 9, 12])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--test-tokens", type=int, default=16384 + SEQ_LEN)
    parser.add_argument("--random", type=int, default=0)
    arguments = parser.parse_args()
    origin = provenance("benchmarks/quality.py")
    results: dict[str, Any] = {"versions": origin.versions, "hardware": origin.hardware, "rows": []}
    view = layercut.load(MODEL)
    batches = mixed_batches(arguments.data, view, arguments.tokens)
    texts = {
        "wikitext2": str(arguments.data / "wikitext2/wiki.test.raw"),
        "speeches": "embedded:speeches",
        "reviews": "embedded:reviews@test",
    }
    dense = measure(view, texts, arguments.test_tokens)
    forward = forward_seconds(view, batches)
    results |= {"dense": dense, "forward_seconds": forward, "calibration_tokens": arguments.tokens}
    print(f"dense {rounded(dense)}; one forward pass of {arguments.tokens} tokens {forward:.0f} s")
    print(
        f"{'layers':6} {'ratio to dense':42} {'select':>7} {'refit':>6} {'passes':>6}  dropped",
        flush=True,
    )
    for size in arguments.sizes:
        row = prune(view, batches, size, texts, arguments.test_tokens, dense, forward)
        results["rows"].append(row)
        save(results)
    if arguments.random:
        results["random"] = random_sets(view, batches, arguments.random)
    save(results)


def save(results: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2))


def mixed_batches(data: Path, view: DecoderView, n_tokens: int) -> CalibrationBatches:
    """Windows drawn from the three texts by their shares, shuffled, seed 0."""
    generator = torch.Generator().manual_seed(0)
    n_windows = n_tokens // SEQ_LEN
    parts: list[Tensor] = []
    for source, share in SHARES.items():
        name = source if source.startswith("embedded:") else str(data / source)
        windows = pack_tokens(read_texts(name), view.tokenizer, seq_len=SEQ_LEN, max_tokens=10**7)
        wanted = round(share * n_windows)
        parts.append(windows[torch.randperm(len(windows), generator=generator)[:wanted]])
    mixed = torch.cat(parts)
    mixed = mixed[torch.randperm(len(mixed), generator=generator)]
    return CalibrationBatches(mixed, 8, 4, "wikitext2 valid + c4 + docs", "mix-0")


def measure(view: DecoderView, texts: dict[str, str], max_tokens: int) -> dict[str, float]:
    evaluation = layercut.evaluate(view, text=texts, max_tokens=max_tokens, speed=False)
    return {name: figure.value for name, figure in evaluation.perplexity.items()}


@torch.no_grad()
def forward_seconds(view: DecoderView, batches: CalibrationBatches) -> float:
    """Median of three forward passes, with the loss, over the calibration set."""
    runs = []
    for _ in range(3):
        start = time.perf_counter()
        for ids in batches.micro_batches():
            view.token_losses(ids)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs)


def prune(
    view: DecoderView,
    batches: CalibrationBatches,
    size: int,
    texts: dict[str, str],
    test_tokens: int,
    dense: dict[str, float],
    forward: float,
) -> dict[str, Any]:
    start = time.perf_counter()
    plan, evidence = layercut.select(view, batches, drop_layers=size)
    selected = time.perf_counter()
    patch = layercut.fit(view, plan, evidence, batches)
    fitted = time.perf_counter()
    with view.skipping(plan.dropped), view.patched(patch.tensors):
        pruned = measure(view, texts, test_tokens)
    ratios = {name: pruned[name] / dense[name] for name in dense}
    row = {
        "layers": size,
        "dropped": plan.dropped,
        "ratio": ratios,
        "perplexity": pruned,
        "select_seconds": selected - start,
        "refit_seconds": fitted - selected,
        "passes": (fitted - start) / forward,
        "notes": dict(patch.notes),
    }
    print(
        f"{size:6} {rounded(ratios)!s:42} {selected - start:7.0f} {fitted - selected:6.0f} "
        f"{row['passes']:6.1f}  {list(plan.dropped)}",
        flush=True,
    )
    return row


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
