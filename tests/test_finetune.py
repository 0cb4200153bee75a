"""Fine-tuning: its loss against transformers' own, its traces, resumption, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from conftest import save_tiny
from layercut.completion_trainer import SortedSteps, divergence
from layercut.data.tasks import TaskRow
from layercut.errors import DataError, LayercutError, ModelError, NumericsError, RecipeError
from layercut.finetune import build_trainer, check_rows, detach, n_steps, trained_names, tune
from layercut.finetune_settings import DistillSettings, FinetuneSettings
from layercut.models.load import load, reload
from layercut.models.view import DecoderView

ROWS = [
    TaskRow(f"{i} has {'an' if i % 3 else 'the'}", (" even", " odd"), i % 2, where=f"row {i}")
    for i in range(32)
]


def settings(**changes: Any) -> FinetuneSettings:
    chosen = {"batch_size": 4, "accumulation": 2, "epochs": 1, "max_length": 64} | changes
    return FinetuneSettings(**({"learning_rate": 1e-2, "save_steps": None} | chosen))


def state(view: DecoderView) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in view.model.state_dict().items()}


def changed(view: DecoderView, before: dict[str, torch.Tensor]) -> set[str]:
    after = view.model.state_dict()
    return {name for name in before if not torch.equal(before[name], after[name])}


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(next(iter(trainer.get_train_dataloader())))


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_changes_its_tensors_and_leaves_a_plain_model(view: DecoderView, mode: str):
    before = state(view)
    attributes, config = set(vars(view.model)), view.model.config.to_dict()
    tuning = tune(view, ROWS, settings(mode=mode, learning_rate=1e-3))
    assert (tuning.n_rows, tuning.n_steps, tuning.resumed_at) == (32, 4, 0)
    assert changed(view, before) == set(trained_names(view, settings(mode=mode)))
    assert len(changed(view, before)) == (7 * 6 if mode == "lora" else len(before))
    assert set(vars(view.model)) == attributes
    assert view.model.config.to_dict() == config
    assert not view.model.training
    assert not any(p.requires_grad or p.grad is not None for p in view.model.parameters())


def test_training_learns(view: DecoderView):
    rows = [TaskRow("x", ("a", "b"), 0), TaskRow("y", ("a", "b"), 1)] * 16
    assert tune(view, rows, settings(mode="full", epochs=15)).loss < 0.1


def test_two_runs_with_one_seed_are_equal_and_with_another_differ(view: DecoderView):
    twins = [reload(view) for _ in range(3)]
    for twin, seed in zip(twins, (1, 1, 2), strict=True):
        tune(twin, ROWS, settings(seed=seed))
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
    losses = [tune(view, rows, settings(learning_rate=1e-3)).loss for view in (exact, mixed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_divergence_by_hand():
    # T = 1, p = (1/2, 1/2), q = (3/4, 1/4): 3/4·ln(3/2) + 1/4·ln(1/2) = 0.130812
    student, teacher = torch.zeros(1, 2), torch.log(torch.tensor([[3.0, 1.0]]))
    assert divergence(student, teacher, 1).item() == pytest.approx(0.130812, rel=1e-5)
    # T = 2 halves the logits of q to odds √3 : 1, and multiplies by 4
    q = 3**0.5 / (1 + 3**0.5)
    by_hand = 4 * (
        q * torch.log(torch.tensor(2 * q)) + (1 - q) * torch.log(torch.tensor(2 - 2 * q))
    )
    assert divergence(student, teacher, 2).item() == pytest.approx(float(by_hand), rel=1e-5)


def test_distilling_mixes_the_labels_loss_with_the_divergence(view: DecoderView, tmp_path: Path):
    teacher = reload(view)
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(1.5)
    losses = []
    for weight in (None, 0.25, 1.0):
        distill = None if weight is None else DistillSettings(weight=weight, temperature=3)
        guide = None if weight is None else teacher
        chosen = settings(distill=distill)
        trainer = build_trainer(view, ROWS, chosen, output_dir=tmp_path, teacher=guide)
        with torch.no_grad():
            losses.append(float(trainer.compute_loss(trainer.model, first_batch(trainer))))
        detach(view, trainer)
    labels, mixed, term = losses
    assert mixed == pytest.approx(0.75 * labels + 0.25 * term, rel=1e-5)
    assert term > 0


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn(view: DecoderView, tmp_path: Path):
    chosen = settings(distill=DistillSettings(weight=1))
    trainer = build_trainer(view, ROWS, chosen, output_dir=tmp_path, teacher=reload(view))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, first_batch(trainer)))
    detach(view, trainer)
    assert loss == pytest.approx(0, abs=1e-5)


def test_distilling_over_choices_sees_their_tokens_alone(view: DecoderView, tmp_path: Path):
    teacher = reload(view)
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(1.5)
    distill = DistillSettings(weight=1, temperature=1, over="choices")
    chosen = settings(distill=distill)
    rows = [replace(row, prompt=f"{i}?", choices=("a", "b")) for i, row in enumerate(ROWS)]
    trainer = build_trainer(view, rows, chosen, output_dir=tmp_path, teacher=teacher)
    batch = first_batch(trainer)
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, dict(batch)))
        labelled = batch["labels"][:, 1:] != -100
        ids = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        tokens = [view.tokenizer(choice)["input_ids"][-1] for choice in ("a", "b")]
        student, guide = (
            model(**ids).logits[:, :-1][labelled][:, tokens].log_softmax(dim=-1)
            for model in (view.model, teacher.model)
        )
    detach(view, trainer)
    # KL(guide ‖ student) of two-way distributions, averaged over the labels.
    by_hand = (guide.exp() * (guide - student)).sum(dim=-1).mean()
    assert loss == pytest.approx(float(by_hand), rel=1e-4)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([TaskRow("x", ("a",))] * 8, DataError, "needs rows that share their choices"),
        (
            [TaskRow("x", ("a", "b"), i % 2) for i in range(8)] + [TaskRow("y", ("a", "c"), 0)],
            DataError,
            "needs rows that share their choices",
        ),
        (
            [TaskRow("x", ("a", " no such word"), i % 2) for i in range(8)],
            RecipeError,
            "choices of one token, but 'no such word' has",
        ),
    ],
)
def test_distilling_over_choices_needs_shared_choices_of_one_token(
    view: DecoderView, rows: list[TaskRow], error: type[LayercutError], message: str
):
    with pytest.raises(error, match=message):
        check_rows(view, rows, settings(distill=DistillSettings(over="choices")))


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
    assert tune(view, rows, settings(**chosen)).n_steps == expected


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
            {"distill": DistillSettings()},
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
        tune(view, rows, settings(**chosen))
    assert set(vars(view.model)) == attributes


def test_full_tuning_of_narrow_weights_is_refused(tiny_llama: Path):
    narrow = load(str(tiny_llama), dtype="bfloat16")
    with pytest.raises(RecipeError, match=r"lose its small steps in torch\.bfloat16 weights"):
        check_rows(narrow, ROWS, settings(mode="full"))
    check_rows(narrow, ROWS, settings())


def test_the_end_of_text_pads_where_nothing_else_does(view: DecoderView):
    view.tokenizer.pad_token = None
    with pytest.warns(UserWarning, match="has no padding token; the end-of-text token pads"):
        tune(view, ROWS, settings(max_steps=1))
    check_rows(view, ROWS, settings())  # without the warning, which the run gives
    view.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        check_rows(view, ROWS, settings())
    with pytest.raises(ModelError, match="neither a padding nor an end-of-text token"):
        tune(view, ROWS, settings(max_steps=1))


def test_a_loss_that_is_no_number_stops_the_run(view: DecoderView):
    view.model.lm_head.weight.data.fill_(float("inf"))
    with pytest.raises(NumericsError, match=r"the training loss is (nan|inf) at step 1\. Lower"):
        tune(view, ROWS, settings())
    assert not hasattr(view.model, "peft_config")


def test_tied_embeddings_stay_tied_through_full_tuning(tmp_path: Path):
    view = load(str(save_tiny(tmp_path / "tied", tie_word_embeddings=True)), dtype="float32")
    tune(view, ROWS, settings(mode="full", max_steps=1))
    head, embedding = view.model.get_output_embeddings(), view.model.get_input_embeddings()
    assert head.weight is embedding.weight
