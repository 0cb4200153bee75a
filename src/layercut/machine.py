"""Where a result came from: versions, machine, memory."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import resource
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from layercut.results import Provenance
from layercut.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "peft", "trl")


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
