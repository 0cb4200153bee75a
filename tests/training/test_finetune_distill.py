"""Distillation as a term of fine-tuning: by hand, mixed with the labels, over choices alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from finetune_rows import ROWS, first_batch, settings
from layercut.data.tasks import TaskRow
from layercut.errors import DataError, LayercutError, RecipeError
from layercut.models.load import reload
from layercut.models.view import DecoderView
from layercut.recipe.finetune import DistillConfig
from layercut.training.finetune import build_trainer, check_rows, detach
from layercut.training.finetune_trainer import divergence


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
        distill = None if weight is None else DistillConfig(weight=weight, temperature=3)
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
    chosen = settings(distill=DistillConfig(weight=1))
    trainer = build_trainer(view, ROWS, chosen, output_dir=tmp_path, teacher=reload(view))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, first_batch(trainer)))
    detach(view, trainer)
    assert loss == pytest.approx(0, abs=1e-5)


def test_distilling_over_choices_sees_their_tokens_alone(view: DecoderView, tmp_path: Path):
    teacher = reload(view)
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(1.5)
    distill = DistillConfig(weight=1, temperature=1, over="choices")
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
        check_rows(view, rows, settings(distill=DistillConfig(over="choices")))


def test_the_divergence_has_the_gradient_of_its_formula():
    generator = torch.Generator().manual_seed(3)
    student, teacher = torch.randn(2, 4, 7, generator=generator)
    student.requires_grad_()
    divergence(student, teacher, 2).backward()
    found, student.grad = student.grad, None
    log_p, q = (student / 2).log_softmax(dim=-1), (teacher / 2).softmax(dim=-1)
    (4 * functional.kl_div(log_p, q, reduction="sum")).backward()
    torch.testing.assert_close(found, student.grad)
