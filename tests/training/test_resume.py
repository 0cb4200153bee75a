"""Fine-tuning that goes on from a checkpoint: to the same weights, and only in its own folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from layercut.checkpoints.claimed_folder import RUN_FILE
from layercut.data.tasks import TaskRow
from layercut.errors import OutputError
from layercut.models.load import reload
from layercut.models.view import DecoderView
from layercut.recipe.finetune import FinetuneConfig
from layercut.training.finetune import finetune
from layercut.training.resume import claim, last_checkpoint, model_hash

ROWS = [TaskRow(f"{i} is", (" even", " odd"), i % 2, where=f"row {i}") for i in range(32)]
SETTINGS = FinetuneConfig(
    batch_size=4, accumulation=2, epochs=2, max_length=64, learning_rate=1e-2, save_steps=2
)


def changed(view: DecoderView, other: DecoderView) -> set[str]:
    after = other.model.state_dict()
    return {n for n, t in view.model.state_dict().items() if not torch.equal(t, after[n])}


class Interrupt(TrainerCallback):
    """Ctrl-C in the third step, which takes long."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            time.sleep(2)
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(view: DecoderView, tmp_path: Path):
    whole, cut, other = (reload(view) for _ in range(3))
    expected = finetune(whole, ROWS, SETTINGS.model_copy(update={"save_steps": None}))
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, ROWS, SETTINGS, work_dir=tmp_path / "work", callbacks=[Interrupt()])
    assert not changed(cut, view)
    found = finetune(cut, ROWS, SETTINGS, work_dir=tmp_path / "work")
    assert (found.n_steps, found.resumed_at) == (8, 2)
    assert not changed(cut, whole)
    assert found.loss == expected.loss
    # The two seconds that the second step slept are those of the run, too.
    assert found.train_seconds > 2
    # Another run in the same folder starts anew.
    fresh = finetune(
        other, ROWS, SETTINGS.model_copy(update={"seed": 5}), work_dir=tmp_path / "work"
    )
    assert fresh.resumed_at == 0


@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize("length", [{"max_steps": 2}, {"max_steps": None, "epochs": 1.4}])
def test_a_run_that_has_ended_within_an_epoch_takes_no_further_step(
    view: DecoderView, tmp_path: Path, mode: str, length: dict[str, Any]
):
    # A constant rate: a linear one is 0 by then, and would hide the step.
    update = {"mode": mode, "scheduler": "constant", "warmup_ratio": 0.0, **length}
    first, second = reload(view), reload(view)
    chosen = SETTINGS.model_copy(update=update)
    once = finetune(first, ROWS, chosen, work_dir=tmp_path)
    again = finetune(second, ROWS, chosen, work_dir=tmp_path)
    assert again.resumed_at == again.n_steps == once.n_steps
    assert again.loss == once.loss
    assert changed(first, view)
    assert not changed(first, second)


def test_a_checkpoint_that_was_cut_off_is_passed_over(view: DecoderView, tmp_path: Path):
    chosen = SETTINGS.model_copy(update={"epochs": 1})
    finetune(reload(view), ROWS, chosen, work_dir=tmp_path)
    (tmp_path / "checkpoint-9").mkdir()
    assert finetune(reload(view), ROWS, chosen, work_dir=tmp_path).resumed_at == 4


def test_a_folder_that_is_not_layercuts_is_refused_and_left_alone(
    view: DecoderView, tmp_path: Path
):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"was not made by layercut\. Move it away"):
        finetune(view, ROWS, SETTINGS, work_dir=tmp_path)
    with pytest.raises(OutputError, match=r"thesis\.txt, the place for the checkpoints"):
        last_checkpoint(tmp_path / "thesis.txt", ["a"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_only_a_marked_folder_loses_the_checkpoints_of_another_run(tmp_path: Path):
    folder = claim(tmp_path / "work", ["a"])
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2/trainer_state.json").touch()
    assert last_checkpoint(folder, ["a"]) == str(folder / "checkpoint-2")
    assert last_checkpoint(folder, ["b"]) is None
    assert [path.name for path in folder.iterdir()] == [RUN_FILE]


def test_a_run_in_other_arithmetic_is_another_run(view: DecoderView):
    exact, mixed = model_hash(view), reload(view)
    assert model_hash(mixed) == exact
    mixed.mixed_precision = True
    assert model_hash(mixed) != exact
    view.model.bfloat16().float()
    rounded = model_hash(view)
    view.model.bfloat16()
    assert len({exact, rounded, model_hash(view)}) == 3
