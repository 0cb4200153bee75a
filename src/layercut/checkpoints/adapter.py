"""A PEFT adapter of the dense model, renumbered for the pruned one; its tensors are copied.

Only what lies under the decoder's own full prefix follows the plan: an adapter may hold layers of
a vision tower, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercut.checkpoints.config_check import build_meta_model
from layercut.checkpoints.config_edit import read_config
from layercut.checkpoints.folder import check_plain_file, read_json_object
from layercut.checkpoints.preflight import read_layout
from layercut.checkpoints.safetensors_file import Shard, read_shard
from layercut.errors import ModelError, PlanError
from layercut.types import PruningPlan

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
WRAPPED = "base_model.model."
"""What PEFT puts in front of a module's path."""
PER_MODULE_TYPES = frozenset({"LORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT"})
"""``peft_type`` of adapters that consist of one group of tensors for each module."""
TUNED = re.compile(r"(.+?)\.(?:lora_|ia3_|hada_|lokr_|oft_|boft_)")
"""A tensor of such a group: the path of the module that it adapts, and what follows."""
NUMBER = re.compile(r"(?:^|\.)\d+(?:\.|$)")
FOREIGN_KEYS = ("layer_replication", "megatron_config", "arrow_config", "use_bdlora")
"""Settings by which layers are repeated, or modules are found by other rules."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as files.

    Attributes:
        folder: where it is.
        config: its parsed configuration.
        shard: its tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    shard: Shard

    @property
    def modules(self) -> set[str]:
        """Paths of the modules that it adapts, as they are called in the dense model."""
        names = (name.removeprefix(WRAPPED) for name in self.shard.tensors)
        return {match[1] for name in names if (match := TUNED.match(name))}


@dataclass(frozen=True, slots=True)
class Base:
    """The pruned model that an adapter is moved to.

    Attributes:
        folder: where it is.
        layers: the decoder's prefix in memory.
        modules: paths of all its modules.
    """

    folder: Path
    layers: str
    modules: frozenset[str]


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        ModelError: it holds none, a pickled one, or one that is not made of single modules.
    """
    path = folder / CONFIG_FILE
    if not path.exists():
        held = "a whole model" if (folder / "config.json").exists() else "no adapter"
        raise ModelError(
            f"{folder} holds {held}: there is no {CONFIG_FILE}. "
            "Name the folder that PEFT saved the adapter to."
        )
    config = read_json_object(path)
    if not (folder / WEIGHTS_FILE).exists():
        if (folder / PICKLE_FILE).exists():
            raise ModelError(
                f"{folder / PICKLE_FILE} is a pickle, which can run code when it is opened. "
                "Load the adapter with PEFT and save it again, as .safetensors."
            )
        raise ModelError(f"{folder} holds no {WEIGHTS_FILE}. Copy it beside {CONFIG_FILE}.")
    kind = config.get("peft_type")
    if kind not in PER_MODULE_TYPES:
        raise ModelError(
            f"{path}: layercut does not know how an adapter of type {kind!r} refers to layers "
            f"(known: {', '.join(sorted(PER_MODULE_TYPES))}). Train it again on the pruned model."
        )
    for key in FOREIGN_KEYS:
        if config.get(key):
            raise ModelError(
                f"{path} sets {key}, after which layers are not those of the model. "
                "Train the adapter again on the pruned model."
            )
    check_plain_file(folder / WEIGHTS_FILE)
    return Adapter(folder, config, read_shard(folder / WEIGHTS_FILE))


def read_base(folder: Path) -> Base:
    """What an adapter must fit.

    Raises:
        ModelError: the folder holds no model that transformers can build.
    """
    layout = read_layout(folder)
    model = build_meta_model(read_config(read_json_object(folder / "config.json")))
    modules = frozenset(name for name, _ in model.named_modules() if name)
    return Base(folder, layout.layers, modules)


def rename_tensors(adapter: Adapter, base: Base, plan: PruningPlan) -> dict[str, str]:
    """Old name → new name of every tensor that stays, in stored order.

    Raises:
        PlanError: the adapter has layers that the plan's model lacks, or none of them is kept.
        ModelError: a tensor belongs to no module of the pruned model.
    """
    names = {}
    numbers = set()
    for name in adapter.shard.tensors:
        if not name.startswith(WRAPPED):
            raise _unknown_tensor(adapter, name)
        path = name.removeprefix(WRAPPED)
        number = layer_number(path, base.layers)
        if number is not None and number >= plan.n_layers:
            raise PlanError(
                f"the plan is for {plan.n_layers} layers, and the adapter {adapter.folder} has "
                f"tensors for layer {number}. Use the plan by which its own base model was pruned."
            )
        if number is not None:
            numbers.add(number)
        new = rename(path, base.layers, plan)
        if new is not None:
            if not _has_module(new, base, inside=number is not None):
                raise _unknown_tensor(adapter, name)
            names[name] = WRAPPED + new
    if not numbers & set(plan.kept):
        raise PlanError(
            f"the adapter {adapter.folder} has no tensor for a kept layer of {base.layers}, so "
            "nothing of it would be left. Train another one on the pruned model."
        )
    whole = numbers == set(range(max(numbers) + 1)) and not _is_restricted(adapter.config)
    if whole and len(numbers) != plan.n_layers:
        raise PlanError(
            f"the adapter {adapter.folder} adapts all of {len(numbers)} layers, and the plan is "
            f"for {plan.n_layers}. Use the plan by which its own base model was pruned."
        )
    return names


def layer_number(path: str, layers: str) -> int | None:
    """The decoder layer that a module or tensor lies in, if it lies in one."""
    match = re.match(rf"{re.escape(layers)}\.(\d+)(?:\.|$)", path)
    return int(match[1]) if match else None


def rename(path: str, layers: str, plan: PruningPlan) -> str | None:
    """A path in the pruned model; ``None`` if its layer is dropped."""
    number = layer_number(path, layers)
    if number is None:
        return path
    new = plan.new_index.get(number)
    return None if new is None else f"{layers}.{new}{path[len(f'{layers}.{number}') :]}"


def _has_module(path: str, base: Base, *, inside: bool) -> bool:
    """Whether a tensor's path leads to a module; inside of a layer if it claims to."""
    parts = path.split(".")
    paths = (".".join(parts[:n]) for n in range(len(parts) - 1, 0, -1))
    found = next((p for p in paths if p in base.modules), "")
    if inside:
        return layer_number(found, base.layers) is not None
    return bool(found) and NUMBER.search(path.removeprefix(found)) is None


def _is_restricted(config: Mapping[str, Any]) -> bool:
    """Whether the configuration chooses among the layers."""
    targets = config.get("target_modules")
    named = isinstance(targets, str) or any(NUMBER.search(name) for name in targets or ())
    return named or config.get("layers_to_transform") is not None


def _unknown_tensor(adapter: Adapter, name: str) -> ModelError:
    return ModelError(
        f"{adapter.folder / WEIGHTS_FILE} holds {name!a}, which belongs to no module of the "
        "pruned model. Check that it is an adapter of that model."
    )
