"""From a folder to a model, strictly: every refusal comes before any weight is read.

transformers fills missing tensors with random numbers and drops surplus ones with a log line;
here the names and shapes in the files' headers must be exactly those of the configured model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layercut.checkpoints.config_check import build_meta_model
from layercut.checkpoints.config_counts import check_layer_count
from layercut.checkpoints.config_edit import get_section, read_config, section_path
from layercut.checkpoints.families import ALWAYS_CAUSAL, ENCODER_COUNTS, find_rules
from layercut.checkpoints.folder import (
    check_plain_file,
    read_json_object,
    read_model_config,
)
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.layout import Layout, find_layout
from layercut.checkpoints.own_code import is_built_in
from layercut.checkpoints.quantization import check_names, is_packed, is_quantised
from layercut.checkpoints.safetensors_file import StoredTensor, read_stored_tensors
from layercut.checkpoints.tensor_names import check_weights, find_surplus, is_ignored, some
from layercut.checkpoints.weight_names import Conversion, build_whole_model
from layercut.errors import ModelError

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "tekken.json",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
)
"""Patterns of what a tokenizer may consist of; code (.py) and pickles are never among it."""
LEGAL_FILES = (
    "[Ll][Ii][Cc][Ee][Nn][CcSs][Ee]*",
    "LICENSES/*",
    "[Nn][Oo][Tt][Ii][Cc][Ee]*",
    "COPYING*",
    "USE_POLICY*",
)
COPIED = (
    "generation_config.json",
    "chat_template.json",
    "processor_config.json",
    "*preprocessor_config.json",
    *LEGAL_FILES,
    *TOKENIZER_FILES,
)
"""What a pruned checkpoint takes from its source byte for byte, beside weights and config.json."""
SMALL_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
PRUNE_BY_PLAN = (
    "Score the original, unquantised checkpoint, then prune this one by `layercut prune MODEL "
    "--plan plan.json`."
)
REFUSED_KEYS = {
    "quantization_config": f"is quantised (quantization_config). {PRUNE_BY_PLAN}",
    "transformers_weights": "redirects its weights to another file (transformers_weights). "
    "Remove that key and name the file model.safetensors.",
}


def check_folder(folder: Path, *, as_files: bool = False) -> tuple[Layout, dict[str, StoredTensor]]:
    """Refuse what cannot be loaded and pruned exactly; reads configuration and headers only.

    Args:
        folder: a local checkpoint.
        as_files: its tensors are only to be copied, so they may be quantised.

    Returns:
        Where its layers are, and every stored tensor by name.

    Raises:
        ModelError: the configuration, the weights' headers or the tokenizer files do not do.
    """
    raw = read_model_config(folder)
    check_config(raw, folder / "config.json", quantised=as_files)
    for path in (*folder.glob("*.json"), *list_matching_files(folder, COPIED)):
        check_plain_file(path)
    _check_small_files(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} holds an adapter beside the model (adapter_config.json). "
            "Merge the adapter into the weights first."
        )
    if not any((folder / name).exists() for name in VOCABULARIES):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json). "
            "Copy the tokenizer files of the model into it."
        )
    stored = read_stored_tensors(folder)
    check_layer_count(raw, len(stored))
    config = read_config(raw)
    text = get_section(config, section_path(config))
    if getattr(text, "is_decoder", None) is False and text.model_type not in ALWAYS_CAUSAL:
        raise ModelError(
            f"{folder / 'config.json'}: this '{text.model_type}' is an encoder (is_decoder is "
            "false), whose tokens see later ones. Choose a decoder-only model."
        )
    model = build_meta_model(config)
    layout = find_layout(config, model, stored)
    if as_files and is_quantised(raw, stored):
        check_names(compute_expected_shapes(model), stored, layout, raw, find_models(config, model))
        return layout, stored
    for name, tensor in stored.items():
        if is_packed(name, tensor):
            raise ModelError(
                f"{tensor.path} stores {name} as {tensor.dtype}, so the weights are quantised. "
                f"{PRUNE_BY_PLAN}"
            )
    check_weights(config, model, stored, layout)
    return layout, stored


def _check_small_files(folder: Path) -> None:
    """Refuse damaged files that transformers passes over, or that show only when it loads them.

    It takes a generation_config.json that is not JSON for none at all, without a word.
    """
    for name in SMALL_FILES:
        if (folder / name).exists():
            read_json_object(folder / name)
    path = folder / "generation_config.json"
    if path.exists():
        with guard(f"{path} does not do", ModelError, "Correct it, or remove it."):
            GenerationConfig.from_pretrained(folder, local_files_only=True)


def find_models(config: Any, model: Any) -> tuple[Conversion, ...]:
    """How transformers names the tensors: in the causal language model, and in that of all parts.

    Args:
        config: the checkpoint's configuration.
        model: the causal language model of it.
    """
    whole = build_whole_model(config, model)
    return tuple(Conversion(part) for part in (model, whole) if part is not None)


def read_models(folder: Path) -> Sequence[Conversion]:
    """How transformers names a checkpoint's tensors, as `find_models`.

    Raises:
        ModelError: the configuration is damaged.
    """
    config = read_config(read_json_object(folder / "config.json"))
    return find_models(config, build_meta_model(config))


def read_layout(folder: Path) -> Layout:
    """Where a checkpoint keeps its layers, from its configuration and headers.

    Raises:
        ModelError: the configuration or a header is damaged.
    """
    config = read_config(read_json_object(folder / "config.json"))
    return find_layout(config, build_meta_model(config), read_stored_tensors(folder))


def check_tensors(folder: Path, layout: Layout) -> None:
    """Refuse names and shapes that are not exactly those of the configured model.

    Raises:
        ModelError: layers or tensors are missing or surplus, or have another shape.
    """
    config = read_config(read_json_object(folder / "config.json"))
    check_weights(config, build_meta_model(config), read_stored_tensors(folder), layout)


def compute_expected_shapes(model: Any) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name in the state dict → (shape, may be absent from the files)."""
    tied = model.all_tied_weights_keys
    return {name: (tuple(t.shape), name in tied) for name, t in model.state_dict().items()}


def check_config(config: Mapping[str, Any], path: Path, *, quantised: bool = False) -> None:
    """Refuse a parsed config.json of a model that cannot be pruned.

    Args:
        config: its content.
        path: where it is.
        quantised: weights may be quantised.

    Raises:
        ModelError: remote code, quantisation, an encoder-decoder, or an unsupported family.
    """
    model_type = config.get("model_type")
    if config.get("auto_map") and not is_built_in(config):
        raise ModelError(
            f"the model of {path} needs its own code (auto_map), which layercut does not run. "
            "Use a checkpoint of a built-in transformers model."
        )
    for key, why in REFUSED_KEYS.items():
        if config.get(key) and not (quantised and key == "quantization_config"):
            raise ModelError(f"the model of {path} {why}")
    if config.get("is_encoder_decoder"):
        raise ModelError(
            f"{path}: '{model_type}' is an encoder-decoder; layercut prunes causal language "
            "models only. Choose a decoder-only model."
        )
    if not isinstance(model_type, str):
        raise ModelError(f"{path} names no model_type. Add the one of the original model.")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{path}: transformers {transformers.__version__} does not know the model type "
            f"'{model_type}'. Upgrade transformers, or choose another model."
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{path}: '{model_type}' is not a causal language model in transformers: "
            "AutoModelForCausalLM does not load it, and layercut prunes what it loads. Choose a "
            "decoder-only model, or save the text decoder as a checkpoint of its own."
        )
    if any(hasattr(CONFIG_MAPPING[model_type], key) for key in ENCODER_COUNTS):
        raise ModelError(
            f"{path}: '{model_type}' describes an encoder beside its decoder, and its number of "
            "layers is the encoder's; layercut prunes decoder-only models. "
            "Choose a decoder-only model."
        )
    if refused := find_rules(model_type).refused:
        raise ModelError(
            f"{path}: no layer of '{model_type}' can be dropped exactly: {refused}. "
            "Choose another model."
        )


def list_tokenizer_files(folder: Path) -> list[Path]:
    """Existing files that make up the tokenizer, sorted by name."""
    return list_matching_files(folder, TOKENIZER_FILES)


def list_matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Paths below ``folder`` that match one of ``patterns``, without code and pickles; sorted.

    A folder counts only if its name has a suffix, which makes it one where a file is meant.
    """
    paths = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(
        path
        for path in paths
        if path.suffix not in {".py", ".bin", ".safetensors"} and (path.suffix or not path.is_dir())
    )


def load_strictly(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | dict[str, str] | None = None,
) -> Any:
    """The model of a checkpoint; no tensor may be missing, surplus or of another shape.

    Args:
        folder: a local checkpoint.
        dtype: of the loaded weights.
        device: where they go.
        attention: attention implementation, perhaps by part; transformers' choice if ``None``.

    Raises:
        ModelError: keys or shapes differ from the configured model's.
    """
    with guard(f"{folder} cannot be loaded", ModelError, "See that its files belong together."):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation=attention,
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(key) for key in info[kind] if not is_ignored(str(key), model.config))
        if names and kind == "unexpected_keys":
            config = read_config(read_json_object(folder / "config.json"))
            names = find_surplus(config, model, names, read_stored_tensors(folder))
        if names:
            raise ModelError(f"{folder}: {kind.replace('_', ' ')} after loading: {some(names)}.")
    return model.to(device)
