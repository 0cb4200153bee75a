"""The estimate of a run beside what it takes: seconds and peak memory of every stage.

Run  python benchmarks/estimates.py [--shape wide | deep] [--sequences 32] [--seq-len 256]
         [--drop 6] [--threads 1] [--measured benchmarks/results/estimates-NAME.json]
Without a shape, the embedded model. Shapes are Llamas with random weights and the embedded model's
tokenizer. Seconds are this process's processor time divided by its threads, so that other programs
do not count; memory is resident memory above that of the libraries, with what earlier stages freed
given back first. Prints one table and writes benchmarks/results/estimates-NAME.json; with
--measured, compares today's formulas with the rates and measurements of such a file.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from layercut import registry
from layercut.checkpoints.embedded_model import checkpoint_folder
from layercut.checkpoints.output_dir import staged_folder
from layercut.checkpoints.patch import round_patch
from layercut.checkpoints.preflight import check_folder, list_tokenizer_files
from layercut.checkpoints.resolve import find_folder
from layercut.checkpoints.writer import write_checkpoint
from layercut.evaluation.evaluate import evaluate
from layercut.machine import (
    Rates,
    available_memory_bytes,
    measure_rates,
    peak_rss_bytes,
    provenance,
    reset_peak_rss,
)
from layercut.models.load import find_device
from layercut.models.surgery import apply
from layercut.output.verify import verify_checkpoint
from layercut.pipeline.estimate import RunEstimate, estimate_run
from layercut.pipeline.model_shape import ModelShape, read_shape
from layercut.pipeline.prepare import prepare
from layercut.recipe.recipe import Recipe
from layercut.recovery.fit import fit_repair
from layercut.recovery.gradient_steps import take_steps
from layercut.recovery.layer_fit import mask_held_out_rows
from layercut.selection.select import choose_layers
from layercut.types import WeightPatch

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, tuple[torch.dtype, dict[str, int]]] = {
    "wide": (
        torch.float32,
        {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "deep": (
        torch.bfloat16,
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
        },
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--drop", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measured", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as place:
        model = "embedded:smollm2-135m"
        if arguments.shape:
            model = str(Path(place) / "model")
            write_random_model(Path(model), arguments.shape)
        recipe = build_recipe(model, arguments)
        folder = find_folder(model, None)
        layout, stored = check_folder(folder)
        shape = read_shape(folder, layout, stored, dtype="auto", device=find_device("cpu"))
        if arguments.measured:
            content = json.loads(arguments.measured.read_text())
            rates, measured = Rates(**content["rates"]), content["measured"]
            free = content["free_bytes"]
        else:
            free = available_memory_bytes()
            rates = measure(shape)
            measured = run_stages(recipe, Path(place) / "out", arguments.threads)
        estimate = estimate_run(shape, recipe, rates, free)
    report(estimate, measured)
    origin = provenance("benchmarks/estimates.py")
    content = {
        "rates": asdict(rates),
        "free_bytes": free,
        "measured": measured,
        "recipe": recipe.model_dump(mode="json"),
        "versions": origin.versions,
        "hardware": origin.hardware,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"estimates-{arguments.shape or 'smollm2-135m'}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")


def measure(shape: ModelShape) -> Rates:
    """As a run does before it starts."""
    return measure_rates(
        shape.largest_file, shape.width, shape.inner, shape.product_dtype, shape.device
    )


def build_recipe(model: str, arguments: argparse.Namespace) -> Recipe:
    """The defaults on some text."""
    return Recipe.model_validate(
        {
            "model": model,
            "device": "cpu",
            "calibration": {
                "n_sequences": arguments.sequences,
                "seq_len": arguments.seq_len,
            },
            "selection": {"drop_layers": arguments.drop},
            "evaluation": {"max_tokens": arguments.max_tokens},
        }
    )


def write_random_model(folder: Path, name: str) -> None:
    """A checkpoint of random weights, whose vocabulary is the embedded model's."""
    dtype, sizes = SHAPES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        max_position_embeddings=4096, vocab_size=49152, tie_word_embeddings=True, **sizes
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    for path in list_tokenizer_files(checkpoint_folder()):
        shutil.copyfile(path, folder / path.name)


def run_stages(recipe: Recipe, output_dir: Path, n_threads: int) -> dict[str, dict[str, float]]:
    """Every stage of a default run, one after the other, each timed alone."""
    clock = Clock(n_threads)
    job = clock.time("load", lambda: prepare(recipe, output_dir, overwrite=False))
    view, batches, request, evaluation = job.view, job.batches, job.request, job.evaluation
    clock.time("evaluate dense", lambda: evaluate(view, **evaluation))
    plan, evidence = clock.time("select", lambda: choose_layers(view, batches, request))
    call = registry.resolve("recovery", "refit", {"gradient_steps": 0})
    patch = clock.time("recover", lambda: fit_repair(view, plan, evidence, batches, call))
    assert isinstance(patch, WeightPatch)
    options = job.recovery.options
    held_out = mask_held_out_rows(batches, options.held_out_every)[:: batches.seq_len]
    tensors, lengths = clock.time(
        "gradient steps",
        lambda: take_steps(
            view,
            plan,
            patch.tensors,
            batches.input_ids[held_out],
            n_steps=options.gradient_steps,
            micro_batch=batches.micro_batch,
        ),
    )
    print(f"dropped {plan.dropped}, shrinkage {patch.notes['shrinkage']}, steps {lengths}")
    patch = round_patch(view.path, view.layout, replace(patch, tensors=tensors))
    del tensors, job
    apply(view, plan, patch)
    clock.time("evaluate pruned", lambda: evaluate(view, **evaluation))

    def write() -> None:
        with staged_folder(output_dir, overwrite=False) as folder:
            write_checkpoint(view.path, view.layout, plan, patch, folder)
            verify_checkpoint(folder, view, plan, patch)

    clock.time("write and verify", write)
    return clock.stages


class Clock:
    """Processor seconds and peak memory of stages."""

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self.stages: dict[str, dict[str, float]] = {}
        reset_peak_rss()
        self.libraries = peak_rss_bytes()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        """What the work returns."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        reset_peak_rss()
        wall, busy = time.perf_counter(), time.process_time()
        value = work()
        seconds = (time.process_time() - busy) / self.n_threads
        peak = peak_rss_bytes() - self.libraries
        self.stages[name] = {
            "seconds": seconds,
            "wall_seconds": time.perf_counter() - wall,
            "host_bytes": peak,
        }
        print(f"{name}: {seconds:.1f} s, {peak / 1e6:.0f} MB", flush=True)
        return value


def report(estimate: RunEstimate, measured: dict[str, dict[str, float]]) -> None:
    """Both, and the estimate divided by what was measured."""
    print("stage              seconds: estimate  measured  ratio   MB: estimate  measured  ratio")
    totals = [0.0, 0.0]
    for stage in estimate.stages("resident"):
        assert stage.seconds is not None and stage.host_bytes is not None
        row = measured[stage.name]
        totals = [totals[0] + stage.seconds, totals[1] + row["seconds"]]
        print(
            f"{stage.name:18s} {stage.seconds:17.1f} {row['seconds']:9.1f} "
            f"{stage.seconds / row['seconds']:6.2f} {stage.host_bytes / 1e6:14.0f} "
            f"{row['host_bytes'] / 1e6:9.0f} {stage.host_bytes / row['host_bytes']:6.2f}"
        )
    print(f"{'all':18s} {totals[0]:17.1f} {totals[1]:9.1f} {totals[0] / totals[1]:6.2f}")


if __name__ == "__main__":
    main()
