"""The main job's figures: memory of scoring, projection against gradient descent, GradMAP literal.

Run  python benchmarks/gradmap_memory.py --data ../shared/data [--only memory projection gradmap]
Prints one table per claim and writes benchmarks/results/gradmap_memory.json.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "embedded:smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "gradmap_memory.json"
CALIBRATION = {"n_sequences": 48, "seq_len": 256, "gradient_batch": 8}


def main() -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/")
    parser.add_argument("--only", nargs="*", default=["memory", "projection", "gradmap"])
    parser.add_argument("--probe", choices=sorted(PROBES), help="internal: one fresh process")
    arguments = parser.parse_args()
    if arguments.probe:
        print(json.dumps(PROBES[arguments.probe]()))
        return
    from layercut.machine import provenance

    origin = provenance("benchmarks/gradmap_memory.py")
    results: dict[str, Any] = {"versions": origin.versions, "hardware": origin.hardware}
    print(origin.hardware, origin.versions)
    for name in arguments.only:
        start = time.perf_counter()
        results[name] = CLAIMS[name](arguments.data)
        print(f"[{name}: {time.perf_counter() - start:.0f} s]\n", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(earlier | results, indent=2))


def memory(data: Path) -> dict[str, Any]:
    """Peak memory above the loaded weights, each in a fresh process, three times."""
    peaks = {}
    for probe in PROBES:
        command = [sys.executable, __file__, "--data", str(data), "--probe", probe]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            for _ in range(3)
        ]
        peaks[probe] = {
            "median_mib": statistics.median(r["peak_mib"] for r in runs),
            "runs_mib": [r["peak_mib"] for r in runs],
            "layer_mib": runs[0]["layer_mib"],
        }
    forward, scoring = peaks["forward"], peaks["scoring"]
    allowed = 1.25 * forward["median_mib"] + forward["layer_mib"]
    print("memory above loaded weights, one gradient batch of 8 × 256 tokens (MiB, median of 3)")
    for probe, peak in peaks.items():
        print(f"  {probe:28s} {peak['median_mib']:8.0f}   runs {peak['runs_mib']}")
    print(f"  allowed for scoring          {allowed:8.0f}   (1.25 × forward + one layer)")
    return {"peaks": peaks, "allowed_mib": allowed, "met": scoring["median_mib"] <= allowed}


def _probe_setup(micro_batch: int = 8) -> Any:
    import torch

    import layercut
    from layercut.types import CalibrationBatches

    view = layercut.load(MODEL)
    ids = torch.randint(3, 49152, (8, 256), generator=torch.Generator().manual_seed(0))
    batches = CalibrationBatches(ids, 8, micro_batch, "random", "0")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM ← VmRSS
    return view, batches, _high_water_mib()


def _high_water_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _peak(view: Any, before: float) -> dict[str, float]:
    layer = sum(weight.numel() for weight in view.linear_weights(0).values()) * 4 / 2**20
    return {"peak_mib": round(_high_water_mib() - before, 1), "layer_mib": round(layer, 1)}


def probe_forward() -> dict[str, float]:
    """The yardstick: transformers' own forward pass and loss, weights requiring gradients."""
    view, batches, before = _probe_setup()
    for layer in range(view.n_layers):
        for weight in view.linear_weights(layer).values():
            weight.requires_grad_(True)
    with view.precision():
        view.model(input_ids=batches.input_ids, labels=batches.input_ids, use_cache=False)
    return _peak(view, before)


def probe_forward_chunked() -> dict[str, float]:
    """A harder yardstick: the same without ever holding the logits (no head, no loss)."""
    view, batches, before = _probe_setup()
    for layer in range(view.n_layers):
        for weight in view.linear_weights(layer).values():
            weight.requires_grad_(True)
    with view.precision():
        view.model.base_model(input_ids=batches.input_ids, use_cache=False)
    return _peak(view, before)


def probe_scoring(micro_batch: int = 8) -> dict[str, float]:
    import layercut

    view, batches, before = _probe_setup(micro_batch)
    layercut.score(view, batches, method="gradmap")
    return _peak(view, before)


def probe_scoring_in_micro_batches() -> dict[str, float]:
    return probe_scoring(micro_batch=2)


PROBES = {
    "forward": probe_forward,
    "forward without logits": probe_forward_chunked,
    "scoring": probe_scoring,
    "scoring, micro-batch 2": probe_scoring_in_micro_batches,
}


def projection(data: Path) -> dict[str, Any]:
    """Closed form against converged gradient descent on the same rows, real activations."""
    import layercut
    from layercut.recovery.mean_shift import find_largest_mean_shift
    from layercut.recovery.methods.projection import (
        solve_closed_form,
        solve_gradient_descent,
    )
    from layercut.types import PruningPlan

    view = layercut.load(MODEL)
    source = {"data": str(data / "wikitext2/wiki.valid.raw"), **CALIBRATION, "n_sequences": 16}
    batches = layercut.calibration_batches(source, view.tokenizer)
    plan = PruningPlan(MODEL, view.n_layers, (12, 17, 25), "given")
    shift = find_largest_mean_shift(view, plan, batches)
    seconds: dict[str, float] = {}
    solutions = {}
    for solve in (solve_closed_form, solve_gradient_descent):
        runs = []
        for _ in range(3 if solve is solve_closed_form else 1):
            start = time.perf_counter()
            solutions[solve.__name__] = solve(shift.residual, shift.output, 0.1)
            runs.append(time.perf_counter() - start)
        seconds[solve.__name__] = statistics.median(runs)
    closed, descent = solutions["solve_closed_form"], solutions["solve_gradient_descent"]
    difference = float((closed - descent).norm() / descent.norm())
    eye = closed.new_ones(len(closed)).diag()
    change = float((closed - descent).norm() / (descent - eye).norm())
    ratio = seconds["solve_closed_form"] / seconds["solve_gradient_descent"]
    print(f"projection at layer {shift.size.layer}, {len(shift.output)} tokens, d = {len(closed)}")
    print(f"  relative difference of P     {difference:.1e}   (of P − I: {change:.1e})")
    print(f"  seconds                      {seconds}")
    print(f"  closed form / descent        {ratio:.4f}")
    return {
        "relative_difference": difference,
        "relative_difference_of_change": change,
        "seconds": seconds,
        "ratio": ratio,
        "met": difference <= 1e-4 and ratio <= 0.1,
    }


def gradmap(data: Path) -> dict[str, Any]:
    """GradMAP as published on 6 of 30 layers, judged on WikiText-2 test."""
    import layercut

    text = {"wikitext2": str(data / "wikitext2/wiki.test.raw")}
    source = {"data": str(data / "wikitext2/wiki.valid.raw"), **CALIBRATION}
    view = layercut.load(MODEL)
    batches = layercut.calibration_batches(source, view.tokenizer)
    measure: dict[str, Any] = {"text": text, "max_tokens": 16384, "speed": False}
    dense = layercut.evaluate(view, **measure).perplexity["wikitext2"]
    start = time.perf_counter()
    plan, evidence = layercut.select(view, batches, scoring="gradmap", drop_layers=6)
    score_seconds = time.perf_counter() - start
    print(f"GradMAP literal, 6 of 30 layers in rounds: {[r.dropped[0] for r in plan.rounds]}")
    print(f"  dense                        {dense.value:8.2f} ± {dense.stderr:.2f}")
    rows = {}
    for method in ("none", "projection"):
        start = time.perf_counter()
        patch = layercut.fit(view, plan, evidence, batches, method=method)
        fit_seconds = time.perf_counter() - start
        pruned = layercut.load(MODEL)
        layercut.apply(pruned, plan, patch)
        figure = layercut.evaluate(pruned, **measure).perplexity["wikitext2"]
        rows[method] = {
            "perplexity": figure.value,
            "stderr": figure.stderr,
            "ratio": figure.value / dense.value,
            "seconds": fit_seconds,
            "notes": dict(patch.notes),
        }
        print(
            f"  {method:28s} {figure.value:8.2f} ± {figure.stderr:.2f}"
            f"   {figure.value / dense.value:.2f} × dense   {fit_seconds:.0f} s"
        )
    return {
        "dense": dense.value,
        "n_tokens": dense.n,
        "dropped": list(plan.dropped),
        "score_seconds": score_seconds,
        "rows": rows,
    }


CLAIMS = {"memory": memory, "projection": projection, "gradmap": gradmap}

if __name__ == "__main__":
    main()
