"""Sizes in parameters and in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from conftest import save_tiny
from family_configs import FAMILIES
from layercut.errors import PlanError
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.registry import resolve
from layercut.selection.amounts import Amount, count_memory, count_parameters, measure_caches
from layercut.selection.select import resolve_request, select
from layercut.types import CalibrationBatches
from saved_families import save_family


@pytest.fixture
def view(tmp_path: Path) -> DecoderView:
    return load(str(save_tiny(tmp_path / "tiny", num_hidden_layers=8)), dtype="float32")


@pytest.fixture
def text() -> CalibrationBatches:
    ids = torch.randint(3, 250, (8, 16), generator=torch.Generator().manual_seed(3))
    return CalibrationBatches(ids, 2, 4, "random", "random")


def test_sizes_that_may_be_enough() -> None:
    # Layers worth 5, 1, 1 and 3 of 12: 4 are needed. One layer may do (5); two may not (1 + 1).
    amount = Amount("k", (5, 1, 1, 3), 4, 12)
    assert amount.range_of_sizes(range(4), 3) == range(1, 4)
    assert amount.range_of_sizes([1, 2, 3], 3) == range(2, 4)
    with pytest.raises(PlanError, match=r"k asks for 33\.3% of the model, but the 1 layers"):
        amount.range_of_sizes([1, 2, 3], 1)


@pytest.mark.parametrize("strategy", ["priced-cuts", "lowest", "block"])
def test_at_least_the_share_goes(
    view: DecoderView, text: CalibrationBatches, strategy: str
) -> None:
    needs = {"block": "angular-distance"}
    with pytest.warns(UserWarning, match="whole layers come no closer"):
        plan, _ = select(
            view,
            text,
            strategy=strategy,
            scoring=needs.get(strategy, "residual-sensitivity"),
            drop_parameters=0.2,
        )
    amount = count_parameters(view, 0.2)
    each = amount.worth[0]
    assert amount.of(plan.dropped) >= 0.2 * view.n_parameters > amount.of(plan.dropped) - each


def test_layers_of_unequal_size_are_counted_as_they_are(
    tmp_path: Path, text: CalibrationBatches
) -> None:
    # Its first layer is dense and small, the others have experts.
    view = load(str(save_family(tmp_path / "moe", FAMILIES["deepseek_v3"])), dtype="float32")
    amount = count_parameters(view, 0.3)
    assert len(set(amount.worth)) > 1
    with pytest.warns(UserWarning, match="whole layers come no closer"):
        plan, _ = select(view, text, drop_parameters=0.3)
    assert amount.of(plan.dropped) >= amount.needed
    # One layer fewer could not have been chosen: even the largest ones would not do.
    ranked = sorted(amount.worth[1:], reverse=True)
    assert sum(ranked[: len(plan.dropped) - 2]) < amount.needed


def test_too_much_is_refused(view: DecoderView) -> None:
    with pytest.raises(PlanError, match=r"drop_parameters asks for 95\.0% of the model"):
        resolve_request(
            view, scoring=resolve("scoring", "residual-sensitivity", {}), drop_parameters=0.95
        )


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3", "jamba", "mamba"])
def test_the_cache_that_is_counted_is_the_one_that_a_long_text_leaves(
    tmp_path: Path, name: str
) -> None:
    view = load(str(save_family(tmp_path / "m", FAMILIES[name])), dtype="float32")
    ids = torch.randint(3, 250, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = view.model(input_ids=ids, use_cache=True)
    cache = output.get("past_key_values", output.get("cache_params"))
    measured = measure_caches(view, 40)
    for layer, entry in enumerate(cache.layers):
        tensors = {}
        for value in vars(entry).values():
            for part in value.values() if isinstance(value, dict) else [value]:
                if isinstance(part, torch.Tensor):
                    tensors[id(part)] = part.numel()
        # A window may keep one token less than it is wide.
        assert measured[layer] == pytest.approx(sum(tensors.values()), rel=0.35), (name, layer)
    assert isinstance(cache, DynamicCache)


def test_a_model_that_fits_is_refused_and_a_smaller_memory_is_met(
    view: DecoderView, text: CalibrationBatches
) -> None:
    amount = count_memory(view, gb=1e-9, context=64, batch=2)
    with pytest.raises(PlanError, match="no layer needs to go"):
        count_memory(view, gb=1.0, context=64, batch=2)
    room = 0.75 * amount.whole / 1e9
    with pytest.warns(UserWarning, match="whole layers come no closer"):
        plan, _ = select(view, text, fit_memory={"gb": room, "context": 64, "batch": 2})
    left = amount.whole - amount.of(plan.dropped)
    assert left <= room * 1e9 < left + amount.worth[0]
