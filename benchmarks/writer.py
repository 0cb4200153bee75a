"""Peak memory and speed of the checkpoint writer against ``cp`` and fsync of the same files.

python benchmarks/writer.py            # 2.6 GB in the temporary folder, some minutes

A random sharded bfloat16 Llama checkpoint is made; layers are dropped from it in a fresh process,
whose peak memory is counted above what its imports take; then the files that came out are copied
by ``cp``. Both write to the same disk and end with an fsync of every file and of the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from layercut.checkpoints.preflight import read_layout
from layercut.checkpoints.safetensors_file import read_stored_tensors
from layercut.checkpoints.shard_writer import write_shard
from layercut.types import PruningPlan, WeightPatch

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCABULARY = 2048, 8192, 32, 8, 32768
N_LAYERS, PER_SHARD = 20, 5
DROPPED = (11, 12, 13)
RUNS = 5
MB = 1_000_000


def make_checkpoint(folder: Path) -> None:
    """Shards of ``PER_SHARD`` layers each, about 2.7 GB."""
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {
        "input_layernorm": (HIDDEN,),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "post_attention_layernorm": (HIDDEN,),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
    }
    ends = {"model.embed_tokens": (VOCABULARY, HIDDEN), "model.norm": (HIDDEN,)}
    torch.manual_seed(0)
    groups: list[dict[str, tuple[int, ...]]] = [
        {
            f"model.layers.{layer}.{name}": shape
            for layer in range(first, first + PER_SHARD)
            for name, shape in shapes.items()
        }
        for first in range(0, N_LAYERS, PER_SHARD)
    ]
    groups = [ends | {"lm_head": (VOCABULARY, HIDDEN)}, *groups]
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05}-of-{len(groups):05}.safetensors"
        entries = [(f"{n}.weight", torch.randn(s, dtype=torch.bfloat16)) for n, s in group.items()]
        write_shard(folder / file, entries, {"format": "pt"})
        weight_map |= {name: file for name, _ in entries}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))


def write_once(source: Path, out: Path) -> None:
    """What the fresh process does: import, note the memory, write, print figures."""
    from transformers import AutoConfig

    from layercut.checkpoints.output_dir import staged_folder
    from layercut.checkpoints.writer import write_checkpoint
    from layercut.machine import reset_peak_rss

    # The configuration's module is an import, too: transformers loads it when it is first used.
    AutoConfig.from_pretrained(source)
    reset_peak_rss()
    before = peak_memory()
    plan = PruningPlan("benchmark", N_LAYERS, DROPPED, "given")
    start = time.perf_counter()
    with staged_folder(out, overwrite=False) as folder:
        write_checkpoint(source, read_layout(source), plan, WeightPatch({}, "none"), folder)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "memory": peak_memory() - before}))


def peak_memory() -> int:
    """VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def write_in_fresh_process(source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--write", str(source), str(out)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def copy_once(source: Path, out: Path) -> float:
    """Seconds of ``cp`` and an fsync of every file and of the folder."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for path in (*out.iterdir(), out):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work; default: the temporary folder")
    parser.add_argument("--write", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_once(*arguments.write)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        compare(Path(name))


def compare(folder: Path) -> None:
    source, out, copy = folder / "source", folder / "out", folder / "copy"
    source.mkdir()
    make_checkpoint(source)
    os.sync()  # or the first copies would wait for the source's own bytes
    tensors = read_stored_tensors(source).values()
    total, largest = (f(t.nbytes for t in tensors) for f in (sum, max))
    print(f"source: {total / MB:,.0f} MB, largest tensor {largest / MB:,.0f} MB")
    write_in_fresh_process(source, out)
    copy_once(out, copy)
    # The first round warmed the page cache. The order alternates: each leaves the disk some work.
    rounds = []
    for number in range(RUNS):
        shutil.rmtree(copy)
        copied = copy_once(out, copy) if number % 2 else 0.0
        shutil.rmtree(out)
        figures = write_in_fresh_process(source, out)
        rounds.append((figures["seconds"], copied or copy_once(out, copy), figures["memory"]))
    writes, copies, memories = zip(*rounds, strict=True)
    memory = max(memories)
    written = sum(path.stat().st_size for path in out.iterdir())
    ours, theirs = statistics.median(writes), statistics.median(copies)
    print(f"written: {written / MB:,.0f} MB; seconds {ours:.2f} (cp + fsync {theirs:.2f})")
    print("runs: " + ", ".join(f"{a:.2f}/{b:.2f}" for a, b in zip(writes, copies, strict=True)))
    allowed = 1.5 * largest + 100 * MB
    print(f"speed: {theirs / ours:.2f} x cp + fsync (goal 0.70)")
    print(f"memory above imports: {memory / MB:,.0f} MB (allowed {allowed / MB:,.0f} MB)")


if __name__ == "__main__":
    main()
