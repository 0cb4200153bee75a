"""What fine-tuning within a run keeps in memory and beside the output, and what it leaves alone."""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

import layercut
from finetune_recipes import recipe_in
from layercut.errors import OutputError
from layercut.training.early_steps import record
from layercut.training.finetune import finetune


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    return recipe_in(tmp_path, tiny_llama)


def test_a_folder_in_the_checkpoints_place_is_refused_before_anything_is_computed(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def computed(*_: Any, **__: Any) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr("layercut.evaluation.recorded_evaluation.evaluate", computed)
    monkeypatch.setattr("layercut.pipeline.finetune_run.evaluate", computed)
    thesis = tmp_path / "out.training/thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    for run in (layercut.run, layercut.tune_checkpoint):
        with pytest.raises(OutputError, match=r"out\.training, .* not made by layercut"):
            run(recipe, tmp_path / "out")
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("tunes", [True, False])
def test_a_run_without_checkpoints_leaves_alone_what_has_their_place(
    recipe: dict, tmp_path: Path, tunes: bool
):
    (tmp_path / "out.training").mkdir()
    (tmp_path / "out.training/thesis.txt").write_text("years of work")
    recipe["finetune"] = recipe["finetune"] | {"save_steps": None} if tunes else None
    layercut.run(recipe, tmp_path / "out")
    assert (tmp_path / "out.training/thesis.txt").read_text() == "years of work"


def test_trouble_in_training_is_not_blamed_on_the_output_folder(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(view: Any, *_: Any, **__: Any) -> Any:
        raise OSError("the tracker is down")

    monkeypatch.setattr("layercut.training.finetune.finetune", broken)
    recipe["finetune"]["compare_dense"] = False
    with pytest.raises(OSError, match="the tracker is down"):
        layercut.run(recipe, tmp_path / "out")


def test_the_record_of_gradients_is_gone_when_the_pruned_model_is_tuned(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    logs, alive = [], []

    def recorded(*arguments: Any, **options: Any) -> Any:
        log = record(*arguments, **options)
        logs.append(weakref.ref(log))
        return log

    def watched(view: Any, *arguments: Any, **how: Any) -> Any:
        alive.extend(log() for log in logs)
        return finetune(view, *arguments, **how)

    monkeypatch.setattr("layercut.scoring.methods.igia.record", recorded)
    monkeypatch.setattr("layercut.training.finetune.finetune", watched)
    recipe["scoring"] = {"method": "igia", "options": {"steps": 4}}
    recipe["selection"] |= {"strategy": "lowest", "rounds": "one-shot"}
    recipe["recovery"] = {"method": "sign-merge"}
    recipe["finetune"]["compare_dense"] = False
    layercut.run(recipe, tmp_path / "out")
    assert alive == [None]


class FakeTensorBoard(TensorBoardCallback):
    """Writes where TensorBoard's callback would, without TensorBoard."""

    def __init__(self) -> None:
        self.logging_dir = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(self.logging_dir or Path(args.output_dir) / "runs")
        folder.mkdir(parents=True)
        (folder / "events").touch()

    def on_log(self, *_: Any, **__: Any) -> None:
        pass

    on_train_end = on_log


def test_the_records_of_tensorboard_stay(
    recipe: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "tensorboard", FakeTensorBoard)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: name == "tensorboard" or find_spec(name, *a)
    )
    recipe["finetune"] |= {"report_to": "tensorboard", "max_steps": 1}
    for save_steps, name in ((1, "one"), (None, "two")):
        recipe["finetune"]["save_steps"] = save_steps
        layercut.run(recipe, tmp_path / name)
        assert (tmp_path / name / "layercut/logs/dense/events").is_file()
        assert (tmp_path / name / "layercut/logs/pruned/events").is_file()
        assert not (tmp_path / f"{name}.training").exists()
