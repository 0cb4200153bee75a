"""One ridge fit and the walk that uses it: against least squares and on planted data."""

from __future__ import annotations

import pytest
import torch

from layercut.engine.residual_stream import ResidualStream
from layercut.models.view import DecoderView
from layercut.models.writers import find_writers
from layercut.recovery import layer_fit, ridge
from layercut.recovery.layer_fit import mask_held_out_rows
from layercut.recovery.paired_walk import KeptLayer
from layercut.recovery.writer_fit import WriterRows, fit_ridge_update
from layercut.types import CalibrationBatches
from spools import spool


def planted(n: int = 600, width: int = 6, out: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, width, generator=generator)
    change = torch.randn(out, width, generator=generator)
    outputs = torch.randn(n, out, generator=generator)
    return a, outputs, outputs + a @ change.T, change


def solve(
    a: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor
) -> torch.Tensor | None:
    rows = WriterRows(spool(a), spool(outputs), spool(outputs), spool(targets), held_out)
    return fit_ridge_update(rows, 1.0, torch.device("cpu"))


EVERY_FOURTH = torch.arange(600) % 4 == 3


def test_planted_change_is_found():
    a, outputs, targets, change = planted()
    solved = solve(a, outputs, targets, EVERY_FOURTH)
    assert solved is not None
    torch.testing.assert_close(solved.float(), change, rtol=0, atol=0.02)


def test_solution_equals_weighted_least_squares(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ridge, "PENALTY_GRID", (0.1,))
    monkeypatch.setattr(ridge, "SMALLER_PENALTIES", ())
    a, outputs, targets, _ = planted()
    targets = targets + 0.1 * torch.randn(targets.shape, generator=torch.manual_seed(1))
    weight = 1 / targets[~EVERY_FOURTH].double().norm(dim=1, keepdim=True)
    rows = a[~EVERY_FOURTH].double() * weight
    errors = (targets - outputs)[~EVERY_FOURTH].double() * weight
    penalty = (0.1 * float(rows.square().sum()) / 6) ** 0.5 * torch.eye(6, dtype=torch.float64)
    stacked = torch.cat([errors, torch.zeros(6, 4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(torch.cat([rows, penalty]), stacked).solution.T
    solved = solve(a, outputs, targets, EVERY_FOURTH)
    torch.testing.assert_close(solved, expected, rtol=1e-3, atol=1e-4)


def test_one_massive_token_does_not_decide_the_fit():
    # Its own relation contradicts all others; with weights 1/‖target‖² it counts as one token.
    a, outputs, targets, change = planted()
    a[0] *= 1000
    targets[0] = outputs[0] - a[0] @ change.T
    solved = solve(a, outputs, targets, EVERY_FOURTH)
    assert solved is not None
    assert float((solved.float() - change).norm() / change.norm()) < 0.5


def test_noise_is_not_fitted():
    a, outputs, _, _ = planted(n=40)
    targets = outputs + torch.randn(outputs.shape, generator=torch.manual_seed(3))
    held_out = torch.arange(40) % 2 == 1
    a = torch.randn(40, 30, generator=torch.manual_seed(4))
    solved = solve(a, outputs, targets, held_out)
    gains = (targets - outputs)[held_out]
    weight = 1 / targets[held_out].norm(dim=1, keepdim=True)
    before = float((gains * weight).square().sum())
    if solved is not None:
        after = float(((gains - a[held_out] @ solved.float().T) * weight).square().sum())
        assert after < before


def test_nothing_to_learn_changes_nothing():
    a, outputs, _, _ = planted()
    assert solve(a, outputs, outputs, EVERY_FOURTH) is None


def test_walk_moves_the_stream_as_the_patched_model_does(
    view: DecoderView, batches: CalibrationBatches
):
    # The down-projection's change is added to the stream without a second pass: compare with one.
    held = mask_held_out_rows(batches, 4)
    dense = ResidualStream(view, batches)
    dense.advance(0)
    pruned = dense.fork()
    for layer in range(1, 4):
        dense.advance(layer)
    kept = KeptLayer(1, True, dense, pruned)
    tensors = layer_fit._refit_layer(view, kept, held, find_writers(view)[1]).tensors
    assert tensors
    again = ResidualStream(view, batches)
    again.advance(0)
    with view.patched(tensors):
        again.advance(1)
    torch.testing.assert_close(pruned.states.rows, again.states.rows, rtol=1e-4, atol=1e-4)
