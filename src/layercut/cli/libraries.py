"""What transformers, datasets and the Hub client are told before they are imported."""

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


def set_up_libraries(*, offline: bool) -> None:
    """Let the libraries be quiet, and offline if asked; call it before they are imported."""
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
