"""Whether the machine has what a run will take, and where its weights should be."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from layercut.errors import ResourceError
from layercut.launcher import count_neighbours
from layercut.machine import available_memory_bytes
from layercut.pipeline.estimate import WRITE, Residency, RunEstimate

RESIDENCIES: tuple[Residency, ...] = ("resident", "streamed")
"""Those that a model can be loaded in."""
MEMORY_MARGIN = 1.3
"""Estimates of memory are at most so many times what is used; see docs/results."""
LESS_MEMORY = (
    "Lower calibration.n_sequences or calibration.micro_batch, set dtype: bfloat16 or "
    "recovery.options: {gradient_steps: 0}, or use a machine with more memory."
)
OTHER_DISK = "Name a folder on another disk in TMPDIR, or lower calibration.n_sequences."


@dataclass(frozen=True, slots=True)
class Available:
    """What the machine has.

    Attributes:
        device_bytes: free memory of the GPU; ``None`` on a CPU.
        host_bytes: memory that this process can still take beside the other ranks of its machine.
        temporary_bytes: free where temporary files are made.
    """

    device_bytes: int | None
    host_bytes: int
    temporary_bytes: int


def measure_available(device: torch.device) -> Available:
    """What is free now."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    return Available(
        device_bytes=free,
        host_bytes=available_memory_bytes() // count_neighbours(),
        temporary_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
    )


def choose_residency(
    estimate: RunEstimate,
    available: Available,
    modes: Sequence[Residency] = RESIDENCIES,
    *,
    residency: Literal["auto", "resident", "streamed"] = "auto",
) -> tuple[Residency, str]:
    """Where the weights should be, and why, in one line.

    Args:
        estimate: of both.
        available: what the machine has.
        modes: those that may be chosen.
        residency: what is asked for.
    """
    if residency != "auto":
        return residency, "as asked for"
    short = find_shortage(estimate, available, "resident", margin=1.0)
    if short is None:
        return "resident", "the weights and what the stages need fit into memory"
    if "streamed" not in modes:
        return "resident", "the only mode there is"
    return "streamed", f"with all weights in memory, {short.describe()}"


@dataclass(frozen=True, slots=True)
class Shortage:
    """What there is too little of.

    Attributes:
        stage: that needs it.
        what: "memory", "device memory", …
        needed: bytes.
        free: bytes.
        remedy: a sentence.
    """

    stage: str
    what: str
    needed: float
    free: float
    remedy: str

    def describe(self) -> str:
        """Without the remedy."""
        return (
            f"'{self.stage}' needs about {self.needed / 1e9:.2f} GB of {self.what}, and "
            f"{self.free / 1e9:.2f} GB are free"
        )


def find_shortage(
    estimate: RunEstimate, available: Available, mode: Residency, *, margin: float
) -> Shortage | None:
    """The first stage that needs more than there is; ``None`` if all is enough.

    Args:
        estimate: of the run.
        available: what the machine has.
        mode: where the weights are.
        margin: how many times too high an estimate of memory may be.
    """
    for stage in estimate.stages(mode):
        # The output's disk is for `check_disk_space`.
        spooled = 0 if stage.name == WRITE else stage.disk_bytes
        kinds = (
            ("device memory", stage.device_bytes, available.device_bytes, margin, LESS_MEMORY),
            ("memory", stage.host_bytes, available.host_bytes, margin, LESS_MEMORY),
            ("temporary files", spooled, available.temporary_bytes, 1.0, OTHER_DISK),
        )
        for what, needed, free, divisor, remedy in kinds:
            if needed and free is not None and needed / divisor > free:
                return Shortage(stage.name, what, needed / divisor, free, remedy)
    return None


def check_resources(
    estimate: RunEstimate,
    available: Available,
    mode: Residency,
    modes: Sequence[Residency] = RESIDENCIES,
) -> None:
    """Refuse a run that cannot end for want of memory or disk; warn of one that may not.

    Args:
        estimate: of the run.
        available: what the machine has.
        mode: where the weights will be.
        modes: where they could be.

    Raises:
        ResourceError: a stage needs more than there is, even if its estimate is as much too high
            as estimates are.
    """
    if short := find_shortage(estimate, available, mode, margin=MEMORY_MARGIN):
        others = [other for other in modes if other != mode]
        fits = [o for o in others if not find_shortage(estimate, available, o, margin=1.0)]
        remedy = f"Set residency: {fits[0]}." if fits else short.remedy
        raise ResourceError(f"{short.describe()}. {remedy}")
    if short := find_shortage(estimate, available, mode, margin=1.0):
        warnings.warn(f"memory may run out: {short.describe()}.", stacklevel=2)


def describe_run(estimate: RunEstimate, mode: Residency, reason: str) -> Iterator[str]:
    """Three lines for people: where and how, how long, how much."""
    place = "GPU" if estimate.device == "cuda" else "CPU"
    ranks = "1 rank" if estimate.ranks == 1 else f"{estimate.ranks} ranks"
    yield f"{mode} on the {place}, {ranks}: {reason}"
    longest = max(estimate.stages(mode), key=lambda stage: stage.seconds or 0.0)
    missing = estimate.missing(mode)
    without = f"; not estimated: {', '.join(missing)}" if missing else ""
    total = format_seconds(estimate.total_seconds(mode))
    most = f"longest: {longest.name} ({format_seconds(longest.seconds or 0)})"
    yield f"about {total}, {most}{without}"
    needs = (
        ("device memory", estimate.peak(mode, "device")),
        ("memory", estimate.peak(mode, "host")),
        ("disk", estimate.peak(mode, "disk")),
    )
    yield "up to " + ", ".join(f"{n / 1e9:.2f} GB of {name}" for name, n in needs if n)


def format_seconds(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
