"""What IGIA costs: scores without out × in matrices, and recording inside a training step.

Run  python benchmarks/igia_cost.py [--only scores recording] [--minutes 5] [--steps 40]
Scores: random float32 factors of rank 8, as many layers as the plain way does in the given minutes.
Recording: LoRA on every linear weight of the embedded model, one batch of 8 reviews a step, which
is an eighth of the paper's step and so an upper bound on the share. Prints one table per claim and
writes benchmarks/results/igia_cost.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import layercut
from layercut.data.tasks import read_rows
from layercut.gradients.log import GradientLog
from layercut.gradients.low_rank import squared_norms
from layercut.machine import provenance
from layercut.recipe.finetune import FinetuneConfig
from layercut.training.finetune import build_trainer

RESULTS = Path(__file__).parent / "results" / "igia_cost.json"
RANK = 8
SHAPES = {
    "8B": [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 2 + [(4096, 14336)],
    "135M": [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)],
}
"""(out, in) of a layer's linear weights: q, o, k, v, gate, up, down."""

N_LAYERS = {"8B": 32, "135M": 30}
GOALS = {"8B": 100, "135M": 8}
Factors = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["scores", "recording"])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    origin = provenance("benchmarks/igia_cost.py")
    print(origin.hardware, origin.versions)
    results: dict[str, Any] = {"versions": origin.versions, "hardware": origin.hardware}
    if "scores" in arguments.only:
        print(
            "model  layers   plain s    Gram s   ratio  goal   rel. diff.  memory of the plain way"
        )
        results["scores"] = {
            size: scores(size, arguments.steps, 60 * arguments.minutes) for size in SHAPES
        }
    if "recording" in arguments.only:
        results["recording"] = recording()
    RESULTS.parent.mkdir(exist_ok=True)
    earlier = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(earlier | results, indent=2))


def scores(size: str, n_steps: int, seconds: float) -> dict[str, Any]:
    """Both ways on the same factors, layer by layer until the plain way's time is over."""
    gram_seconds = plain_seconds = worst = 0.0
    n_layers = 0
    while n_layers < N_LAYERS[size] and (n_layers == 0 or plain_seconds < seconds):
        factors = random_layer(size, n_steps, seed=n_layers)
        gram, elapsed = timed(layer_score, factors, by_gram)
        gram_seconds += elapsed
        plain, elapsed = timed(layer_score, factors, by_products)
        plain_seconds += elapsed
        worst = max(worst, abs(gram / plain - 1))
        n_layers += 1
    largest = max(factors, key=lambda pair: pair[0].shape[2] * pair[1].shape[1])
    memory = {way.__name__: peak_bytes(way, largest) for way in (by_gram, by_products)}
    share = memory["by_gram"] / memory["by_products"]
    ratio = plain_seconds / gram_seconds
    print(
        f"{size:6s} {n_layers:6d} {plain_seconds:9.2f} {gram_seconds:9.4f} {ratio:7.1f} "
        f"{GOALS[size]:5d} {worst:12.1e}  {share:.3%}",
        flush=True,
    )
    return {
        "steps": n_steps,
        "layers": n_layers,
        "plain_seconds": plain_seconds,
        "gram_seconds": gram_seconds,
        "ratio": ratio,
        "largest_relative_difference": worst,
        "peak_bytes": memory,
        "met": {
            "speed": ratio >= GOALS[size],
            "equality": worst <= 1e-6,
            "memory": share <= 0.01,
        },
    }


def by_gram(a: Tensor, b: Tensor) -> float:
    """Σ (1/t) Σ_i (b_i a_i)² from Gram matrices, as `GradientLog.layer_scores` does."""
    return squared_norms(a, b).mean().item()


def by_products(a: Tensor, b: Tensor) -> float:
    """The same, as the paper writes it: F_W = (1/t) Σ_i G_i ⊙ G_i, then the sum of its entries."""
    matrix = torch.zeros(b.shape[1], a.shape[2])
    for i in range(len(a)):
        product = b[i] @ a[i]
        matrix.addcmul_(product, product)
    return matrix.sum(dtype=torch.float64).item() / len(a)


def layer_score(factors: list[Factors], way: Callable[[Tensor, Tensor], float]) -> float:
    return sum(way(a, b) for a, b in factors)


def random_layer(size: str, n_steps: int, seed: int) -> list[Factors]:
    """One layer's factors as slices of recorded rows, which is how `GradientLog` keeps them."""
    generator = torch.Generator().manual_seed(seed)
    width = sum(RANK * (n_out + n_in) for n_out, n_in in SHAPES[size])
    rows = torch.randn(n_steps, width, generator=generator)
    factors = []
    start = 0
    for n_out, n_in in SHAPES[size]:
        middle, stop = start + RANK * n_in, start + RANK * (n_in + n_out)
        a = rows[:, start:middle].view(n_steps, RANK, n_in)
        factors.append((a, rows[:, middle:stop].view(n_steps, n_out, RANK)))
        start = stop
    return factors


def timed(work: Callable[..., float], *arguments: Any) -> tuple[float, float]:
    start = time.perf_counter()
    value = work(*arguments)
    return value, time.perf_counter() - start


def peak_bytes(way: Callable[[Tensor, Tensor], float], factors: Factors) -> int:
    """Most tensor memory that ``way`` holds at once, above its arguments."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        way(*factors)
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class TimedLog(GradientLog):
    """A record that notes what each step of it took, and what the whole training step did."""

    def __init__(self, *, steps: int) -> None:
        super().__init__(steps=steps, stop=True)
        self.recording: list[float] = []
        self.training: list[float] = []

    def on_step_begin(self, *arguments: Any, **state: Any) -> None:
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        start = time.perf_counter()
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.recording.append(time.perf_counter() - start)

    def on_step_end(self, *arguments: Any, **state: Any) -> None:
        self.training.append(time.perf_counter() - self.started)


def recording(n_steps: int = 12) -> dict[str, Any]:
    """Seconds of recording against those of the rest of the training step, medians."""
    view = layercut.load("embedded:smollm2-135m")
    rows = read_rows("embedded:reviews@train")[:512]
    settings = FinetuneConfig(batch_size=8, accumulation=1, save_steps=None, seed=0)
    log = TimedLog(steps=n_steps)
    with tempfile.TemporaryDirectory() as folder:
        build_trainer(view, rows, settings, output_dir=Path(folder), callbacks=[log]).train()
    # The first steps pay for caches and for the first touch of the record's memory pages.
    recorded = statistics.median(log.recording[2:])
    rest = statistics.median(
        whole - part for whole, part in zip(log.training[2:], log.recording[2:], strict=True)
    )
    share = recorded / rest
    print(
        f"recording {1e3 * recorded:.1f} ms of a {rest:.3f} s training step: {share:.2%} (goal 3 %)"
    )
    return {
        "recording_seconds": recorded,
        "training_step_seconds": rest,
        "share": share,
        "met": share <= 0.03,
    }


if __name__ == "__main__":
    main()
