"""One contiguous block by angular distance: brute force, planted redundancy, what must stay."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from layercut.errors import PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.registry import resolve
from layercut.scoring.score import score
from layercut.selection.methods import block
from layercut.selection.select import Request, plan_sizes
from layercut.selection.select import select as select_by
from layercut.types import CalibrationBatches

select = functools.partial(select_by, strategy="block", scoring="angular-distance")
ANGLES = resolve("scoring", "angular-distance")
LAYER_TYPES = (("local",), ("global",)) * 3


def request_of(**how: Any) -> Request:
    return Request(scoring=ANGLES, strategy="block", **how)


def make_identity(view: DecoderView, *layers: int) -> None:
    for layer in layers:
        view.layers[layer].input_layernorm.weight.data.zero_()
        view.layers[layer].post_attention_layernorm.weight.data.zero_()


@pytest.mark.parametrize("n_drop", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", ["last", "all"])
def test_block_equals_brute_force(
    view: DecoderView, batches: CalibrationBatches, n_drop: int, tokens: str
):
    inputs = view.embed(batches.input_ids)
    states = [inputs.hidden]
    for layer in range(view.n_layers):
        states.append(view.run_layer(layer, states[-1], inputs))
    kept = slice(-1, None) if tokens == "last" else slice(None)

    def angle(start: int) -> float:
        ends = (states[i][:, kept].double() for i in (start, start + n_drop))
        return float(torch.nn.functional.cosine_similarity(*ends, dim=-1).arccos().mean())

    start = min(range(view.n_layers - n_drop + 1), key=angle)
    plan, _ = select(view, batches, scoring_options={"tokens": tokens}, drop_layers=n_drop)
    assert plan.dropped == tuple(range(start, start + n_drop))
    assert len(plan.cuts) == 1


@pytest.mark.parametrize("planted", [(1, 2), (3, 4), (4, 5)])
def test_planted_block_is_found(
    view: DecoderView, batches: CalibrationBatches, planted: tuple[int, int]
):
    make_identity(view, *planted)
    assert select(view, batches, drop_layers=2)[0].dropped == planted


def test_closest_block_by_hand():
    # blocks of two of five layers: 0–1, 1–2, 2–3, 3–4
    distances = [0.4, 0.1, 0.3, 0.3]
    assert block.find_closest_block(distances, 2, request_of()) == (1, 2)
    assert block.find_closest_block(distances, 2, request_of(protect=frozenset({1}))) == (3, 4)


def test_a_block_keeps_the_pattern():
    # Every second layer differs: only blocks of an even number of layers leave the others in place.
    request = request_of(layer_types=LAYER_TYPES)
    assert block.find_closest_block([0.1, 0.2, 0.3, 0.4, 0.5], 2, request) == (0, 1)
    request = request_of(layer_types=LAYER_TYPES, protect=frozenset({5}))
    with pytest.raises(PlanError, match="preserves the pattern"):
        block.find_closest_block([0.1, 0.2, 0.3, 0.4], 3, request)


def test_one_pass_serves_plans_of_every_size(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    plan_of_size = plan_sizes(view, batches, request_of())
    monkeypatch.setattr(DecoderView, "embed", None)
    assert [len(plan_of_size(n)[0].dropped) for n in range(1, 5)] == [1, 2, 3, 4]


def test_evidence_holds_the_single_layers_distances(view: DecoderView, batches: CalibrationBatches):
    plan, evidence = select(view, batches, scoring_options={"tokens": "all"}, drop_layers=2)
    expected = score(view, batches, method="angular-distance", tokens="all")
    assert evidence.scores[0].values == expected.values
    assert evidence.scores[0].options == {"tokens": "all"}
    assert plan.fingerprint == expected.fingerprint
    assert plan.method == "block"


def test_protected_layers_that_leave_no_block_are_an_error(
    view: DecoderView, batches: CalibrationBatches
):
    assert select(view, batches, drop_layers=2, protect=[0, 3])[0].dropped in ((1, 2), (4, 5))
    with pytest.raises(PlanError, match="no block of 3 of 6 layers lies between the protected"):
        select(view, batches, drop_layers=3, protect=[0, 3])


def test_another_score_is_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match=r"block needs scoring\.method angular-distance"):
        select_by(view, batches, strategy="block", scoring="gradmap", drop_layers=2)


def test_selection_leaves_the_model_alone(view: DecoderView, batches: CalibrationBatches):
    before = {n: t.clone() for n, t in view.model.state_dict().items()}
    select(view, batches, drop_layers=2)
    assert all(torch.equal(t, before[n]) for n, t in view.model.state_dict().items())
