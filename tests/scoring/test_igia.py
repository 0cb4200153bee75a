"""IGIA's early run: what it learns from, which schedule it follows, and that it leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layercut
from conftest import N_LAYERS, VOCABULARY
from layercut.data.encoding import IGNORED
from layercut.errors import DataError, RecipeError
from layercut.models.view import DecoderView
from layercut.registry import resolve
from layercut.scoring.score import score
from layercut.training import early_steps
from layercut.types import CalibrationBatches

SMALL = {"batch_size": 2, "accumulation": 2, "steps": 3, "warmup_ratio": 0.0, "max_length": 64}


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Eight rows of a task."""
    lines = [{"prompt": f"{n} plus one is", "completion": f" {n + 1}"} for n in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every trainer that an early run builds."""
    built: list[Any] = []
    original = early_steps.build_trainer

    def build(*arguments: Any, **settings: Any) -> Any:
        built.append(original(*arguments, **settings))
        return built[-1]

    monkeypatch.setattr(early_steps, "build_trainer", build)
    return built


def test_scores_come_from_the_record_of_every_linear_weight(
    view: DecoderView, batches: CalibrationBatches, rows: str
):
    scores = score(view, batches, method="igia", data=rows, **SMALL)
    log = scores.gradient_log
    assert log is not None
    names = {name for layer in range(N_LAYERS) for name in view.linear_weights(layer)}
    assert (set(log.weights), log.n_steps) == (names, 3)
    assert {logged.scaling for logged in log.weights.values()} == {4.0}
    assert {logged.shape_a[0] for logged in log.weights.values()} == {8}
    expected = [
        sum(float(log.elementwise(name).double().sum()) for name in view.linear_weights(layer))
        for layer in range(N_LAYERS)
    ]
    assert scores.values == pytest.approx(expected, rel=1e-5)
    norms = score(view, batches, method="igia", data=rows, reduction="norm", **SMALL)
    assert norms.values == log.layer_scores("norm").values


@pytest.mark.parametrize("uses_rows", [False, True])
def test_the_model_is_bit_for_bit_what_it_was(
    view: DecoderView, batches: CalibrationBatches, rows: str, uses_rows: bool
):
    weights = {n: t.clone() for n, t in view.model.state_dict().items()}
    modules = [(name, type(module)) for name, module in view.model.named_modules()]
    config, generation = view.model.config.to_dict(), view.model.generation_config.to_dict()
    logits = view.model(batches.input_ids).logits
    state = torch.random.get_rng_state()
    score(view, batches, method="igia", **(SMALL | {"data": rows if uses_rows else None}))
    assert list(view.model.state_dict()) == list(weights)
    assert all(torch.equal(t, weights[n]) for n, t in view.model.state_dict().items())
    assert [(name, type(module)) for name, module in view.model.named_modules()] == modules
    assert view.model.config.to_dict() == config
    assert view.model.generation_config.to_dict() == generation
    assert torch.equal(view.model(batches.input_ids).logits, logits)
    assert not any(p.requires_grad or p.grad is not None for p in view.model.parameters())
    assert not any(module.training for module in view.model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_schedule_is_that_of_the_whole_run(
    view: DecoderView, batches: CalibrationBatches, rows: str, trainers: list[Any]
):
    score(view, batches, method="igia", data=rows, epochs=5.0, learning_rate=1.0, **SMALL)
    # 8 rows, 4 a step, 5 epochs: 10 steps; linear decay stands at 1 − 3/10 after 3 of them.
    (trainer,) = trainers
    assert (trainer.state.max_steps, trainer.state.global_step) == (10, 3)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.7)


def test_the_papers_values_are_the_defaults(
    view: DecoderView, batches: CalibrationBatches, trainers: list[Any]
):
    scores = score(view, batches, method="igia")
    expected = {"steps": 40, "rank": 8, "alpha": 32, "learning_rate": 1e-4, "weight_decay": 0.1}
    expected |= {"warmup_ratio": 0.03, "reduction": "squared", "data": None}
    assert expected.items() <= scores.options.items()
    (trainer,) = trainers
    assert (trainer.args.learning_rate, trainer.args.weight_decay) == (1e-4, 0.1)
    # Calibration text: one gradient group of 2 sequences a step, 40 steps being 1 % of the run.
    assert trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps == 2
    assert (trainer.state.max_steps, trainer.state.global_step) == (4000, 40)


def test_the_micro_batch_changes_no_score(view: DecoderView):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (8, 32), generator=generator)
    values = []
    for micro in (3, 8):  # 3 does not divide the 8 sequences of a step: batches of 2 do
        batches = CalibrationBatches(ids, 8, micro, "test", "0")
        values.append(score(view, batches, method="igia", steps=3, warmup_ratio=0.0).values)
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=0)


def test_calibration_windows_are_learnt_as_they_stand(view: DecoderView, trainers: list[Any]):
    # As long as the context, so that not one token could be added.
    ids = torch.randint(0, VOCABULARY, (4, view.model.config.max_position_embeddings))
    score(view, CalibrationBatches(ids, 2, 2, "test", "0"), method="igia", steps=3)
    (trainer,) = trainers
    assert trainer.train_dataset["input_ids"][:] == ids.tolist()
    assert trainer.train_dataset["labels"][:] == [[IGNORED, *row[1:]] for row in ids.tolist()]


def test_the_seed_decides(view: DecoderView, batches: CalibrationBatches, rows: str):
    values = [
        score(view, batches, method="igia", data=rows, seed=seed, **SMALL).values
        for seed in (0, 0, 1)
    ]
    assert values[0] == values[1] != values[2]


def test_skipped_layers_are_not_recorded(view: DecoderView, batches: CalibrationBatches, rows: str):
    with view.skipping([2, 5]):
        scores = score(view, batches, method="igia", data=rows, **SMALL)
    assert [value is None for value in scores.values] == [i in (2, 5) for i in range(N_LAYERS)]
    assert scores.gradient_log is not None
    assert {w.layer for w in scores.gradient_log.weights.values()} == {0, 1, 3, 4}


def test_selection_hands_the_record_of_the_first_round_to_recovery(
    view: DecoderView, batches: CalibrationBatches, rows: str
):
    plan, evidence = layercut.select(
        view,
        batches,
        strategy="lowest",
        rounds="each",
        scoring="igia",
        scoring_options={"data": rows, **SMALL},
        drop_layers=2,
    )
    assert len(evidence.scores) == 2
    assert all(scores.gradient_log is None for scores in evidence.scores)
    assert evidence.gradient_log is not None
    assert {w.layer for w in evidence.gradient_log.weights.values()} == set(range(N_LAYERS))
    assert evidence.scores[0].values == evidence.gradient_log.layer_scores().values
    assert "gradient_log" not in evidence.scores[0].to_json(plan.model)


def test_a_failed_run_leaves_no_adapters(view: DecoderView, batches: CalibrationBatches, rows: str):
    with pytest.raises(RecipeError, match="record 7 steps, but the run has only 6"):
        score(view, batches, method="igia", data=rows, **(SMALL | {"steps": 7}))
    assert all(type(layer.mlp.up_proj) is nn.Linear for layer in view.layers)
    assert not hasattr(view.model, "peft_config")


def test_fewer_rows_than_one_step_are_refused(
    view: DecoderView, batches: CalibrationBatches, rows: str
):
    with pytest.raises(DataError, match=r"8 training row\(s\) are fewer than one step's 64"):
        score(view, batches, method="igia", data=rows, steps=3, max_length=64)


def test_impossible_options_are_refused_by_name():
    with pytest.raises(RecipeError, match=r"scoring\.options\.steps.*scoring\.options\.rnak"):
        resolve("scoring", "igia", {"steps": 0, "rnak": 4})
