"""The gradient record: against autograd, through real trainers, on one rank and two."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import layercut
from conftest import N_LAYERS
from layercut.gradients.log import GradientLog
from lora_runs import NAME, Reference, record_on_one_rank, tiny, trainer_of


@pytest.fixture
def recorded(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path) -> tuple[GradientLog, Reference]:
    log, reference = GradientLog(steps=4), Reference()
    trainer_of(tiny(tiny_llama), ids, tmp_path, log, reference).train()
    return log, reference


def test_three_lines_give_a_score_per_layer(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path):
    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path)
    log = layercut.GradientLog(steps=3)
    trainer.add_callback(log)
    trainer.train()
    scores = log.layer_scores()
    assert len(scores.values) == N_LAYERS
    assert all(v is not None and v > 0 for v in scores.values)


def test_names_are_those_of_the_base_models_linear_weights(
    recorded: tuple[GradientLog, Reference], tiny_llama: Path
):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    modules = dict(model.model.layers.named_modules())
    expected = {f"model.layers.{n}.weight" for n, m in modules.items() if isinstance(m, nn.Linear)}
    assert set(recorded[0].weights) == expected
    assert recorded[0].weights[NAME].layer == 2


@pytest.mark.parametrize("reduction", ["squared", "norm"])
def test_scores_equal_those_of_the_materialised_products(
    recorded: tuple[GradientLog, Reference], reduction: str
):
    log, reference = recorded
    expected = [0.0] * N_LAYERS
    for name, logged in log.weights.items():
        # G carries s² with s = alpha/rank = 8/2 = 4
        products = [product.double() / 16 for product in reference.products(name)]
        for product in products:
            square = float((product**2).sum())
            expected[logged.layer] += square / 4 if reduction == "squared" else math.sqrt(square)
    assert log.layer_scores(reduction).values == pytest.approx(expected, rel=1e-6)


def test_elementwise_is_the_mean_of_squared_products(recorded: tuple[GradientLog, Reference]):
    log, reference = recorded
    expected = torch.stack([(p / 16) ** 2 for p in reference.products(NAME)]).mean(0)
    built = log.elementwise(NAME)
    assert (built.dtype, built.shape) == (torch.float32, (16, 32))
    torch.testing.assert_close(built, expected, rtol=1e-5, atol=0)


def test_elementwise_adds_up_to_the_layer_score(recorded: tuple[GradientLog, Reference]):
    log, _ = recorded
    totals = [0.0] * N_LAYERS
    for name, logged in log.weights.items():
        totals[logged.layer] += float(log.elementwise(name).double().sum())
    assert log.layer_scores().values == pytest.approx(totals, rel=1e-5)


def test_recorded_gradients_are_the_clipped_ones(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    log = GradientLog(steps=1)
    trainer_of(tiny(tiny_llama), ids, tmp_path, log, max_grad_norm=1e-3).train()
    pairs = [log.factors(name) for name in log.weights]
    total = sum(float(f.double().square().sum()) for pair in pairs for f in pair)
    assert math.sqrt(total) == pytest.approx(1e-3, rel=1e-3)


def test_the_first_step_contributes_nothing(recorded: tuple[GradientLog, Reference]):
    a, b = recorded[0].factors(NAME)
    assert a.shape == (4, 2, 32)
    assert b.shape == (4, 16, 2)
    # B = 0 at the start, so no gradient reaches A.
    assert not a[0].any()
    assert a[1].any() and b[0].any()


def test_accumulated_gradients_are_those_of_the_whole_batch(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    logs = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        logs.append(GradientLog(steps=3))
        changes = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": accumulation,
        }
        # SGD: Adam's first steps have the size of the learning rate however small the gradient,
        # and so blow rounding up where a gradient vanishes.
        changes |= {"max_steps": 3, "optim": "sgd"}
        trainer_of(tiny(tiny_llama), ids, tmp_path, logs[-1], **changes).train()
    for name in logs[0].weights:
        for other in logs[1:]:
            for whole, parts in zip(logs[0].factors(name), other.factors(name), strict=True):
                assert float((whole - parts).norm()) <= 1e-5 * float(whole.norm())


@pytest.mark.parametrize(
    ("lora", "scaling"),
    [
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 2, "lora_alpha": 8, "alpha_pattern": {"down_proj": 6}}, 3.0),
    ],
)
def test_the_scaling_is_the_adapters_own(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path, lora: dict[str, Any], scaling: float
):
    log = GradientLog(steps=1)
    trainer_of(tiny(tiny_llama, **lora), ids, tmp_path, log).train()
    assert log.weights[NAME].scaling == scaling


def test_scores_do_not_depend_on_alpha(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path):
    # At step 2, ∇B ∝ s, B = −lr·∇B ∝ lr·s and ∇A ∝ s·B, so that ∇B·∇A ∝ lr·s³. With lr ∝ 1/s only
    # the s² remains that G is divided by.
    values = []
    for alpha in (2, 8):
        log = GradientLog(steps=2)
        changes = {"learning_rate": 1e-4 / alpha, "optim": "sgd", "lr_scheduler_type": "constant"}
        changes |= {"per_device_train_batch_size": 4, "max_grad_norm": 1e9}
        trainer_of(tiny(tiny_llama, lora_alpha=alpha), ids, tmp_path, log, **changes).train()
        values.append(log.layer_scores().values)
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_stop_ends_the_run_but_keeps_its_schedule(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    log = GradientLog(steps=2, stop=True)
    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path, log, max_steps=10, learning_rate=1.0)
    trainer.train()
    assert (trainer.state.global_step, log.n_steps) == (2, 2)
    # linear decay over the run's 10 steps, not over 2
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.8)


def test_without_stop_the_run_goes_on_and_later_steps_are_not_recorded(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    log, reference = GradientLog(fraction=0.3), Reference()
    trainer_of(tiny(tiny_llama), ids, tmp_path, log, reference, max_steps=5).train()
    # ⌈0.3 · 5⌉ = 2
    assert (log.n_steps, len(reference.steps)) == (2, 5)


def test_recording_does_not_change_the_training(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    states = []
    for callbacks in ((), (GradientLog(steps=4),)):
        model = tiny(tiny_llama)
        trainer_of(model, ids, tmp_path, *callbacks).train()
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_record_past_the_memory_limit_goes_to_an_unlinked_file(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    values = []
    for limit in (None, 0):
        log = GradientLog(steps=3, memory_limit_bytes=limit)
        trainer_of(tiny(tiny_llama), ids, tmp_path / "run", log).train()
        assert log.rows is not None
        assert log.rows.on_disk == (limit == 0)
        values.append(log.layer_scores().values)
    assert values[0] == values[1]
    assert not list(tmp_path.glob("layercut-spool-*"))


def test_a_trl_trainer_can_carry_it(tiny_llama: Path, tmp_path: Path):
    log, reference = GradientLog(steps=2, stop=True), Reference()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
        train_dataset=Dataset.from_list([{"prompt": "one plus", "completion": " two"}] * 4),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            dataloader_pin_memory=False,
            disable_tqdm=True,
        ),
        callbacks=[log, reference],
    )
    trainer.train()
    scale = log.weights[NAME].scaling ** 2
    expected = torch.stack([(p / scale) ** 2 for p in reference.products(NAME)]).mean(0)
    torch.testing.assert_close(log.elementwise(NAME), expected, rtol=1e-5, atol=0)
    assert len(log.layer_scores().values) == N_LAYERS


def test_layers_without_lora_have_no_score(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path):
    log = GradientLog(steps=3)
    model = tiny(tiny_llama, layers_to_transform=[0, 2], target_modules=["q_proj", "down_proj"])
    trainer_of(model, ids, tmp_path, log).train()
    assert [v is None for v in log.layer_scores().values] == [False, True, False, True, True, True]


def test_two_ranks_record_the_gradients_of_both_halves_of_the_batch(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(
        record_on_one_rank, (port, tiny_llama, ids, tmp_path), nprocs=2, join=True
    )
    log = GradientLog(steps=3)
    changes = {"per_device_train_batch_size": 4, "optim": "sgd"}
    trainer_of(tiny(tiny_llama), ids, tmp_path, log, **changes).train()
    for rank in range(2):
        recorded = torch.load(tmp_path / f"rank{rank}.pt")
        for name in log.weights:
            for whole, half in zip(log.factors(name), recorded[name], strict=True):
                assert float((whole - half).norm()) <= 1e-5 * float(whole.norm())
