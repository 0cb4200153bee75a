"""A model whose layers are read from their files, through the whole default pipeline.

Run  python benchmarks/streaming.py [--shape 1B --layers 8] [--sequences 16] [--seq-len 128]
         [--drop 2] [--residency streamed resident] [--keep FOLDER]
Writes a checkpoint of the shape with planted damage, runs `layercut.run` on it in a process of its
own per residency, and samples that process's memory (RssAnon + RssShmem, less what the imports
take). The unit "×" is a plain forward pass over the calibration tokens, timed in the same process.

The planted model predicts each token's successor, so that text can be written for it without
running it. Every second layer takes back what the layer before it has added, as far as it sees it:
without either, what is left of the other is a damage that a refit can undo.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from engine import RESULTS, SHAPES

WORDS = 512
"""Tokens that the text uses; the vocabulary has as many more as the shape says."""
SHARD_LAYERS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--drop", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--residency", nargs="+", default=["streamed", "resident"])
    parser.add_argument("--keep", type=Path, help="a folder for the checkpoint, used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.keep and arguments.keep.parent) as scratch:
        source = arguments.keep or Path(scratch) / "model"
        text = Path(scratch) / "text.txt"
        if not (source / "config.json").exists():
            write_planted_model(source, arguments.shape, arguments.layers)
        write_text(text, n_tokens=40 * arguments.sequences * arguments.seq_len)
        rows = {}
        for residency in arguments.residency:
            output = Path(scratch) / f"output-{residency}"
            rows[residency] = run_alone(arguments, residency, source, text, output)
            print(json.dumps(rows[residency], indent=2), flush=True)
            shutil.rmtree(output)
    path = RESULTS / f"streaming-{arguments.shape}-{arguments.layers}.json"
    path.write_text(json.dumps(rows, indent=2) + "\n")


def write_planted_model(folder: Path, shape: str, n_layers: int) -> None:
    """A bfloat16 checkpoint in shards of a few layers; never whole in memory."""
    sizes = SHAPES[shape]
    config = LlamaConfig(
        num_hidden_layers=n_layers,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        **sizes,
    )
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    width = sizes["hidden_size"]
    embedding = draw(generator, sizes["vocab_size"], width, width**0.5)
    successor = torch.roll(embedding, 1, 0)  # the row of token t + 1 looks for t's embedding
    shards = {
        "model-rest.safetensors": {
            "model.embed_tokens.weight": embedding,
            "model.norm.weight": torch.ones(width).bfloat16(),
            "lm_head.weight": (successor * (8 / width)).bfloat16(),
        }
    }
    index: dict[str, str] = {}
    layer: dict[str, torch.Tensor] = {}
    for number in range(n_layers):
        layer = draw_layer(generator, sizes, undo=layer if number % 2 else None)
        shard = shards.setdefault(f"model-{number // SHARD_LAYERS:03d}.safetensors", {})
        shard |= {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
        if number % SHARD_LAYERS == SHARD_LAYERS - 1 or number == n_layers - 1:
            while shards:
                name, tensors = shards.popitem()
                save_file(tensors, folder / name, {"format": "pt"})
                index |= dict.fromkeys(tensors, name)
    content = {"metadata": {}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def draw(generator: torch.Generator, out: int, size: int, scale: float) -> torch.Tensor:
    """A random map (out, size) whose outputs are ``scale`` times as large as its inputs."""
    drawn: torch.Tensor = torch.randn(out, size, generator=generator) * scale * size**-0.5
    return drawn.bfloat16()


def draw_layer(
    generator: torch.Generator, sizes: dict[str, int], undo: dict[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """A random layer, or one whose MLP takes back what that of the layer ``undo`` adds."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    keys = width // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    layer = {
        "self_attn.q_proj.weight": draw(generator, width, width, 1),
        "self_attn.k_proj.weight": draw(generator, keys, width, 1),
        "self_attn.v_proj.weight": draw(generator, keys, width, 1),
        "self_attn.o_proj.weight": draw(generator, width, width, 0.3),
        "mlp.gate_proj.weight": draw(generator, inner, width, 1),
        "mlp.up_proj.weight": draw(generator, inner, width, 1),
        "mlp.down_proj.weight": draw(generator, width, inner, 1),
        "input_layernorm.weight": torch.ones(width).bfloat16(),
        "post_attention_layernorm.weight": torch.ones(width).bfloat16(),
    }
    if undo is not None:
        for part in ("gate", "up"):
            layer[f"mlp.{part}_proj.weight"] = undo[f"mlp.{part}_proj.weight"].clone()
        layer["mlp.down_proj.weight"] = -undo["mlp.down_proj.weight"]
    return layer


def write_text(path: Path, n_tokens: int) -> None:
    """Lines of words, most followed by their successor."""
    generator = torch.Generator().manual_seed(1)
    jumps = torch.rand(n_tokens, generator=generator) < 0.2
    starts = torch.randint(WORDS, (n_tokens,), generator=generator)
    words, word = [], 0
    for jump, start in zip(jumps.tolist(), starts.tolist(), strict=True):
        word = start if jump else (word + 1) % WORDS
        words.append(f"w{word}")
    path.write_text(" ".join(words))


def run_alone(
    arguments: argparse.Namespace, residency: str, source: Path, text: Path, output: Path
) -> dict[str, Any]:
    """One run in a new process, whose memory is its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (vars(arguments), residency, source, text, output))


class MemorySampler(threading.Thread):
    """The highest RssAnon + RssShmem of this process, looked at every 50 ms, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = 0
        self.ended = threading.Event()

    def run(self) -> None:
        """Look until it is told to end."""
        while not self.ended.wait(0.05):
            self.highest = max(self.highest, read_memory())


def read_memory() -> int:
    """RssAnon + RssShmem of this process now, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    return 1024 * sum(int(values[key].split()[0]) for key in ("RssAnon", "RssShmem"))


def measure(
    options: dict[str, Any], residency: str, source: Path, text: Path, output: Path
) -> dict[str, Any]:
    """Forward passes, then the whole run, with the memory that both take."""
    import layercut
    from layercut.engine.loss import mean_loss

    torch.set_num_threads(options["threads"])
    imports = read_memory()
    sampler = MemorySampler()
    sampler.start()
    calibration = {
        "data": str(text),
        "n_sequences": options["sequences"],
        "seq_len": options["seq_len"],
    }
    view = layercut.load(str(source), dtype=options["dtype"], residency=residency)
    batches = layercut.calibration_batches(calibration, view.tokenizer)
    forward = []
    for _ in range(3):
        start = time.perf_counter()
        loss = mean_loss(view, batches.input_ids, batches.micro_batch)
        forward.append(time.perf_counter() - start)
    sizes = {"layer": 0, "rest": 0}
    if view.source is not None:
        rest = (p for n, p in view.model.named_parameters() if not view.source.is_layers(n))
        sizes = {
            "layer": view.source.bytes_of_layer,
            "rest": sum(p.numel() * p.element_size() for p in rest),
        }
    del view
    recipe = {
        "model": str(source),
        "dtype": options["dtype"],
        "residency": residency,
        "calibration": calibration,
        "selection": {"drop_layers": options["drop"]},
        "evaluation": {"text": {"text": str(text)}, "seq_len": 128, "max_tokens": 1024},
    }
    start = time.perf_counter()
    result = layercut.run(recipe, output)
    seconds = time.perf_counter() - start
    sampler.ended.set()
    unit = statistics.median(forward)
    return {
        "forward_seconds": forward,
        "run_seconds": seconds,
        "forward_passes": seconds / unit,
        "stage_forward_passes": {name: s / unit for name, s in result.seconds.items()},
        "dense_loss": loss,
        "dropped": list(result.plan.dropped) if result.plan else None,
        "recovery": result.recovery,
        "perplexity": {n: s.perplexity["text"].value for n, s in result.stages.items()},
        "memory_bytes": sampler.highest - imports,
        "layer_bytes": sizes["layer"],
        "rest_bytes": sizes["rest"],
    }


if __name__ == "__main__":
    main()
