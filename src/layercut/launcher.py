"""Whether a launcher started this process as one of several, and as which one. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from layercut.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Place:
    """One process among those that share a run.

    Attributes:
        rank: its number among all.
        world: how many there are.
        local_rank: its number among those of its machine.
    """

    rank: int
    world: int
    local_rank: int


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place; ``None`` if it was not started as one of several.

    ``torchrun`` and ``accelerate launch`` say it by the same variables; ``srun`` by its own.

    Raises:
        RecipeError: ``srun`` started several processes that cannot find each other.
    """
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment:
        rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return Place(rank, world, int(environment.get("LOCAL_RANK", rank)))
    world = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if world == 1 or "SLURM_PROCID" not in environment:
        return None
    if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
        raise RecipeError(
            f"srun started {world} processes that cannot find each other. Export MASTER_ADDR, the "
            "first machine's name, and MASTER_PORT, a free port, or start one process."
        )
    rank = int(environment["SLURM_PROCID"])
    return Place(rank, world, int(environment.get("SLURM_LOCALID", rank)))


def count_neighbours(environment: Mapping[str, str] = os.environ) -> int:
    """Processes of the run on this machine, this one included: they share its memory."""
    if find_place(environment) is None:
        return 1
    named = environment.get("LOCAL_WORLD_SIZE") or environment.get("SLURM_NTASKS_PER_NODE")
    return int(named) if named and named.isdigit() else 1
