"""What dropped layers save: a training step and a prompt, pruned and dense side by side.

Run  python benchmarks/tuning_cost.py [--sizes 6 9 12] [--rounds 5] [--steps 3] [--run-steps 94]
Each round takes every model in turn, so that the machine's other work meets all of them alike; a
model's ratio to dense is the median over rounds. What is fixed (embedding and head) is measured on
the same model with no layer at all. Times depend on how many layers go, not on which: the last ones
do. Writes benchmarks/results/tuning_cost.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import layercut
from layercut.data.tasks import TaskRow, read_rows
from layercut.evaluation.accuracy import answer
from layercut.evaluation.speed import process_prompt, time_in_turns
from layercut.machine import provenance
from layercut.models.load import reload
from layercut.models.view import DecoderView
from layercut.recipe.finetune import FinetuneConfig
from layercut.training.finetune import finetune

RESULTS = Path(__file__).parent / "results" / "tuning_cost.json"
ALLOWED = 1.05


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time relative to dense: median and range over rounds."""

    median: float
    low: float
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[6, 9, 12])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="training steps of a round")
    parser.add_argument("--rows", type=int, default=256, help="rows answered in a round")
    parser.add_argument("--early-steps", type=int, default=40, help="GradPruner's early steps")
    parser.add_argument("--run-steps", type=int, default=94, help="steps of a whole run")
    arguments = parser.parse_args()
    dense = layercut.load("embedded:smollm2-135m")
    n_layers = dense.n_layers
    views = {0: dense} | {size: shortened(dense, size) for size in (*arguments.sizes, n_layers)}
    rows = read_rows("embedded:reviews@train")
    figures = {
        "training step": lambda view: step_seconds(view, rows, arguments.steps),
        "answering": lambda view: seconds(lambda: answer(view, rows[: arguments.rows])),
        "prefill": lambda view: 1 / prefill_speed(view),
    }
    origin = provenance("benchmarks/tuning_cost.py")
    print(origin.hardware, origin.versions)
    results = {
        name: side_by_side(views, measure, arguments.rounds) for name, measure in figures.items()
    }
    fixed = {name: ratios[n_layers].median for name, ratios in results.items()}
    print("figure         layers  / dense (spread)       allowed  fixed share")
    for name, ratios in results.items():
        for size in arguments.sizes:
            kept = 1 - size / n_layers
            allowed = ALLOWED * (kept * (1 - fixed[name]) + fixed[name])
            ratio = ratios[size]
            print(
                f"{name:14} {size:6} {ratio.median:8.3f} ({ratio.low:.3f}–{ratio.high:.3f}) "
                f"{allowed:9.3f} {fixed[name]:8.3f}"
            )
    for size in arguments.sizes:
        share = results["training step"][size].median
        total = share + arguments.early_steps / arguments.run_steps
        print(
            f"whole run, {size} layers: {total:.3f} of dense with {arguments.early_steps} early "
            f"steps before {arguments.run_steps}; {share:.3f} without"
        )
    table = {
        name: {size: asdict(ratio) for size, ratio in sizes.items()}
        for name, sizes in results.items()
    }
    content = {"versions": origin.versions, "hardware": origin.hardware, "ratios": table}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def shortened(dense: DecoderView, n_dropped: int) -> DecoderView:
    """A copy of the model without its last layers."""
    view = reload(dense)
    del view.layers[view.n_layers - n_dropped :]
    view.model.config.num_hidden_layers = len(view.layers)
    return view


def prefill_speed(view: DecoderView) -> float:
    """Prompt tokens per second, the median of seven rounds."""
    return statistics.median(time_in_turns({"": lambda: nullcontext(view)}, process_prompt)[""])


def step_seconds(view: DecoderView, rows: list[TaskRow], n_steps: int) -> float:
    """Seconds of one optimiser step on 64 rows."""
    if not view.n_layers:
        return fixed_step_seconds(view, rows, n_steps)
    settings = FinetuneConfig(batch_size=16, accumulation=4, max_length=128, max_steps=n_steps)
    return finetune(view, rows[: 64 * n_steps], settings).train_seconds / n_steps


def fixed_step_seconds(view: DecoderView, rows: list[TaskRow], n_steps: int) -> float:
    """The same for embedding, norm and head alone, which have no adapters: forward and back."""
    batches = [rows[start : start + 16] for start in range(0, 64 * n_steps, 16)]
    encoded = [
        view.tokenizer([row.prompt for row in batch], padding=True, return_tensors="pt").input_ids
        for batch in batches
    ]

    def step() -> None:
        for ids in encoded:
            hidden = view.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden = hidden[:, -1].detach().requires_grad_()
            with torch.enable_grad(), view.precision():
                loss = view.model.get_output_embeddings()(hidden).float().logsumexp(dim=-1).sum()
            loss.backward()

    return seconds(step) / n_steps


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def side_by_side(
    views: dict[int, DecoderView], measure: Callable[[DecoderView], float], n_rounds: int
) -> dict[int, Ratio]:
    """Layers dropped → ratio to dense."""
    for view in views.values():
        measure(view)
    rounds = [{size: measure(view) for size, view in views.items()} for _ in range(n_rounds)]
    ratios = {size: [taken[size] / taken[0] for taken in rounds] for size in views}
    return {
        size: Ratio(statistics.median(values), min(values), max(values))
        for size, values in ratios.items()
    }


if __name__ == "__main__":
    main()
