"""Where a result came from: versions, machine, memory."""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from layercut.results import Provenance
from layercut.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "peft", "trl")
PROBE_SECONDS = 0.08
"""For each product that `measure_rates` repeats."""
PROBE_ROWS, PROBE_BYTES = 512, 1 << 25
PROBE_SIDE = 576
"""No power of two: rows that lie a multiple of 4 KiB apart share few lines of the cache."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What this machine does in a second while nothing else runs on it.

    Attributes:
        product: operations of a matrix product in the dtype that the model computes in.
        sum_product: operations of one in float32, as sums over tokens take.
        factor: operations, n³/3, of a float64 Cholesky factorisation.
        elements: elements through an activation function in the model's dtype.
        memory: bytes of a tensor that is read once.
        read: bytes of a weight file.
        hash: bytes through sha256.
    """

    product: float
    sum_product: float
    factor: float
    elements: float
    memory: float
    read: float
    hash: float


def provenance(command: str) -> Provenance:
    """Describe this process and this machine.

    Args:
        command: the exact command line that started the run.
    """
    versions = {"layercut": __version__, "python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in PACKAGES}
    versions["platform"] = platform.platform()
    return Provenance(__version__, versions, _hardware(), command)


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_rss() -> None:
    """Let the peak be counted from now on; without effect where the system cannot."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def restart_peak_rss(so_far: int) -> int:
    """The highest peak memory until now, in bytes; from here on it is measured anew.

    Args:
        so_far: an earlier peak.
    """
    highest = max(so_far, peak_rss_bytes())
    gc.collect()  # what earlier stages left in cycles is not the next one's
    reset_peak_rss()
    return highest


def available_memory_bytes() -> int:
    """Memory that this process can still take: the system's, within its control group's limit."""
    free = [int(psutil.virtual_memory().available)]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        free.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    return max(0, min(free))


def measure_rates(
    path: Path, width: int, inner: int, dtype: torch.dtype, device: torch.device
) -> Rates:
    """Measure a few products of a model's shape and one read of its files, about a second in all.

    On a CPU the clock is this thread's own: what other programs take is not this machine's speed.

    Args:
        path: a weight file.
        width: of the residual stream.
        inner: what the MLP's last projection reads.
        dtype: that the model computes in.
        device: where it computes.
    """
    read, hashed = _measure_reading(path)
    return Rates(**_measure_products(width, inner, dtype, device), read=read, hash=hashed)


@functools.cache
@torch.no_grad()
def _measure_products(
    width: int, inner: int, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """The rates of arithmetic; once for a process and a shape."""
    place: dict[str, Any] = {"device": device}
    rows = torch.ones(PROBE_ROWS, width, dtype=dtype, **place)
    weight = torch.ones(inner, width, dtype=dtype, **place)
    hidden = torch.ones(4 * PROBE_ROWS, inner, dtype=dtype, **place)
    states = torch.ones(PROBE_ROWS, inner, **place)
    gram = torch.eye(PROBE_SIDE, dtype=torch.float64, **place)
    large = torch.ones(PROBE_BYTES // 4, **place)

    def rate(amount: float, run: Callable[[], object]) -> float:
        return amount / _best_seconds(run, device)

    product = 2.0 * rows.shape[0] * weight.numel()
    return {
        "product": rate(product, lambda: rows @ weight.T),
        "sum_product": rate(2.0 * PROBE_ROWS * inner * inner, lambda: states.T @ states),
        "factor": rate(PROBE_SIDE**3 / 3, lambda: torch.linalg.cholesky_ex(gram)),
        "elements": rate(hidden.numel(), lambda: torch.nn.functional.silu(hidden) * hidden),
        "memory": rate(PROBE_BYTES, large.sum),
    }


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of several runs behind a first one, which also starts the threads."""
    on_gpu = device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    best, end = float("inf"), 0.0
    run()
    while (now := clock()) < end or best == float("inf"):
        end = end or now + PROBE_SECONDS
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, clock() - now)
    return max(best, 1e-9)


def _measure_reading(path: Path) -> tuple[float, float]:
    """Bytes per second of reading the start of a file, and of hashing it."""
    begun = time.perf_counter()
    with path.open("rb") as file:
        content = file.read(PROBE_BYTES)
    read = time.perf_counter() - begun
    begun = time.thread_time()
    hashlib.sha256(content).digest()
    hashed = time.thread_time() - begun
    return len(content) / max(read, 1e-9), len(content) / max(hashed, 1e-9)


def _hardware() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    """The processor's marketing name where Linux tells it, else its architecture."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
