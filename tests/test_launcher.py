from __future__ import annotations

import pytest

from layercut.errors import RecipeError
from layercut.launcher import Place, count_neighbours, find_place

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4"}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN | MEETING])
def test_a_place_is_read_from_torchrun_and_from_slurm(environment: dict[str, str]):
    assert find_place(environment) == Place(rank=3, world=4, local_rank=1)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"WORLD_SIZE": "4"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "4"},  # an allocation for four, and a shell in it
    ],
)
def test_one_process_has_no_place(environment: dict[str, str]):
    assert find_place(environment) is None
    assert count_neighbours(environment) == 1


def test_srun_without_a_meeting_point_is_refused():
    with pytest.raises(RecipeError, match=r"srun started 4 processes .* Export MASTER_ADDR"):
        find_place(SRUN)


def test_neighbours_are_the_processes_of_one_machine():
    assert count_neighbours(TORCHRUN) == 2
    assert count_neighbours(SRUN | MEETING | {"SLURM_NTASKS_PER_NODE": "2"}) == 2
