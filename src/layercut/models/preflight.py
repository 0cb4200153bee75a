"""From a folder to a model, strictly: every refusal comes before any weight is read.

transformers fills missing tensors with random numbers and drops surplus ones with a log line;
here the names and shapes in the files' headers must be exactly those of the configured model.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from layercut.errors import ModelError
from layercut.models import shards
from layercut.models.families import FamilyRules, rules_for
from layercut.models.quantised import check_names, is_quantised
from layercut.models.shards import StoredTensor

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
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
PRUNE_BY_PLAN = (
    "Score the original, unquantised checkpoint, then prune this one by `layercut prune MODEL "
    "--plan plan.json`."
)
REFUSED_KEYS = {
    "auto_map": "needs its own code (auto_map), which layercut does not run. "
    "Use a checkpoint of a built-in transformers model.",
    "quantization_config": f"is quantised (quantization_config). {PRUNE_BY_PLAN}",
    "transformers_weights": "redirects its weights to another file (transformers_weights). "
    "Remove that key and name the file model.safetensors.",
}
# What transformers raises for a configuration with impossible values.
INVALID = (
    StrictDataclassError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
)
MAX_NAMED = 3
"""Tensors that an error message lists."""


def check_folder(
    folder: Path, *, as_files: bool = False
) -> tuple[FamilyRules, dict[str, StoredTensor]]:
    """Refuse what cannot be loaded and pruned exactly; reads configuration and headers only.

    Args:
        folder: a local checkpoint.
        as_files: its tensors are only to be copied, so they may be quantised.

    Returns:
        The family's row, and every stored tensor by name.

    Raises:
        ModelError: the configuration, the weights' headers or the tokenizer files do not do.
    """
    config = shards.read_json_object(folder / "config.json")
    rules = check_config(config, folder / "config.json", quantised=as_files)
    for path in (*folder.glob("*.json"), *tokenizer_files(folder)):
        shards.check_plain_file(path)
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
    stored = stored_tensors(folder)
    if as_files and is_quantised(config, stored):
        check_names(expected_shapes(folder), stored, rules)
        return rules, stored
    for name, tensor in stored.items():
        if tensor.dtype not in shards.DTYPES:
            raise ModelError(
                f"{tensor.path} stores {name} as {tensor.dtype}, so the weights are quantised. "
                f"{PRUNE_BY_PLAN}"
            )
    check_tensors(folder, stored, rules)
    return rules, stored


def check_config(config: Mapping[str, Any], path: Path, *, quantised: bool = False) -> FamilyRules:
    """The family's row, if this parsed config.json is one that can be pruned.

    Args:
        config: its content.
        path: where it is.
        quantised: weights may be quantised.

    Raises:
        ModelError: remote code, quantisation, an encoder-decoder, or an unsupported family.
    """
    for key, why in REFUSED_KEYS.items():
        if config.get(key) and not (quantised and key == "quantization_config"):
            raise ModelError(f"the model of {path} {why}")
    model_type = config.get("model_type")
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
    return rules_for(model_type)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint by name, from the headers alone.

    Raises:
        ModelError: a file is damaged, or two files hold the same tensor.
    """
    stored: dict[str, StoredTensor] = {}
    for path in shards.weight_files(folder):
        tensors = shards.read_shard(path).tensors
        twice = sorted(stored.keys() & tensors.keys())
        if twice:
            raise ModelError(
                f"{path} and {stored[twice[0]].path.name} both hold {twice[0]}. "
                "Download the checkpoint again."
            )
        stored |= tensors
    return stored


def tokenizer_files(folder: Path) -> list[Path]:
    """Existing files that make up the tokenizer, sorted by name."""
    return matching_files(folder, TOKENIZER_FILES)


def matching_files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Paths below ``folder`` that match one of ``patterns``, without code and pickles; sorted."""
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.suffix not in {".py", ".bin", ".safetensors"})


def expected_shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name → (shape, may be absent) of every tensor the configured model has.

    Raises:
        ModelError: transformers cannot build a model from the configuration.
    """
    try:
        with quiet(), torch.device("meta"):
            config = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            model = AutoModelForCausalLM.from_config(config)
    except INVALID as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder / 'config.json'} does not describe a model: {reason}. "
            "Restore the original configuration."
        ) from error
    tied = model.all_tied_weights_keys
    return {name: (tuple(t.shape), name in tied) for name, t in model.state_dict().items()}


def load_strictly(
    folder: Path, dtype: torch.dtype, device: torch.device, attention: str | None = None
) -> Any:
    """The model of a checkpoint; no tensor may be missing, surplus or of another shape.

    Args:
        folder: a local checkpoint.
        dtype: of the loaded weights.
        device: where they go.
        attention: attention implementation; transformers' choice if ``None``.

    Raises:
        ModelError: keys or shapes differ from the configured model's.
    """
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation=attention,
            )
    except INVALID as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{folder} cannot be loaded: {reason}.") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            names = _some(sorted(str(key) for key in info[kind]))
            raise ModelError(f"{folder}: {kind.replace('_', ' ')} after loading: {names}.")
    return model.to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars, advice and warnings from the terminal."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    before = logging.root.manager.disable
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def check_tensors(folder: Path, stored: Mapping[str, StoredTensor], rules: FamilyRules) -> None:
    """Refuse names and shapes that are not exactly those of the configured model.

    Raises:
        ModelError: layers or tensors are missing or surplus, or have another shape.
    """
    expected = expected_shapes(folder)
    wanted, found = count_layers(expected, rules), count_layers(stored, rules)
    if wanted != found:
        raise ModelError(
            f"config.json says {rules.count} = {wanted}, the weights hold {found} layers. "
            "Use the configuration that belongs to these weights."
        )
    missing = [name for name, (_, tied) in expected.items() if not tied and name not in stored]
    if missing:
        raise ModelError(
            f"the weights lack {_some(missing)}. Download the checkpoint again, or use the one "
            "of the causal language model."
        )
    # Old checkpoints store the rotary table of every layer; it is computed today.
    surplus = [n for n in stored if n not in expected and not n.endswith("rotary_emb.inv_freq")]
    if surplus:
        raise ModelError(
            f"the weights hold {_some(surplus)}, which the configured model does not have. "
            "Use the configuration that belongs to these weights."
        )
    for name, tensor in stored.items():
        if name in expected and tensor.shape != expected[name][0]:
            raise ModelError(
                f"{tensor.path.name}: {name} has shape {list(tensor.shape)}, config.json makes it "
                f"{list(expected[name][0])}. Use the configuration that belongs to these weights."
            )


def count_layers(names: Iterable[str], rules: FamilyRules) -> int:
    """Layers that tensors of these names belong to."""
    pattern = re.compile(rf"{re.escape(rules.layers)}\.(\d+)\.")
    return len({found.group(1) for name in names if (found := pattern.match(name))})


def _some(names: list[str]) -> str:
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")
