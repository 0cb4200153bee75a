"""Scoring's view of every family against the model's own forward pass."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from family_configs import FAMILIES, Family
from layercut.engine.layerwise import walk_gradients
from layercut.errors import ModelError
from layercut.models.droppable import layers_to_keep
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery.runtime_maps import applied_maps
from layercut.scoring.methods.perplexity import measure_losses_without
from layercut.scoring.score import score
from layercut.selection.select import select
from layercut.types import CalibrationBatches, RuntimeMaps
from repairs import fitted_maps
from saved_families import save_family, tokens

PRUNABLE = sorted(name for name, family in FAMILIES.items() if not family.unprunable)


@pytest.fixture(scope="module", params=PRUNABLE)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, DecoderView]:
    family = FAMILIES[request.param]
    folder = save_family(tmp_path_factory.mktemp("family"), family)
    return family, load(str(folder), dtype="float32")


def batches() -> CalibrationBatches:
    return CalibrationBatches(tokens(), 2, 2, "test", "0")


def test_losses_are_those_of_the_models_own_logits(case: tuple[Family, DecoderView]) -> None:
    _, view = case
    with torch.no_grad():
        logits = view.model(tokens(), use_cache=False).logits
        normed = view.decoder(tokens(), use_cache=False).last_hidden_state
    # One matrix product over all tokens, or one over each sequence's, differ in the last bit.
    torch.testing.assert_close(view.head(normed.flatten(0, 1)), logits.flatten(0, 1))
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens()[:, 1:].flatten(), reduction="none"
    )
    torch.testing.assert_close(view.token_losses(tokens()).flatten(), losses)


def test_loss_without_a_layer_is_that_of_the_model_that_skips_it(
    case: tuple[Family, DecoderView],
) -> None:
    _, view = case
    if view.layout.rules.unscorable:
        return
    ids = tokens()
    batches = CalibrationBatches(ids, len(ids), len(ids), "", "")
    for layer, loss in measure_losses_without(view, batches).items():
        with view.skipping([layer]):
            expected = float(view.token_losses(tokens()).sum())
        assert loss == pytest.approx(expected, rel=1e-5)


def test_operations_at_the_cuts_act_on_the_stream(case: tuple[Family, DecoderView]) -> None:
    _, view = case
    plan = plan_of(view.n_layers - 2, n_layers=view.n_layers)
    if view.layout.rules.unscorable:
        with pytest.raises(ModelError, match="recovery 'ghost' cannot work on"):
            fitted_maps(view, plan, batches(), "ghost")
        return
    before = plan.dropped[0] - 1
    matrix = torch.linspace(0.5, 2, view.hidden_size).diag()
    inputs = view.embed(tokens())
    hidden = inputs.hidden
    with torch.no_grad():
        for layer in plan.kept:
            hidden = view.run_layer(layer, hidden, inputs)
            hidden = hidden @ matrix if layer == before else hidden
    repair = RuntimeMaps({before: matrix}, "by hand")
    with view.skipping(plan.dropped), applied_maps(view, plan, repair):
        torch.testing.assert_close(
            view.token_losses(tokens()), view.stream_losses(hidden, tokens())
        )


def test_gradients_of_all_linear_weights_equal_plain_autograd(
    case: tuple[Family, DecoderView],
) -> None:
    _, view = case
    if view.layout.rules.unscorable:
        with pytest.raises(ModelError, match="scoring 'gradmap' cannot work on"):
            score(view, batches(), method="gradmap")
        return
    found = {}
    for gradients in walk_gradients(view, [tokens()], micro_batch=2, n_targets=26):
        found |= {name: g.clone() for name, g in gradients.weights.items()}
    parameters = {name: view.model.get_parameter(name).requires_grad_() for name in found}
    losses = view.model(tokens(), labels=tokens(), use_cache=False).loss
    expected = torch.autograd.grad(losses, list(parameters.values()), allow_unused=True)
    view.model.requires_grad_(False)
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        wanted = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-6, msg=name)


def test_selection_leaves_pinned_layers_alone(case: tuple[Family, DecoderView]) -> None:
    family, view = case
    if family.model_type == "jamba":
        # Its pattern is counted from the first layer on: only the end can go without a shift.
        assert set(layers_to_keep(view)) == set(range(view.n_layers - 1))
        return
    plan, _ = select(view, batches(), strategy="lowest", scoring="reverse-order", drop_layers=2)
    assert not set(plan.dropped) & view.layout.pinned.keys()
    for layer in view.layout.pinned:
        with pytest.raises(ModelError, match=f"layer {layer} cannot be dropped: "):
            select(view, batches(), drop=[layer])
