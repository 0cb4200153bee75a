"""Models are timed in turns: the order, the medians, and what other work on the machine does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layercut.evaluation.speed import Speeds, add_speeds, measure_speeds, time_in_turns
from layercut.models.view import DecoderView
from layercut.results import Evaluation
from layercut.types import Median, take_median

SECONDS = {"dense": 10.0, "pruned": 8.0}


class Machine:
    """Models that take SECONDS on a clock of their own, and longer while other work runs."""

    def __init__(self, slowdown: Callable[[float, int], float]) -> None:
        self.now = 0.0
        self.worked: list[str] = []
        self.slowdown = slowdown

    def open(self, name: str) -> Any:
        return nullcontext(SimpleNamespace(name=name, device=torch.device("cpu")))

    def work(self, view: Any) -> int:
        slowdown = self.slowdown(self.now, len(self.worked))
        self.now += SECONDS[view.name] * slowdown
        self.worked.append(view.name)
        return 40

    def time(self) -> dict[str, tuple[float, ...]]:
        models = {name: lambda name=name: self.open(name) for name in SECONDS}
        return time_in_turns(models, self.work, lambda: self.now)


def change_on(machine: Machine) -> Median:
    speeds = {name: Speeds(prefill, ()) for name, prefill in machine.time().items()}
    evaluation = add_speeds(Evaluation(1, 1), speeds["pruned"], speeds["dense"])
    assert set(evaluation.speed_change) == {"prefill"}
    return evaluation.speed_change["prefill"]


def test_models_take_turns_and_the_warm_up_does_not_count():
    machine = Machine(lambda _, n: 100.0 if n < 2 else 1.0)
    speeds = machine.time()
    assert machine.worked == ["dense", "pruned"] * 8
    # 40 tokens in 10 s and in 8 s, seven rounds each.
    assert speeds == {"dense": (4.0,) * 7, "pruned": (5.0,) * 7}


def test_a_burst_of_other_work_during_one_timing_does_not_move_the_change():
    # The fourth round's dense model takes 20 times as long: alone it would make × 25.
    change = change_on(Machine(lambda _, n: 20.0 if n == 8 else 1.0))
    assert change == Median(1.25, (1.25, 1.25), 7)


def test_other_work_for_half_of_the_time_slows_both_models_alike():
    # Ten times slower from the fifth round on: both models' speeds fall, their ratio does not.
    machine = Machine(lambda _, n: 10.0 if n >= 10 else 1.0)
    assert change_on(machine) == Median(1.25, (1.25, 1.25), 7)
    assert Machine(machine.slowdown).time()["dense"] == (4.0,) * 4 + (0.4,) * 3


def test_a_median_leaves_out_the_extreme_round_at_either_end():
    assert take_median([5.0, 1.0, 4.0, 9.0, 3.0]) == Median(4.0, (3.0, 5.0), 5)
    assert take_median([2.0, 4.0]) == Median(3.0, (2.0, 4.0), 2)
    assert take_median([2.0]) == Median(2.0, (2.0, 2.0), 1)


@pytest.mark.parametrize(
    ("change", "clear"),
    [
        (Median(1.25, (1.2, 1.3), 7), True),
        (Median(0.8, (0.75, 0.85), 7), True),
        (Median(1.25, (0.9, 1.3), 7), False),  # 1 is within the spread
        (Median(1.25, (1.05, 1.35), 7), False),  # 0.30 wide, a change of 0.25
        (Median(0.07, (0.03, 1.1), 7), False),
    ],
)
def test_a_change_is_clear_beyond_its_spread_only(change: Median, clear: bool):
    assert change.is_clear_change() == clear


def test_each_model_is_timed_as_it_is_opened(view: DecoderView):
    seen: list[int] = []
    last = view.layers[-1].register_forward_hook(lambda *_: seen.append(len(view.skipped)))

    @contextmanager
    def without(*layers: int) -> Iterator[DecoderView]:
        with view.skipping(layers):
            yield view

    models = {"dense": without, "pruned": lambda: without(1, 2), "first": lambda: without(0)}
    speeds = measure_speeds(models)
    last.remove()
    assert set(seen) == {0, 1, 2}
    assert not view.skipped
    assert {name: len(own.prefill) for name, own in speeds.items()} == dict.fromkeys(models, 7)
    # Without layer 0 the library's cache does not know how many tokens it has seen.
    assert {name: len(own.decode) for name, own in speeds.items()} == {
        "dense": 7,
        "pruned": 7,
        "first": 0,
    }
    assert min(min(own.prefill) for own in speeds.values()) > 0
