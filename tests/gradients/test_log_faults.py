"""What the gradient record refuses, and how it says so."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from layercut.errors import ModelError, NumericsError, RecipeError
from layercut.gradients.log import GradientLog
from layercut.gradients.lora_weights import lora_weights
from lora_runs import NAME, Reference, tiny, trainer_of


@pytest.mark.parametrize("arguments", [{}, {"steps": 1, "fraction": 0.5}])
def test_steps_and_fraction_exclude_each_other(arguments: dict[str, Any]):
    with pytest.raises(RecipeError, match="either steps or fraction"):
        GradientLog(**arguments)


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"fraction": 0.0}, {"fraction": 1.5}])
def test_impossible_amounts_are_refused(arguments: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"GradientLog: (steps|fraction) is"):
        GradientLog(**arguments)


def test_a_model_without_lora_is_refused(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"no trainable LoRA weights: .* lora_A and lora_B"):
        trainer_of(model, ids, tmp_path, GradientLog(steps=1)).train()


def test_more_steps_than_the_run_has_are_refused_before_training(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    reference = Reference()
    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path, GradientLog(steps=5), reference)
    with pytest.raises(RecipeError, match="record 5 steps, but the run has only 4"):
        trainer.train()
    assert not reference.steps


class Spoil(TrainerCallback):
    """Breaks the gradient of one adapter at the third step."""

    def __init__(self, value: float | None) -> None:
        self.value = value

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            path = "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight"
            parameter = kwargs["model"].get_parameter(path)
            parameter.grad = None if self.value is None else parameter.grad * self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, r"B of model\.layers\.2\.mlp\.down_proj\.weight has no gradient at step 3"),
        (math.nan, r"model\.layers\.2\.mlp\.down_proj\.weight is not finite at step 3"),
        (math.inf, r"model\.layers\.2\.mlp\.down_proj\.weight is not finite at step 3"),
    ],
)
def test_broken_gradients_name_the_weight_and_the_step(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path, value: float | None, message: str
):
    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path, Spoil(value), GradientLog(steps=4))
    with pytest.raises(NumericsError, match=message):
        trainer.train()


def test_the_weight_whose_gradient_broke_is_named_though_clipping_breaks_all(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    model = tiny(tiny_llama)
    log = GradientLog(steps=4)
    seen: list[int] = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        seen.append(log.n_steps)
        return gradient * math.nan if log.n_steps == 2 else gradient

    path = "base_model.model.model.layers.2.mlp.down_proj.lora_B.default.weight"
    model.get_parameter(path).register_hook(spoil)
    with pytest.raises(NumericsError, match=r"of model\.layers\.2\.mlp\.down_proj\.weight is not"):
        trainer_of(model, ids, tmp_path, log).train()
    assert seen == [0, 1, 2]


def test_no_weight_is_named_when_nothing_tells_them_apart(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    class SpoilAll(TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad *= math.nan

    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path, SpoilAll(), GradientLog(steps=4))
    with pytest.raises(NumericsError, match="gradients of all weights are not finite at step 1"):
        trainer.train()


@pytest.mark.parametrize("steps", [2, 4])
def test_the_record_leaves_no_hook_behind(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path, steps: int
):
    model = tiny(tiny_llama)
    trainer_of(model, ids, tmp_path, GradientLog(steps=steps)).train()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_one_step_tells_no_layer_from_another(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path):
    log = GradientLog(steps=1)
    trainer_of(tiny(tiny_llama), ids, tmp_path, log).train()
    with pytest.raises(NumericsError, match="all gradient products of the first 1 steps are 0"):
        log.layer_scores()


def test_a_resumed_run_is_refused(tiny_llama: Path, ids: torch.Tensor, tmp_path: Path):
    changes = {"save_strategy": "steps", "save_steps": 2}
    trainer_of(tiny(tiny_llama), ids, tmp_path, **changes).train()
    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path, GradientLog(steps=1), **changes)
    with pytest.raises(RecipeError, match="resumes after step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("change", "message"), [("fp16", "fp16 loss scaling"), ("fsdp", "DeepSpeed or FSDP shard")]
)
def test_gradients_that_cannot_be_read_are_refused(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path, change: str, message: str
):
    trainer = trainer_of(tiny(tiny_llama), ids, tmp_path, GradientLog(steps=1))
    setattr(trainer.args, change, True)
    with pytest.raises(RecipeError, match=message):
        trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)


def test_reading_an_empty_record_is_refused():
    with pytest.raises(RecipeError, match="recorded no step yet"):
        GradientLog(steps=1).layer_scores()


def test_an_unknown_weight_is_refused_with_a_suggestion(
    tiny_llama: Path, ids: torch.Tensor, tmp_path: Path
):
    log = GradientLog(steps=1)
    trainer_of(tiny(tiny_llama), ids, tmp_path, log).train()
    with pytest.raises(RecipeError, match=r"did you mean 'model\.layers\.2\.mlp\.down_proj\.wei"):
        log.elementwise(NAME.replace("down", "dwon"))


def test_two_trainable_adapters_are_refused(tiny_llama: Path):
    model = tiny(tiny_llama, target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="2 trainable LoRA adapters: default, second"):
        lora_weights(model)
