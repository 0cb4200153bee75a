"""What changes a model in place is seen, whichever way it is done; what only reads it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from conftest import plan_of
from layercut.comparison.intact import IntactModel
from layercut.models.view import DecoderView
from layercut.types import CalibrationBatches


def by_no_grad(weight: Parameter) -> None:
    with torch.no_grad():
        weight.add_(1e-3)


def by_inference_mode(weight: Parameter) -> None:
    with torch.inference_mode():
        weight.mul_(-1)


def by_one_number(weight: Parameter) -> None:
    with torch.no_grad():
        weight[1, 1] = 5


def by_data(weight: Parameter) -> None:
    weight.data.mul_(1.001)


def by_permuted_rows(weight: Parameter) -> None:
    weight.data.copy_(weight.data.flip(0).clone())


def by_other_data(weight: Parameter) -> None:
    weight.data = weight.data + 1


def by_numpy(weight: Parameter) -> None:
    weight.detach().numpy()[:] *= 2


FAULTS = [by_no_grad, by_inference_mode, by_one_number, by_data, by_permuted_rows]
FAULTS += [by_other_data, by_numpy]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_quick_check_sees_a_change_in_place(
    view: DecoderView, fault: Callable[[Parameter], None]
) -> None:
    intact = IntactModel(view)
    fault(view.layers[3].mlp.down_proj.weight)
    assert not intact.is_same()


def test_another_parameter_in_its_place_is_a_change(view: DecoderView) -> None:
    intact = IntactModel(view)
    weight = view.layers[0].mlp.down_proj.weight
    view.layers[0].mlp.down_proj.weight = Parameter(2 * weight.detach())
    assert not intact.is_same()


def test_one_number_that_no_counter_tells_of_is_seen_by_the_whole_check(view: DecoderView) -> None:
    weight = view.model.lm_head.weight  # 4,144 numbers, of which every fifth is sampled
    intact = IntactModel(view)
    weight.data[0, 1] += 1
    assert intact.is_same()
    assert not intact.is_same_throughout()


def test_an_undone_change_and_reading_are_none(
    view: DecoderView, batches: CalibrationBatches
) -> None:
    intact = IntactModel(view)
    weight = view.layers[2].mlp.down_proj.weight
    before = weight.detach().clone()
    by_no_grad(weight)
    assert not intact.is_same()
    with torch.no_grad():
        weight.copy_(before)
    assert intact.is_same()
    with view.skipping(plan_of(1, 2).dropped):
        view.token_losses(batches.input_ids)
    assert intact.is_same()
    assert intact.is_same_throughout()
