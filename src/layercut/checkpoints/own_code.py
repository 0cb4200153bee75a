"""Code that a checkpoint brings along (``auto_map``): never run, and not needed if built in."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from layercut.checkpoints.folder import read_model_config


def is_built_in(config: Mapping[str, Any]) -> bool:
    """Whether the classes that a configuration brings along are now transformers' own.

    They are known by their names: other code for a built-in model type is another model.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type not in CONFIG_MAPPING:
        return False
    own = {
        "AutoConfig": CONFIG_MAPPING[model_type].__name__,
        "AutoModel": MODEL_MAPPING_NAMES.get(model_type),
        "AutoModelForCausalLM": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
    }
    brought = config.get("auto_map")
    return isinstance(brought, dict) and all(
        str(brought[key]).rpartition(".")[2].lower() == str(name).lower()
        for key, name in own.items()
        if key in brought
    )


def warn_of_own_code(folder: Path) -> None:
    """Say so where a checkpoint brings code along that is not run."""
    config = read_model_config(folder)
    if config.get("auto_map"):
        warnings.warn(
            f"the checkpoint names code of its own (auto_map), which is not run: it is read as "
            f"transformers' built-in '{config['model_type']}', and written as that, without "
            "auto_map.",
            stacklevel=3,
        )
