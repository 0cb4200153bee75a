"""What every stage costs, in plain forward passes of the same tokens: on a CPU or a GPU.

Run  python benchmarks/engine.py [--model embedded:smollm2-135m | --shape 8B --layers 32]
         [--residency streamed] [--tokens 32768] [--drop 8] [--repeats 5]
         [--stages forward sensitivity gradmap select …]
A shape is a Llama of that size with random bfloat16 weights, written to a folder and loaded as any
checkpoint is. Prints one table, medians with the lowest and the highest, and writes
benchmarks/results/engine-NAME.json. The unit "×" is one forward pass with the head over all
calibration tokens, timed in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import layercut
from layercut.engine.loss import mean_loss
from layercut.machine import peak_rss_bytes, provenance, reset_peak_rss
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.scoring.score import score
from layercut.selection.select import select
from layercut.types import CalibrationBatches, PruningPlan

RESULTS = Path(__file__).parent / "results"
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "360M": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "vocab_size": 49152,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Widths of SmolLM2 360M, Llama 3.2 1B and Llama 3.1 8B; the number of layers is an option."""
STAGES = ("sensitivity", "gradmap", "select", "refit", "refit-steps")
SEQ_LEN = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded:smollm2-135m")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--drop", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--residency", default="auto")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place = tempfile.TemporaryDirectory() if arguments.shape else nullcontext("")
    with place as folder:
        model = arguments.model
        if arguments.shape:
            model = folder
            write_random_model(Path(folder), arguments.shape, arguments.layers)
        results = measure(model, arguments)
    name = f"{arguments.shape}-{arguments.layers}" if arguments.shape else "smollm2-135m"
    name += "-streamed" if arguments.residency == "streamed" else ""
    arguments.output.mkdir(exist_ok=True)
    path = arguments.output / f"engine-{name}-{results['device']}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


def write_random_model(folder: Path, shape: str, n_layers: int) -> None:
    """A checkpoint of random bfloat16 weights with a tokenizer of numbers."""
    config = LlamaConfig(
        num_hidden_layers=n_layers,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        **SHAPES[shape],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = {str(i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def measure(model: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All stages of one model, as a table on the terminal and as JSON."""
    origin = provenance("benchmarks/engine.py")
    print(origin.hardware, origin.versions, flush=True)
    start = time.perf_counter()
    view = load(model, device=arguments.device, residency=arguments.residency)
    synchronize(view)
    load_seconds = time.perf_counter() - start
    batches = draw_batches(view, arguments.tokens, arguments.seq_len)
    unit = Timer(view, arguments.repeats)
    forward = unit.time(lambda: mean_loss(view, batches.input_ids, batches.micro_batch))
    print(
        f"{'stage':14s} {'seconds':>9s} {'lowest':>9s} {'highest':>9s} {'× forward':>9s}  peak GiB"
    )
    rows = {"load": {"seconds": load_seconds}, "forward": forward}
    report("load", rows["load"] | {"lowest": load_seconds, "highest": load_seconds}, forward)
    report("forward", forward, forward)
    first = view.n_layers // 2
    middle = tuple(range(first, first + arguments.drop))
    plan = PruningPlan(view.name, view.n_layers, middle, "given")

    def refit(n_steps: int) -> dict[str, Any]:
        patch = fit(view, plan, None, batches, method="refit", gradient_steps=n_steps)
        return dict(patch.notes)

    work: dict[str, Callable[[], Any]] = {
        "sensitivity": lambda: score(view, batches, method="residual-sensitivity"),
        "gradmap": lambda: score(view, batches, method="gradmap"),
        "select": lambda: (
            select(view, batches, strategy="priced-cuts", drop_layers=arguments.drop)[0].dropped
        ),
        "refit": lambda: refit(0),
        "refit-steps": lambda: refit(2),
    }
    for name in arguments.stages:
        rows[name] = unit.time(work[name])
        report(name, rows[name], forward)
        if name.startswith(("select", "refit")):
            print(f"    {rows[name].pop('value')}", flush=True)
        rows[name].pop("value", None)
    forward.pop("value", None)
    for row in rows.values():
        row["forward_passes"] = row["seconds"] / forward["seconds"]
    return {
        "device": view.device.type,
        "n_parameters": view.n_parameters,
        "n_layers": view.n_layers,
        "n_tokens": batches.input_ids.numel(),
        "versions": origin.versions,
        "hardware": origin.hardware,
        "stages": rows,
    }


def draw_batches(view: DecoderView, n_tokens: int, seq_len: int) -> CalibrationBatches:
    """Real text for the real model; random tokens for random weights."""
    n_sequences = n_tokens // seq_len
    if not Path(view.name).is_dir():
        section = {"data": "embedded:docs", "n_sequences": n_sequences, "seq_len": seq_len}
        return layercut.calibration_batches(section, view.tokenizer)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(view.vocabulary_size, (n_sequences, seq_len), generator=generator)
    micro_batch = max(1, min(8, 2048 // seq_len))
    return CalibrationBatches(
        ids, gradient_batch=8, micro_batch=micro_batch, source="random", fingerprint=""
    )


def synchronize(view: DecoderView) -> None:
    """Wait for the device."""
    if view.device.type == "cuda":
        torch.cuda.synchronize()


class Timer:
    """Medians of several runs and the peak of the memory that each takes."""

    def __init__(self, view: DecoderView, repeats: int) -> None:
        self.view = view
        self.repeats = repeats

    def time(self, work: Callable[[], Any]) -> dict[str, Any]:
        """Seconds: median, lowest, highest; peak memory in bytes; what the last run returned."""
        seconds, value = [], None
        on_gpu = self.view.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        reset_peak_rss()
        for _ in range(self.repeats):
            synchronize(self.view)
            start = time.perf_counter()
            value = work()
            synchronize(self.view)
            seconds.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_rss_bytes()
        return {
            "seconds": statistics.median(seconds),
            "lowest": min(seconds),
            "highest": max(seconds),
            "runs": seconds,
            "peak_bytes": peak,
            "value": value,
        }


def report(name: str, row: dict[str, Any], forward: dict[str, Any]) -> None:
    """One line of the table."""
    peak = f"{row['peak_bytes'] / 2**30:.1f}" if "peak_bytes" in row else ""
    print(
        f"{name:14s} {row['seconds']:9.3f} {row['lowest']:9.3f} {row['highest']:9.3f} "
        f"{row['seconds'] / forward['seconds']:9.2f}  {peak}",
        flush=True,
    )


if __name__ == "__main__":
    main()
