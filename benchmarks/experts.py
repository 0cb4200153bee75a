"""Whether a refit helps mixtures of experts: two toy models, trained until their routing matters.

Run  python benchmarks/experts.py [--steps 400] [--plans 10] [--drop 2] [--tokens 32768]
         [--models mixtral qwen3_moe]
Trains a model of 8 experts (2 for each token) and one of 128 (8) on bytes of the embedded docs,
then refits random plans, as the default recipe does, on windows that it has not seen. Prints, for
each plan, the cross-entropy on yet others without and with the refit, and what every block of
experts got; writes benchmarks/results/experts.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import layercut
from layercut.engine.loss import mean_loss
from layercut.machine import provenance
from layercut.models.load import load
from layercut.recovery.fit import fit
from layercut.types import CalibrationBatches, PruningPlan

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "vocab_size": 259,
    "hidden_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96},
    "qwen3_moe": {
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 24,
        "intermediate_size": 96,
        "norm_topk_prob": True,
    },
}
SEQ_LEN = 128
TRAINED, JUDGED = 2048, 64
"""Sequences of training and of judging; the calibration text lies between them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--drop", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    origin = provenance("benchmarks/experts.py")
    path = RESULTS / "experts.json"
    rows = json.loads(path.read_text())["models"] if path.exists() else {}
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(name, Path(folder), arguments)
        content = {"versions": origin.versions, "hardware": origin.hardware, "models": rows}
        path.write_text(json.dumps(content, indent=2) + "\n")


def measure(name: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model, drop random layers, and refit."""
    tokenizer = byte_tokenizer()
    n_calibration = arguments.tokens // SEQ_LEN
    section = {
        "data": "embedded:docs",
        "n_sequences": TRAINED + n_calibration + JUDGED,
        "seq_len": SEQ_LEN,
    }
    text = layercut.calibration_batches(section, tokenizer).input_ids
    text = text[torch.randperm(len(text), generator=torch.Generator().manual_seed(1))]
    trained, calibration, judged = text.split((TRAINED, n_calibration, JUDGED))
    loss = train(name, trained, arguments.steps, folder)
    tokenizer.save_pretrained(folder)
    view = load(str(folder), dtype="float32")
    batches = CalibrationBatches(calibration, 8, 16, "embedded:docs", "")
    dense = mean_loss(view, judged, 16)
    print(f"{name}: trained to {loss:.3f}, {dense:.3f} nats a byte on windows not seen", flush=True)
    generator = torch.Generator().manual_seed(0)
    plans = []
    for _ in range(arguments.plans):
        order = torch.randperm(view.n_layers - 1, generator=generator) + 1
        dropped = tuple(sorted(order[: arguments.drop].tolist()))
        plan = PruningPlan(view.name, view.n_layers, dropped, "random")
        start = time.perf_counter()
        patch = fit(view, plan, None, batches, method="refit")
        seconds = time.perf_counter() - start
        with view.skipping(plan.dropped):
            without = mean_loss(view, judged, 16)
            with view.patched(patch.tensors):
                repaired = mean_loss(view, judged, 16)
        experts = patch.notes.get("experts", [])
        plans.append(
            {
                "dropped": dropped,
                "without": without,
                "with": repaired,
                "seconds": seconds,
                "experts": experts,
            }
        )
        fitted, blocks = sum(block["fitted"] for block in experts), len(experts)
        print(
            f"  {dropped}: {without:.3f} → {repaired:.3f}, {seconds:.0f} s, "
            f"{fitted} experts in {blocks} blocks fitted one by one",
            flush=True,
        )
    better = sum(plan["with"] < plan["without"] for plan in plans)
    print(f"  lower in {better} of {len(plans)}", flush=True)
    return {"dense": dense, "steps": arguments.steps, "lower": better, "plans": plans}


def train(name: str, text: torch.Tensor, n_steps: int, folder: Path) -> float:
    """Write a model that was trained on sequences drawn from ``text``; returns its last loss."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **MODELS[name], output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=n_steps)
    losses = []
    for _ in range(n_steps):
        ids = text[torch.randint(len(text), (16,))]
        loss = model(input_ids=ids, labels=ids).loss  # with the auxiliary loss that spreads tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    return sum(losses[-20:]) / len(losses[-20:])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<bos>": 1, "<pad>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


if __name__ == "__main__":
    main()
