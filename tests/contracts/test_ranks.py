"""What holds for every method on two ranks: the result of one, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import save_tiny
from layercut.models.load import load
from layercut.registry import FUNCTIONS, describe
from rank_runs import N_LAYERS, compute_or_refuse, free_port, list_computations, run_all_methods


@pytest.fixture(scope="module")
def shallow_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("shallow"), num_hidden_layers=N_LAYERS)


@pytest.fixture(scope="module")
def of_two_ranks(shallow_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found, by residency and method."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_all_methods, (free_port(), shallow_llama, folder), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_every_method_gives_on_two_ranks_what_it_gives_on_one_or_is_refused_by_name(
    shallow_llama: Path, of_two_ranks: list[Any], residency: str
):
    view = load(str(shallow_llama), dtype="float32", residency=residency)
    computations = list_computations(view)
    assert of_two_ranks[0][residency].keys() == computations.keys()
    wrong = []
    for name, compute in computations.items():
        results = [found[residency][name] for found in of_two_ranks]
        stage, method = name.split()[:2]
        if stage in FUNCTIONS and not describe(stage, method).several_ranks:
            refusal = f"'{method}' runs in one process, and 2 were started"
            assert all(refusal in result for result in results), results
            continue
        expected = compute_or_refuse(compute)
        # A step's direction is kept in bfloat16: where two round apart, 2⁻⁸ · η of a weight remain.
        limit = 1e-5 if stage == "gradient" else 1e-6
        for result in results:
            wrong += [(name, *found) for found in differences(result, expected, limit)]
    assert not wrong


def test_ranks_with_other_texts_are_all_refused(of_two_ranks: list[Any]):
    for found in of_two_ranks:
        assert found["other text"].startswith("rank 1 has another calibration text than rank 0. ")


def differences(found: Any, expected: Any, limit: float) -> list[Any]:
    """Whatever is not the same within a part of the largest number."""
    if isinstance(found, str) or isinstance(expected, str):
        return [] if found == expected else [(found, expected)]
    if found.keys() != expected.keys():
        return [(found.keys(), expected.keys())]
    sizes = {key: tensor.double().abs() for key, tensor in expected.items() if tensor.numel()}
    errors = {key: (found[key] - expected[key]).double().abs().max() for key in sizes}
    return [
        (key, float(error / sizes[key].max()))
        for key, error in errors.items()
        if not error <= limit * sizes[key].max()
    ]
