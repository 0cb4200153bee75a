"""Tiny LoRA runs, and an independent record of their gradients."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from layercut.gradients.log import GradientLog, LoggedWeight
from layercut.gradients.lora_weights import layer_of
from layercut.spool import Spool

NAME = "model.layers.2.mlp.down_proj.weight"


def tiny(folder: Path, **lora: Any) -> nn.Module:
    """The tiny model with LoRA on every linear sub-layer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**(settings | lora)))


def rows(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(
    model: nn.Module, ids: torch.Tensor, folder: Path, *callbacks: TrainerCallback, **changes: Any
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 0.01,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**(settings | changes))
    return Trainer(model=model, args=arguments, train_dataset=rows(ids), callbacks=list(callbacks))


def record_on_one_rank(rank: int, port: int, model: Path, ids: torch.Tensor, folder: Path) -> None:
    """The target of a spawned process: it lives here because a test file cannot be imported."""
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in environment.items()})
    os.environ["MASTER_ADDR"] = "localhost"
    log = GradientLog(steps=3)
    trainer_of(tiny(model), ids, folder, log, optim="sgd", ddp_backend="gloo").train()
    torch.save({name: log.factors(name) for name in log.weights}, folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


class Reference(TrainerCallback):
    """An independent record: copies of the gradients, found by their parameters' names."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.steps.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    def products(self, name: str) -> list[torch.Tensor]:
        path = "base_model.model." + name.removesuffix(".weight")
        return [
            step[f"{path}.lora_B.default.weight"] @ step[f"{path}.lora_A.default.weight"]
            for step in self.steps
        ]


def planted_log(
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]], n_layers: int
) -> GradientLog:
    """A record as if a trainer had made it: name → ∇A (steps, rank, in), ∇B (steps, out, rank)."""
    n_steps = len(next(iter(factors.values()))[0])
    log = GradientLog(steps=n_steps)
    log.n_steps, log.n_layers = n_steps, n_layers
    width = 0
    for name, (a, b) in factors.items():
        logged = LoggedWeight(layer_of(name), 1.0, tuple(a.shape[1:]), tuple(b.shape[1:]), width)
        log.weights[name] = logged
        width = logged.span_b.stop
    rows = [torch.cat([a.flatten(1), b.flatten(1)], dim=1) for a, b in factors.values()]
    log.rows = Spool(n_steps, width)
    log.rows.write(0, torch.cat(rows, dim=1))
    return log
