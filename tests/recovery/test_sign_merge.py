"""The sign-consistent merge: by hand, against a plain reference, and through the pipeline."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import layercut
from conftest import N_LAYERS, plan_of, save_tiny
from layercut.errors import ModelError, PlanError, RecipeError
from layercut.gradients.log import GradientLog
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.methods import sign_merge
from layercut.recovery.methods.sign_merge import sort_by_score, top_entries
from layercut.types import CalibrationBatches, Evidence, PruningPlan, Round
from lora_runs import planted_log

LITERAL = {"strength": 1.0}


def random_log(view: DecoderView) -> GradientLog:
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for layer in range(view.n_layers):
        for name, weight in view.linear_weights(layer).items():
            n_out, n_in = weight.shape
            a = torch.randn(3, 2, n_in, generator=generator)
            factors[name] = (a, torch.randn(3, n_out, 2, generator=generator))
    return planted_log(factors, view.n_layers)


def reference(
    view: DecoderView, log: GradientLog, dropped: int, kept: int, keep: float
) -> dict[str, torch.Tensor]:
    """What layer ``dropped`` adds to layer ``kept``, entry by entry."""
    additions = {}
    for name, weight in view.linear_weights(dropped).items():
        a, b = log.factors(name)
        importance = (b.double() @ a.double()).square().mean(0).flatten().tolist()
        target = name.replace(f".{dropped}.", f".{kept}.")
        values, signs = weight.flatten().tolist(), view.model.get_parameter(target).flatten()
        order = sorted(range(len(values)), key=lambda i: (-importance[i], i))
        added = [0.0] * len(values)
        for i in order[: math.ceil(keep * len(values))]:
            if values[i] * float(signs[i]) > 0:
                added[i] = values[i]
        additions[target] = torch.tensor(added).view_as(weight)
    return additions


def test_top_entries_by_hand():
    importance = torch.tensor([[1.0, 5.0], [3.0, 2.0]])
    # ⌈0.5 · 4⌉ = 2: 5 and 3
    assert top_entries(importance, 0.5).tolist() == [[False, True], [True, False]]
    # ⌈0.3 · 4⌉ = 2
    assert int(top_entries(importance, 0.3).sum()) == 2
    assert top_entries(importance, 1.0).all()


def test_ties_go_to_the_lower_index():
    importance = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0])
    assert top_entries(importance, 0.67).tolist() == [True, True, True, True, True, False]
    assert top_entries(torch.zeros(4), 0.5).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("share", "expected"), [(0.7, 7), (0.1, 1), (0.3, 3), (0.01, 1)])
def test_shares_are_decimal_numbers(share: float, expected: int):
    # 0.7 · 10 = 7.000000000000001 in binary
    assert int(top_entries(torch.rand(10), share).sum()) == expected


def test_one_weight_by_hand(view: DecoderView):
    kept = view.model.get_parameter("model.layers.1.self_attn.q_proj.weight")
    dropped = view.model.get_parameter("model.layers.2.self_attn.q_proj.weight")
    kept.data[0, :4] = torch.tensor([1.0, -1.0, 0.0, 2.0])
    dropped.data[0, :4] = torch.tensor([0.5, 0.5, 0.5, 0.25])
    log = random_log(view)
    # F is 4, 4, 4, 1 in the first row and 0 elsewhere; three of 256 entries are kept.
    a, b = torch.zeros(1, 1, 16), torch.zeros(1, 16, 1)
    a[0, 0, :4] = torch.tensor([2.0, -2.0, 2.0, 1.0])
    b[0, 0, 0] = 1.0
    name = "model.layers.2.self_attn.q_proj.weight"
    factors = {n: log.factors(n) for n in log.weights} | {name: (a, b)}
    factors = {n: (a[:1], b[:1]) for n, (a, b) in factors.items()}
    patch = sign_merge.merge(view, {2: 1}, planted_log(factors, N_LAYERS), 3 / 256)
    merged = patch.tensors["model.layers.1.self_attn.q_proj.weight"]
    # 1 + 0.5 (same sign); −1 stays (signs differ); 0 has no sign; the fourth is not among the top.
    assert merged[0, :4].tolist() == [1.5, -1.0, 0.0, 2.0]
    assert torch.equal(merged[1:], kept[1:])


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.5])
def test_merge_equals_an_entry_by_entry_reference(
    view: DecoderView, batches: CalibrationBatches, keep: float
):
    log = random_log(view)
    evidence = Evidence(scores=(), gradient_log=log)
    patch = fit(
        view, plan_of(2, 3, 5), evidence, batches, method="sign-merge", **LITERAL, keep=keep
    )
    # 2 and 3 go into 1, whose signs stay the original ones; 5 goes into 4.
    expected: dict[str, torch.Tensor] = {}
    for dropped, kept in ((2, 1), (3, 1), (5, 4)):
        for name, added in reference(view, log, dropped, kept, keep).items():
            expected[name] = expected.get(name, view.model.get_parameter(name)) + added
    assert set(patch.tensors) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(patch.tensors[name], tensor)
    assert patch.notes["merged_into"] == {"2": 1, "3": 1, "5": 4}
    assert 0 < patch.notes["entries_added"] < patch.notes["entries_kept"]


def test_only_linear_weights_of_receiving_layers_change(
    view: DecoderView, batches: CalibrationBatches
):
    evidence = Evidence(scores=(), gradient_log=random_log(view))
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    patch = fit(view, plan_of(2, 3), evidence, batches, method="sign-merge", **LITERAL)
    assert set(patch.tensors) == set(view.linear_weights(1))
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())


def scored_plan(*rounds: Round) -> PruningPlan:
    dropped = tuple(sorted(layer for r in rounds for layer in r.dropped))
    return PruningPlan("tiny", N_LAYERS, dropped, "igia", rounds=rounds)


def test_beyond_safe_discards_the_lowest_scored_layers(
    view: DecoderView, batches: CalibrationBatches
):
    plan = scored_plan(Round((9.0, 8.0, 3.0, 1.0, 2.0, 7.0), (2, 3, 4), 0.1))
    evidence = Evidence(scores=(), gradient_log=random_log(view))
    options = {"merge": "beyond-safe", "n_safe": 2, **LITERAL}
    patch = fit(view, plan, evidence, batches, method="sign-merge", **options)
    assert patch.notes["discarded"] == [3, 4]
    assert patch.notes["merged_into"] == {"2": 1}


def test_layers_are_ranked_as_they_were_dropped(view: DecoderView):
    log = random_log(view)
    first = Round((1.0, 1.0, 5.0, 1.0, 4.0, 9.0), (3,), None)
    second = Round((1.0, 1.0, 0.5, None, 0.1, 9.0), (4,), None)
    assert sort_by_score(scored_plan(first, second), log) == [3, 4]
    # Of equal scores the higher index goes first, as in selection.
    assert sort_by_score(scored_plan(Round((9.0, 1.0, 1.0, 9.0, 9.0, 9.0), (1, 2), None)), log) == [
        2,
        1,
    ]
    values = log.layer_scores().values
    assert sort_by_score(plan_of(1, 4, 5), log) == sorted((1, 4, 5), key=lambda i: values[i])


def test_without_a_record_the_merge_makes_its_own(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    options = {"method": "sign-merge", "steps": 4, **LITERAL}
    patch = fit(view, plan_of(2), None, batches, **options)
    assert patch.notes["recorded_steps"] == 4
    assert set(patch.tensors) == set(view.linear_weights(1))
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())
    # A record that lacks a dropped layer does not serve either.
    log = random_log(view)
    partial = {n: log.factors(n) for n in log.weights if ".2." not in n}
    evidence = Evidence(scores=(), gradient_log=planted_log(partial, N_LAYERS))
    again = fit(view, plan_of(2), evidence, batches, **options)
    assert all(torch.equal(t, again.tensors[n]) for n, t in patch.tensors.items())


def test_igia_with_sign_merge_end_to_end(tiny_llama: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    recipe = {
        "model": str(tiny_llama),
        "calibration": {"data": str(text), "n_sequences": 4, "seq_len": 32, "gradient_batch": 2},
        "scoring": {"method": "igia", "options": {"steps": 4}},
        "selection": {"strategy": "lowest", "drop_layers": 2},
        "recovery": {"method": "sign-merge", "options": {"keep": 0.3}},
        "evaluation": {"text": {"fox": str(text)}, "seq_len": 64, "max_tokens": 256},
    }
    result = layercut.run(recipe, tmp_path / "out")
    assert result.plan is not None
    assert 0 not in result.plan.dropped
    assert result.recovery["method"] == "sign-merge"
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert written.config.num_hidden_layers == 4


def test_a_cut_without_a_preceding_layer_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(PlanError, match="layer 0 is dropped"):
        fit(view, plan_of(0, 3), None, batches, method="sign-merge")


def test_discarding_every_dropped_layer_is_refused(view: DecoderView, batches: CalibrationBatches):
    options = {"merge": "beyond-safe", "n_safe": 2}
    with pytest.raises(PlanError, match="n_safe is 2, but only 2 layers are dropped"):
        fit(view, plan_of(2, 3), None, batches, method="sign-merge", **options)


@pytest.mark.parametrize("options", [{"merge": "beyond-safe"}, {"n_safe": 2}])
def test_beyond_safe_and_its_number_go_together(
    view: DecoderView, batches: CalibrationBatches, options: dict[str, object]
):
    with pytest.raises(
        RecipeError,
        match=r"^recovery\.options: merge: beyond-safe and an n_safe above 0 go together$",
    ):
        fit(view, plan_of(2, 3), None, batches, method="sign-merge", **options)


def test_weights_of_unlike_shape_are_refused(batches: CalibrationBatches, tmp_path: Path):
    view = load(str(save_tiny(tmp_path / "uneven")), dtype="float32")
    view.layers[1].mlp.up_proj.weight.data = torch.zeros(8, 16)
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.up_proj\.weight cannot be merged"):
        fit(view, plan_of(2), None, batches, method="sign-merge")


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        # The mean gain over 0 is 1, its standard error 0: all examples gain alike.
        ({0.0: [3.0, 2.0, 4.0], 0.5: [2.0, 1.0, 3.0], 1.0: [5.0, 5.0, 5.0]}, 0.5),
        # Mean gain 0.1; the gains 1.1, −0.9, 0.1 differ by 1, so that its error is 0.58.
        ({0.0: [3.0, 2.0, 4.0], 1.0: [1.9, 2.9, 3.9]}, 0.0),
        ({0.0: [1.0, 1.0], 0.5: [2.0, 2.0]}, 0.0),
        ({0.0: [2.0], 0.5: [1.0]}, 0.0),  # one example says nothing of its error
    ],
)
def test_a_strength_must_be_better_by_more_than_its_error(
    losses: dict[float, list[float]], chosen: float
):
    given = {strength: torch.tensor(values) for strength, values in losses.items()}
    assert sign_merge.choose_strength(given) == chosen


def test_a_part_of_the_merge_is_between_both(view: DecoderView, batches: CalibrationBatches):
    evidence = Evidence(scores=(), gradient_log=random_log(view))
    whole, half, none = (
        fit(view, plan_of(2), evidence, batches, method="sign-merge", strength=strength)
        for strength in (1.0, 0.5, 0.0)
    )
    assert not none.tensors and none.notes["strength"] == 0
    assert whole.notes["signs_agree"] == pytest.approx(
        whole.notes["entries_added"] / whole.notes["entries_kept"]
    )
    for name, tensor in whole.tensors.items():
        weight = view.model.get_parameter(name)
        torch.testing.assert_close(half.tensors[name], (weight + tensor) / 2)


def test_probes_tune_every_strength_alike_and_leave_the_model_alone(
    view: DecoderView, batches: CalibrationBatches
):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    evidence = Evidence(scores=(), gradient_log=random_log(view))
    options = {"method": "sign-merge", "steps": 4, "probe_steps": 2, "learning_rate": 0.01}
    patch = fit(view, plan_of(2), evidence, batches, **options)
    assert list(patch.notes["probed_losses"]) == ["0", "0.25", "0.5", "1"]
    assert len(set(patch.notes["probed_losses"].values())) == 4
    assert bool(patch.tensors) == (patch.notes["strength"] > 0)
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())
    again = fit(view, plan_of(2), evidence, batches, **options)
    assert again.notes == patch.notes


def test_a_merge_that_ruins_the_model_is_not_made(view: DecoderView, batches: CalibrationBatches):
    evidence = Evidence(scores=(), gradient_log=random_log(view))
    for name in view.linear_weights(2):
        view.model.get_parameter(name).data *= 300  # as if the dropped layer's weights were huge
    options = {"method": "sign-merge", "steps": 4, "probe_steps": 2, "keep": 0.5}
    patch = fit(view, plan_of(2), evidence, batches, **options)
    assert patch.notes["strength"] == 0 and not patch.tensors
