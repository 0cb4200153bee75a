"""What torch, transformers, datasets and the Hub client are told before they are imported."""

from __future__ import annotations

import os

# transformers, datasets and the Hub client read these when they are imported: one progress
# display is enough, and their log lines would tear it.
QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
}

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which a user says how threads wait; OpenMP reads them when torch is imported."""


def set_up_libraries(*, offline: bool) -> None:
    """Let the libraries be quiet, and offline if asked; call it before they are imported."""
    let_threads_sleep()
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def let_threads_sleep() -> None:
    """Let a thread that waits for another one sleep, unless the user has chosen otherwise.

    By default it computes nothing for milliseconds instead. Beside other work that takes the core
    from the thread that it waits for, at each of the thousands of waits in a second. Neither the
    number of threads nor any result depends on it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
