"""Fine-tuning: its loss against transformers' own, its traces, resumption, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from conftest import save_tiny
from finetune_rows import ROWS, first_batch, settings
from layercut.data.tasks import TaskRow
from layercut.errors import DataError, LayercutError, ModelError, NumericsError, RecipeError
from layercut.models.load import load, reload
from layercut.models.view import DecoderView
from layercut.recipe.finetune import DistillConfig
from layercut.training.finetune import (
    build_trainer,
    check_rows,
    detach,
    finetune,
    n_steps,
    trained_names,
)
from layercut.training.finetune_trainer import SortedSteps


def state(view: DecoderView) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in view.model.state_dict().items()}


def changed(view: DecoderView, before: dict[str, torch.Tensor]) -> set[str]:
    after = view.model.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_changes_its_tensors_and_leaves_a_plain_model(view: DecoderView, mode: str):
    before = state(view)
    attributes, config = set(vars(view.model)), view.model.config.to_dict()
    tuning = finetune(view, ROWS, settings(mode=mode, learning_rate=1e-3))
    assert (tuning.n_rows, tuning.n_steps, tuning.resumed_at) == (32, 4, 0)
    assert changed(view, before) == set(trained_names(view, settings(mode=mode)))
    assert len(changed(view, before)) == (7 * 6 if mode == "lora" else len(before))
    assert set(vars(view.model)) == attributes
    assert view.model.config.to_dict() == config
    assert not view.model.training
    assert not any(p.requires_grad or p.grad is not None for p in view.model.parameters())


def test_training_learns(view: DecoderView):
    rows = [TaskRow("x", ("a", "b"), 0), TaskRow("y", ("a", "b"), 1)] * 16
    assert finetune(view, rows, settings(mode="full", epochs=15)).loss < 0.1


def test_two_runs_with_one_seed_are_equal_and_with_another_differ(view: DecoderView):
    twins = [reload(view) for _ in range(3)]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        finetune(twin, ROWS, settings(seed=seed))
    assert not changed(twins[0], state(twins[1]))
    assert changed(twins[0], state(twins[2]))


def test_the_loss_is_that_of_the_completion_alone(view: DecoderView, tmp_path: Path):
    trainer = build_trainer(view, ROWS, settings(), output_dir=tmp_path)
    batch = first_batch(trainer)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch)
        expected = trainer.model(**batch, use_cache=False).loss
    torch.testing.assert_close(loss, expected)
    detach(view, trainer)


def test_batches_of_a_step_give_the_gradient_of_the_step(view: DecoderView, tmp_path: Path):
    class Gradients(TrainerCallback):
        def __init__(self) -> None:
            self.found: list[dict[str, torch.Tensor]] = []

        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            self.found.append(found)

    runs, losses = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        log = Gradients()
        # Rows of unlike completions: a mean of batch means would weigh their tokens wrongly.
        rows = [TaskRow(f"row {i}", ("ab" * (1 + i % 5),)) for i in range(8)]
        chosen = settings(batch_size=batch_size, accumulation=accumulation)
        trainer = build_trainer(view, rows, chosen, output_dir=tmp_path, callbacks=[log])
        trainer.args.max_grad_norm = 1e9  # clipping would hide a wrong scale
        trainer.train()
        detach(view, trainer)
        runs.append(log.found[0])
        losses.append(trainer.state.log_history[0]["loss"])
    assert len(runs[0]) == 2 * 7 * 6
    for name, gradient in runs[0].items():
        torch.testing.assert_close(runs[1][name], gradient, rtol=1e-4, atol=1e-6)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_detaching_without_merging_gives_back_the_very_weights(view: DecoderView, tmp_path: Path):
    before = state(view)
    trainer = build_trainer(view, ROWS, settings(), output_dir=tmp_path)
    trainer.train()
    detach(view, trainer)
    assert not changed(view, before)


def test_mixed_precision_trains_close_to_float32(tiny_llama: Path):
    exact, mixed = load(str(tiny_llama), dtype="float32"), load(str(tiny_llama))
    mixed.mixed_precision = True
    rows = ROWS * 4
    losses = [finetune(view, rows, settings(learning_rate=1e-3)).loss for view in (exact, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_a_step_is_a_random_draw_cut_into_rows_of_like_length():
    lengths = [5, 1, 4, 2, 3, 9, 8, 7]
    sampler = SortedSteps(lengths, 4, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(8))
    for step in (order[:4], order[4:]):
        found = [lengths[row] for row in step]
        assert found == sorted(found, reverse=True)
    sampler.set_epoch(1)
    assert {*order[:4]} != {*list(sampler)[:4]}
    sampler.set_epoch(0)
    assert list(sampler) == order


@pytest.mark.parametrize(
    ("chosen", "n_rows", "expected"),
    # 33 rows in steps of 8 are 5 steps, the last one short; 2.5 epochs are 12.5, rounded up.
    [({}, 32, 4), ({}, 33, 5), ({"epochs": 2.5}, 33, 13), ({"max_steps": 7}, 33, 7)],
)
def test_steps_are_counted_as_the_trainer_counts_them(
    view: DecoderView, chosen: dict[str, Any], n_rows: int, expected: int
):
    rows = (ROWS * 2)[:n_rows]
    assert n_steps(settings(**chosen), n_rows) == expected
    assert finetune(view, rows, settings(**chosen)).n_steps == expected


@pytest.mark.parametrize(
    ("rows", "chosen", "error", "message"),
    [
        (
            ROWS[:7],
            {},
            DataError,
            r"7 training row\(s\) are fewer than one step's 8 \(batch_size 4",
        ),
        (ROWS[::2], {}, DataError, "no training row has the answer 'odd'"),
        (
            [*ROWS, TaskRow("a", ("b" * 70, "c"), where="row 32")],
            {},
            DataError,
            "row 32: the completion has 70 tokens, which do not fit into 64",
        ),
        (
            ROWS,
            {"max_length": 512},
            RecipeError,
            "max_length is 512, but the model's context is 128",
        ),
        (ROWS, {"report_to": "trackio"}, RecipeError, r'pip install "layercut\[trackio\]"'),
        (
            ROWS,
            {"distill": DistillConfig()},
            RecipeError,
            "distill and a teacher model go together",
        ),
    ],
)
def test_impossible_runs_are_refused_before_they_begin(
    view: DecoderView,
    rows: list[TaskRow],
    chosen: dict[str, Any],
    error: type[LayercutError],
    message: str,
):
    attributes = set(vars(view.model))
    with pytest.raises(error, match=message):
        finetune(view, rows, settings(**chosen))
    assert set(vars(view.model)) == attributes


def test_full_tuning_of_narrow_weights_is_refused(tiny_llama: Path):
    narrow = load(str(tiny_llama), dtype="bfloat16")
    with pytest.raises(RecipeError, match=r"lose its small steps in torch\.bfloat16 weights"):
        check_rows(narrow, ROWS, settings(mode="full"))
    check_rows(narrow, ROWS, settings())


def test_the_end_of_text_pads_where_nothing_else_does(view: DecoderView):
    view.tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="has no padding token; the end-of-text token pads"):
        finetune(view, ROWS, settings(max_steps=1))
    check_rows(view, ROWS, settings())  # without the warning, which the run gives
    view.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        check_rows(view, ROWS, settings())
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        finetune(view, ROWS, settings(max_steps=1))


def test_a_loss_that_is_no_number_stops_the_run(view: DecoderView):
    view.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(NumericsError, match=r"the training loss is (nan|inf) at step 1\. Lower"):
        finetune(view, ROWS, settings())
    assert not hasattr(view.model, "peft_config")


def test_tied_embeddings_stay_tied_through_full_tuning(tmp_path: Path):
    view = load(str(save_tiny(tmp_path / "tied", tie_word_embeddings=True)), dtype="float32")
    finetune(view, ROWS, settings(mode="full", max_steps=1))
    head, embedding = view.model.get_output_embeddings(), view.model.get_input_embeddings()
    assert head.weight is embedding.weight
