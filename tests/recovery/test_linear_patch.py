"""LinearPatch: its rotation, by hand and on planted gains."""

from __future__ import annotations

import pytest
import torch

from layercut.recovery.methods.linear_patch import fit_map, hadamard
from spools import spool


@pytest.mark.parametrize("width", [1, 2, 8, 12, 16, 24, 576])
def test_hadamard_is_orthogonal_and_even(width: int):
    matrix = hadamard(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width), rtol=0, atol=1e-5)
    largest = max(2**i for i in range(11) if width % 2**i == 0)
    values = set(matrix.abs().flatten().tolist())
    assert max(values) == pytest.approx(largest**-0.5)
    assert int((matrix != 0).sum()) == width * largest


def test_hadamard_by_hand():
    expected = [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    assert (2 * hadamard(4)).tolist() == expected
    # 6 = 3 blocks of 2
    assert (2**0.5 * hadamard(6)[2]).tolist() == pytest.approx([0, 0, 1, 1, 0, 0])


def test_linear_patch_finds_a_planted_gain():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    rotation = hadamard(8)
    gains = torch.linspace(0.5, 2, 8)
    planted = rotation @ torch.diag(gains) @ rotation.T
    found = fit_map(spool(x), spool(x @ planted), 50)
    torch.testing.assert_close(found, planted, rtol=1e-4, atol=1e-5)


def test_linear_patch_by_hand():
    # d = 2: x = (1, 0), target = (0, 2): x·H = (1, 1)/√2, target·H = (2, −2)/√2: r = (2, 2)
    found = fit_map(spool(torch.tensor([[1.0, 0.0]])), spool(torch.tensor([[0.0, 2.0]])), 1)
    torch.testing.assert_close(found, 2 * torch.eye(2))
