"""The loss of a heal against autograd of the full logits, and against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from conftest import plan_of, save_tiny
from layercut.models.load import load, reload
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.training import distillation_loss
from layercut.training.distillation_loss import Divergence, chunk_loss


def naive(student: torch.Tensor, dense: torch.Tensor, ids: torch.Tensor, t: float, w: float):
    """The loss in PyTorch's own words, over all logits at once."""
    p, q = ((z / t).log_softmax(-1).flatten(0, 1) for z in (student, dense))
    divergence = functional.kl_div(p, q, reduction="batchmean", log_target=True)
    labels = functional.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return (1 - w) * t**2 * divergence + w * labels


@pytest.mark.parametrize(
    ("temperature", "label_weight"), [(1.0, 0.0), (2.0, 0.0), (1.0, 0.3), (0.5, 0.7), (1.0, 1.0)]
)
def test_loss_and_gradient_are_those_of_the_full_logits(
    view: DecoderView,
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    temperature: float,
    label_weight: float,
):
    monkeypatch.setattr(distillation_loss, "CHUNK", 7)  # which divides nothing here
    student = reload(view)
    apply(student, plan_of(2, 3))
    weight = student.model.get_parameter("model.layers.1.mlp.up_proj.weight").requires_grad_()
    divergence = Divergence(student, view, temperature, label_weight)
    loss = divergence(ids, divergence.compute_teacher_states(ids))
    loss.backward()
    found, weight.grad = weight.grad, None
    logits = student.model(ids, use_cache=False).logits
    expected = naive(logits, view.model(ids).logits, ids, temperature, label_weight)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, weight.grad)


def test_models_that_scale_or_cap_their_logits_are_followed(tmp_path, ids: torch.Tensor):
    view = load(str(save_tiny(tmp_path, "gemma2", sliding_window=16)), dtype="float32")
    student = reload(view)
    weight = student.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight.mul_(1.5)
    weight.requires_grad_()
    divergence = Divergence(student, view)
    divergence(ids, divergence.compute_teacher_states(ids)).backward()
    found, weight.grad = weight.grad, None
    naive(student.model(ids).logits, view.model(ids).logits, ids, 1.0, 0.0).backward()
    torch.testing.assert_close(found, weight.grad)


def test_a_chunk_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(q‖p) = ¼ log ½ + ¾ log 3⁄2; its gradient p − q = (¼, −¼).
    # The label is 0: loss log 2, gradient p − (1, 0) = (−½, ½). Weights 2 and 4.
    logits, dense = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
    loss, gradient = chunk_loss(logits, dense, torch.tensor([0]), 1.0, (2.0, 4.0))
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert float(loss) == pytest.approx(2 * kl + 4 * math.log(2))
    torch.testing.assert_close(gradient, torch.tensor([[2 * 0.25 - 4 * 0.5, -2 * 0.25 + 4 * 0.5]]))


def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(
    view: DecoderView, ids: torch.Tensor
):
    student = reload(view)
    weight = student.model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_()
    divergence = Divergence(student, view)
    loss = divergence(ids, divergence.compute_teacher_states(ids))
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert weight.grad is not None
    assert float(weight.grad.abs().max()) < 1e-6


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    loss, gradient = chunk_loss(logits, -logits, torch.tensor([-1]), 1.0, (1.0, 0.0))
    assert float(loss) == pytest.approx(2e4)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0, 0.0]]))
