"""A heal of a tiny pruned model: what it keeps, what it leaves, when it ends, what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from conftest import VOCABULARY, plan_of, save_tiny
from layercut.errors import DataError, NumericsError, OutputError, RecipeError
from layercut.models.load import load, reload
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.recipe.heal import HealConfig
from layercut.training.distillation_loss import Divergence
from layercut.training.heal import bfloat16_weights, heal
from layercut.training.heal_trainer import rate
from layercut.training.lora_adapters import adapted_names
from training_clock import Clock

SETTINGS = HealConfig(
    steps=12, batch_size=2, held_out=2, evaluations=4, learning_rate=3e-3, save_steps=2
)


@pytest.fixture
def pruned(view: DecoderView) -> DecoderView:
    student = reload(view)
    apply(student, plan_of(2, 3))
    return student


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (26, 16), generator=generator)


def with_settings(**changes: Any) -> HealConfig:
    return HealConfig(**(SETTINGS.model_dump(exclude_unset=True) | changes))


def state_of(view: DecoderView) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in view.model.state_dict().items()}


def changed(view: DecoderView, before: dict[str, torch.Tensor]) -> set[str]:
    after = view.model.state_dict()
    assert after.keys() == before.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


class Interrupt(TrainerCallback):
    """Ctrl-C in the eighth step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt


def test_a_heal_brings_the_student_nearer_and_changes_linear_weights_alone(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor
):
    before, dense = state_of(pruned), state_of(view)
    healing = heal(pruned, view, windows, SETTINGS)
    assert healing.loss_after < healing.loss_before
    assert (healing.n_steps, healing.n_windows, healing.resumed_at) == (12, 24, 0)
    assert healing.n_tokens == 12 * 2 * 16
    assert [step for step, _ in healing.losses] == [0, 3, 6, 9, 12]
    assert changed(pruned, before) == set(adapted_names(pruned))
    assert not changed(view, dense)
    assert not any(p.requires_grad for p in pruned.model.parameters())
    # The held-out loss is of the weights that were kept, on windows 0 and 13.
    divergence, held_out = Divergence(pruned, view), windows[[0, 13]]
    loss = float(divergence(held_out, divergence.compute_teacher_states(held_out)))
    assert loss == pytest.approx(healing.loss_after, rel=1e-4)


def test_the_best_weights_are_kept_where_later_ones_are_worse(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    # The learning rate is right for the first half and far too high after it.
    monkeypatch.setattr(
        "layercut.training.heal_trainer.rate", lambda share, _: 1 if share < 0.5 else 200
    )
    chosen = with_settings(patience=2)
    healing = heal(pruned, view, windows, chosen)
    losses = dict(healing.losses)
    assert 0 < healing.best_step < healing.n_steps
    assert healing.loss_after == min(losses.values()) < losses[max(losses)]
    divergence, held_out = Divergence(pruned, view), windows[[0, 13]]
    loss = float(divergence(held_out, divergence.compute_teacher_states(held_out)))
    assert loss == pytest.approx(healing.loss_after, rel=1e-4)


def test_weights_that_nothing_improves_stay_as_they_are(view: DecoderView, windows: torch.Tensor):
    student = reload(view)  # as good as its teacher
    before = state_of(student)
    chosen = with_settings(learning_rate=0.5, patience=1, warmup_ratio=0.0)
    with pytest.warns(UserWarning, match="never lowered the held-out loss; the weights stay"):
        healing = heal(student, view, windows, chosen)
    assert healing.stopped_early
    assert (healing.best_step, healing.n_steps) == (0, 3)
    assert healing.loss_after == healing.loss_before
    assert not changed(student, before)


def test_an_interrupted_heal_goes_on_to_the_same_weights(
    view: DecoderView, windows: torch.Tensor, tmp_path: Path
):
    whole, cut = reload(view), reload(view)
    for student in (whole, cut):
        apply(student, plan_of(2, 3))
    before = state_of(cut)
    expected = heal(whole, view, windows, SETTINGS, work_dir=None)
    with pytest.raises(KeyboardInterrupt):
        heal(cut, view, windows, SETTINGS, work_dir=tmp_path / "w", callbacks=[Interrupt()])
    assert not changed(cut, before)
    found = heal(cut, view, windows, SETTINGS, work_dir=tmp_path / "w")
    assert found.resumed_at == 6
    assert found.losses == expected.losses
    assert not changed(cut, state_of(whole))
    # A run that had ended takes no further step, and has the same weights once more.
    again = reload(view)
    apply(again, plan_of(2, 3))
    assert heal(again, view, windows, SETTINGS, work_dir=tmp_path / "w").resumed_at == 12
    assert not changed(again, state_of(whole))


def test_other_windows_begin_anew(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor, tmp_path: Path
):
    other = reload(view)
    apply(other, plan_of(2, 3))
    heal(pruned, view, windows, SETTINGS, work_dir=tmp_path / "w")
    assert heal(other, view, windows.flip(0), SETTINGS, work_dir=tmp_path / "w").resumed_at == 0


def test_a_folder_of_something_else_is_left_alone(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor, tmp_path: Path
):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="was not made by"):
        heal(pruned, view, windows, SETTINGS, work_dir=tmp_path)


class Rates(TrainerCallback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(kwargs["optimizer"].param_groups[0]["lr"])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("layercut.training.progress_callback.time", clock)
    return clock


@pytest.mark.filterwarnings("ignore:the heal never lowered")
def test_minutes_end_in_time_and_the_rate_falls_over_them(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor, clock: Clock
):
    rates = Rates()
    chosen = with_settings(steps=None, minutes=1.5 / 60, warmup_ratio=0.0, patience=99)
    healing = heal(pruned, view, windows, chosen, callbacks=[clock, rates])
    assert healing.n_steps in (15, 16)
    assert 1.45 < healing.train_seconds < 1.65
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates.seen))
    assert rates.seen[-1] < 0.3 * rates.seen[0]


@pytest.mark.filterwarnings("ignore:the heal never lowered")
def test_the_minutes_before_an_interruption_count(
    view: DecoderView, windows: torch.Tensor, tmp_path: Path, clock: Clock
):
    class Late(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 3:
                clock.now += 2  # before the checkpoint of the fourth step
            if state.global_step == 5:
                raise KeyboardInterrupt

    chosen = with_settings(steps=None, minutes=2.5 / 60, patience=99)
    for callbacks in ([clock, Late()], [clock]):
        student = reload(view)
        apply(student, plan_of(2, 3))
        try:
            healing = heal(student, view, windows, chosen, work_dir=tmp_path, callbacks=callbacks)
        except KeyboardInterrupt:
            start = clock.now
    assert healing.resumed_at == 4
    assert 2.35 < healing.train_seconds < 2.75
    assert clock.now - start < 0.35


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.5, 0.0]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0]),
    ],
)
def test_the_rate_rises_and_falls_over_the_budget(scheduler: Any, expected: list[float]):
    chosen = with_settings(scheduler=scheduler, warmup_ratio=0.2)
    found = [rate(share, chosen) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
    assert found == pytest.approx(expected)


def test_narrow_matrices_give_the_numbers_of_autocast_and_come_back(
    tmp_path: Path, ids: torch.Tensor
):
    view = load(str(save_tiny(tmp_path, tie_word_embeddings=True)), dtype="float32")
    view.mixed_precision = True
    before, expected = state_of(view), view.token_losses(ids)
    with bfloat16_weights(view):
        assert view.linear_modules(0)["model.layers.0.mlp.up_proj.weight"].weight.itemsize == 2
        found = view.token_losses(ids)
    assert torch.equal(found, expected)
    assert not changed(view, before)
    model = view.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_mixed_precision_model_heals_into_its_wide_weights(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor
):
    view.mixed_precision = pruned.mixed_precision = True
    before = state_of(pruned)
    healing = heal(pruned, view, windows, SETTINGS)
    assert healing.loss_after < healing.loss_before
    assert changed(pruned, before) == set(adapted_names(pruned))
    assert {tensor.dtype for tensor in pruned.model.state_dict().values()} == {torch.float32}


def test_a_loss_that_is_no_number_names_its_step(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    true_loss = Divergence.__call__

    def broken(self: Divergence, ids: torch.Tensor, teacher_states: torch.Tensor) -> torch.Tensor:
        loss = true_loss(self, ids, teacher_states)
        return loss * float("nan") if torch.is_grad_enabled() else loss

    monkeypatch.setattr(Divergence, "__call__", broken)
    before = state_of(pruned)
    with pytest.raises(NumericsError, match=r"is nan at step 1\. Lower heal\.learning_rate"):
        heal(pruned, view, windows, SETTINGS)
    assert not changed(pruned, before)


@pytest.mark.parametrize(
    ("shape", "changes", "error", "message"),
    [
        ((3, 16), {}, DataError, r"yields 3 window\(s\) of 16 tokens, but heal.held_out 2"),
        ((26, 200), {}, RecipeError, "heal.seq_len is 200, but the model's context is 128"),
    ],
)
def test_unfit_windows_are_refused(
    view: DecoderView, pruned: DecoderView, shape: Any, changes: Any, error: Any, message: str
):
    with pytest.raises(error, match=message):
        heal(pruned, view, torch.full(shape, 5), with_settings(**changes))


def test_foreign_tokens_and_teachers_are_refused(
    view: DecoderView, pruned: DecoderView, windows: torch.Tensor, tmp_path: Path
):
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        heal(pruned, view, windows + VOCABULARY, SETTINGS)
    other = load(str(save_tiny(tmp_path, vocab_size=VOCABULARY + 1)), dtype="float32")
    with pytest.raises(RecipeError, match="has 259 words and its teacher 260"):
        heal(pruned, other, windows, SETTINGS)


def test_windows_that_come_again_meet_the_same_teacher(
    view: DecoderView, windows: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    chosen = with_settings(steps=30, patience=99)  # 24 windows, two a step: in the third pass
    n_calls = []
    true_states = Divergence.compute_teacher_states
    monkeypatch.setattr(
        Divergence,
        "compute_teacher_states",
        lambda self, ids: (n_calls.append(1), true_states(self, ids))[1],
    )
    losses = []
    for limit in (2**30, 0):
        monkeypatch.setattr("layercut.training.heal_trainer.TEACHER_STATES_BYTES", limit)
        student = reload(view)
        apply(student, plan_of(2, 3))
        losses.append([loss for _, loss in heal(student, view, windows, chosen).losses])
        n_calls.append(0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert n_calls == [1] * 13 + [0] + [1] * 31 + [0]  # one of them for the checkpoints
