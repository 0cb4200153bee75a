"""Ghosted layers: against least squares, on planted maps, cut after cut."""

from __future__ import annotations

import pytest
import torch

from conftest import plan_of
from layercut.errors import RecipeError
from layercut.models.view import DecoderView
from layercut.recovery.methods.ghost import fit_map
from layercut.recovery.runtime_maps import applied_maps
from layercut.types import CalibrationBatches, RuntimeMaps
from repairs import fitted_maps
from spools import spool


def random_rows(n: int = 400, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=generator)
    planted = torch.eye(width) + 0.5 * torch.randn(width, width, generator=generator)
    return x, planted


def test_ghost_equals_stacked_least_squares():
    x, planted = random_rows()
    target = x @ planted + 0.2 * torch.randn(x.shape, generator=torch.manual_seed(1))
    ridge = (0.1 * float(x.double().square().sum()) / 8) ** 0.5
    rows = torch.cat([x.double(), ridge * torch.eye(8, dtype=torch.float64)])
    sides = torch.cat([(target - x).double(), torch.zeros(8, 8, dtype=torch.float64)])
    expected = torch.eye(8) + torch.linalg.lstsq(rows, sides).solution.float()
    found = fit_map(spool(target - x), spool(x), 0.1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_ghost_finds_a_planted_map():
    x, planted = random_rows()
    found = fit_map(spool(x @ planted - x), spool(x), 1e-9)
    torch.testing.assert_close(found, planted, rtol=1e-4, atol=1e-4)


def test_ghosts_are_fitted_in_the_model_repaired_so_far(
    view: DecoderView, batches: CalibrationBatches
):
    plan = plan_of(1, 3, 4)
    maps = fitted_maps(view, plan, batches, "ghost", epsilon=1e-3).maps
    states = view.model(batches.input_ids, output_hidden_states=True, use_cache=False).hidden_states
    target = states[5].flatten(0, 1).double()
    first = RuntimeMaps({0: maps[0]}, "ghost")
    with view.skipping(plan.dropped), applied_maps(view, plan, first):
        pruned = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    x = pruned.hidden_states[3].flatten(0, 1).double()
    ridge = (1e-3 * x.square().sum() / 16) ** 0.5
    rows = torch.cat([x, ridge * torch.eye(16, dtype=torch.float64)])
    sides = torch.cat([target - x, torch.zeros(16, 16, dtype=torch.float64)])
    expected = torch.eye(16) + torch.linalg.lstsq(rows, sides).solution.float()
    torch.testing.assert_close(maps[2], expected, rtol=1e-3, atol=1e-4)


def test_unknown_methods_and_penalties_are_refused(view: DecoderView, batches: CalibrationBatches):
    with pytest.raises(RecipeError, match="unknown recovery method 'ghots'; did you mean 'ghost'"):
        fitted_maps(view, plan_of(2), batches, "ghots")
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RecipeError, match=r"recovery\.options\.epsilon"):
            fitted_maps(view, plan_of(2), batches, "ghost", epsilon=epsilon)
