"""One process with one thread beside two such ranks: what sharing a run saves.

Run  python benchmarks/ranks.py [--ranks 2] [--hidden 256] [--layers 8] [--tokens 8192]
         [--seq-len 256] [--drop 2] [--repeats 1] [--device cpu]
Scores, selects and refits a random float32 Llama. Prints the seconds of each stage alone and
shared, without loading, and their ratio, which should be 0.6 or less for two ranks. Each rank must
have a quiet core, or a GPU; the ratio of CPU time, the busiest rank's, bears other load better.
Writes benchmarks/results/ranks-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as processes
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layercut.machine import provenance
from layercut.models.load import load
from layercut.pipeline.join_ranks import joined_ranks
from layercut.recovery.fit import fit
from layercut.scoring.score import score
from layercut.selection.select import select
from layercut.types import CalibrationBatches, PruningPlan

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 4096
STAGES = ("residual-sensitivity", "gradmap", "select", "refit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--drop", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder, arguments)
        seconds = {}
        for n_ranks in (1, arguments.ranks):
            port = find_port()
            start: Any = processes  # torch does not type it
            start.spawn(measure_rank, (n_ranks, port, folder, arguments), nprocs=n_ranks)
            seconds[n_ranks] = json.loads((folder / "seconds.json").read_text())
    origin = provenance("benchmarks/ranks.py")
    print(origin.hardware)
    print(f"{'stage':22s} {'1 rank':>9s} {arguments.ranks:>3d} ranks   ratio  CPU ratio")
    for stage in STAGES:
        (alone, own), (shared, busiest) = seconds[1][stage], seconds[arguments.ranks][stage]
        ratios = f"{shared / alone:7.2f} {busiest / own:10.2f}"
        print(f"{stage:22s} {alone:9.2f} {shared:9.2f} {ratios}")
    result = {"arguments": vars(arguments), "seconds": seconds, "hardware": origin.hardware}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"ranks-{arguments.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


def write_model(folder: Path, arguments: argparse.Namespace) -> None:
    """A checkpoint of random weights with a tokenizer of numbers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {str(i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def measure_rank(
    rank: int, world: int, port: int, folder: Path, arguments: argparse.Namespace
) -> None:
    """Time every stage on this rank; rank 0 writes the medians down."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with joined_ranks() as ranks:
        view = load(str(folder), dtype="float32", device=ranks.choose_device(arguments.device))
        view.ranks = ranks.on(view.device)
        generator = torch.Generator().manual_seed(0)
        shape = arguments.tokens // arguments.seq_len, arguments.seq_len
        ids = torch.randint(VOCABULARY, shape, generator=generator)
        batches = CalibrationBatches(ids, 8, 4, "random", "0")
        layers = tuple(range(view.n_layers // 2, view.n_layers // 2 + arguments.drop))
        plan = PruningPlan("random", view.n_layers, layers, "given")
        work: dict[str, Callable[[], Any]] = {
            "residual-sensitivity": lambda: score(view, batches),
            "gradmap": lambda: score(view, batches, method="gradmap"),
            "select": lambda: select(view, batches, drop_layers=arguments.drop),
            "refit": lambda: fit(view, plan, None, batches),
        }
        seconds: dict[str, tuple[float, float]] = {}
        for stage in STAGES:
            times = []
            for _ in range(arguments.repeats):
                view.ranks.wait()
                start, busy = time.perf_counter(), time.process_time()
                work[stage]()
                busy = time.process_time() - busy
                view.ranks.wait()
                busiest = float(view.ranks.gather_rows(torch.tensor([busy])).max())
                times.append((time.perf_counter() - start, busiest))
            wall, cpu = (statistics.median(part) for part in zip(*times, strict=True))
            seconds[stage] = wall, cpu
    if ranks.is_first:
        (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
