"""Which inference engines would mis-run a checkpoint, told from its config.json alone."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from layercut.checkpoints.config_edit import NO_MODEL, RESTORE, read_config
from layercut.checkpoints.export_conditions import ExportState
from layercut.checkpoints.export_rules import RULES
from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.hf_calls import guard
from layercut.errors import ModelError


@dataclass(frozen=True, slots=True)
class Finding:
    """An engine that would mis-run the checkpoint, why, what to do, and where that was read."""

    engine: str
    why: str
    remedy: str
    source: str


def export_check(folder: str | Path) -> tuple[Finding, ...]:
    """Engines that would mis-run the checkpoint in ``folder``; empty if none is known to.

    Args:
        folder: a checkpoint; only its config.json is read.

    Raises:
        ModelError: the configuration is missing, damaged, or of no built-in transformers model.
    """
    folder = Path(folder)
    path = folder / "config.json"
    _check_folder(folder)
    raw = read_json_object(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{path}: transformers does not know the model type {model_type!r}, so its layer "
            "pattern cannot be compared. Choose a checkpoint of a built-in model."
        )
    config = read_config(raw)
    with guard(f"{path}: {NO_MODEL}", ModelError, RESTORE):
        text = config.get_text_config(decoder=True)
        n_layers = getattr(text, "num_hidden_layers", None)
    if type(n_layers) is not int:
        raise ModelError(
            f"{path}: '{model_type}' has no stack of num_hidden_layers layers. Choose a checkpoint "
            "of a causal language model."
        )
    state = ExportState(text, _section(raw, config, text))
    return tuple(
        Finding(rule.engine, rule.why, rule.remedy, rule.source)
        for rule in RULES
        if (not rule.families or state.model_type in rule.families) and rule.condition(state)
    )


def _check_folder(folder: Path) -> None:
    """Refuse what is no folder, each with its reason."""
    try:
        mode = folder.stat().st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        problem = "does not exist" if missing else f"cannot be read ({error})"
        raise ModelError(f"{folder} {problem}. Name a checkpoint's folder.") from error
    if stat.S_ISDIR(mode):
        return
    if folder.suffix.lower() == ".gguf":
        raise ModelError(
            f"{folder} is a GGUF file: it holds what its converter made of config.json, which is "
            "what export-check compares. Name the folder of the checkpoint that it was made from."
        )
    raise ModelError(f"{folder} is not a folder. Name the folder that holds config.json.")


def _section(raw: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The text decoder's part of config.json."""
    if text is config:
        return raw
    inner = [part for part in raw.values() if isinstance(part, dict)]
    of_text = [part for part in inner if part.get("model_type") == text.model_type]
    named = raw.get("text_config")
    return of_text[0] if of_text else named if isinstance(named, dict) else raw
