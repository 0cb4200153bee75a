"""What a checkpoint is and whether it can be pruned, from its configuration and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layercut.checkpoints.config_check import build_meta_model
from layercut.checkpoints.config_edit import read_config
from layercut.checkpoints.folder import list_weight_files, read_model_config
from layercut.checkpoints.layer_names import CONFIG_KEYS
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.preflight import check_folder, compute_expected_shapes
from layercut.checkpoints.quantization import is_quantised
from layercut.checkpoints.resolve import find_folder
from layercut.checkpoints.safetensors_file import StoredTensor, read_shard
from layercut.errors import ModelError
from layercut.machine import available_memory_bytes
from layercut.models.load import find_device, load_tokenizer
from layercut.models.special_tokens import text_frame
from layercut.pipeline.effort import describe_efforts
from layercut.pipeline.estimate import estimate_run, measure_checkpoint
from layercut.pipeline.resources import choose_residency, describe_run, measure_available
from layercut.recipe.recipe import Recipe
from layercut.registry import describe

NEEDS_PREVIOUS = "the default recovery needs a kept layer before every cut"
TYPE_KEYS = ("layer_types", "mlp_layer_types")


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    Attributes:
        kind: its types as the configuration names them, empty if all layers are of one.
        n_parameters: before any quantisation.
        pinned: why it must stay, or an empty string.
    """

    kind: str
    n_parameters: int
    pinned: str = ""


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint, seen from outside.

    Attributes:
        model: as the user called it.
        model_type: the family.
        architecture: the class that its configuration names.
        n_layers: decoder layers, where the configuration says.
        n_parameters: tied ones counted once; without an exact model, the numbers stored.
        stored: type → bytes on disk.
        n_files: weight files.
        quantisation: the method, or an empty string.
        tied: whether the output head is the embedding.
        context: tokens, where the configuration says.
        refusal: why it cannot be scored and pruned, or an empty string.
        by_plan: whether `layercut prune` can apply a plan to it nevertheless.
        layers: each layer; empty where the family's layout is not known.
        scoring: memory_bytes, seconds and n_tokens of the default selection on this machine.
        estimate: every stage of the default recipe on this machine, as in ``result.json``.
        summary: the same in three lines.
        efforts: what ``--effort`` stands for on this machine, by its name.
        keep_one_of: layers of which at least one must stay; empty where there is no such need.
        leading_token: what starts every window of text; ``None``: nothing, or no tokenizer is read.
        document_separator: what stands between documents; ``None`` likewise.
    """

    model: str
    model_type: str
    architecture: str
    n_layers: int | None
    n_parameters: int
    stored: Mapping[str, int]
    n_files: int
    quantisation: str
    tied: bool
    context: int | None
    refusal: str
    by_plan: bool
    layers: tuple[Layer, ...] = ()
    scoring: Mapping[str, float] = field(default_factory=dict)
    leading_token: str | None = None
    document_separator: str | None = None
    estimate: Mapping[str, Any] = field(default_factory=dict)
    summary: tuple[str, ...] = ()
    efforts: Mapping[str, str] = field(default_factory=dict)
    keep_one_of: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The content of ``--json``."""
        content = {name: getattr(self, name) for name in self.__slots__ if name != "summary"}
        layers = [
            {"type": e.kind or None, "n_parameters": e.n_parameters, "pinned": e.pinned or None}
            for e in self.layers
        ]
        return {"schema": 1, **content, "prunable": not self.refusal, "layers": layers}


def inspect(model: str, *, revision: str | None = None) -> Inspection:
    """Describe a checkpoint without loading a weight.

    Args:
        model: ``embedded:smollm2-135m``, a local checkpoint folder, or a Hub name.
        revision: branch, tag or commit of a Hub model.

    Raises:
        ModelError: there is no such model, or its configuration or a header is damaged.
        NetworkError: the Hub is needed and does not give the model.
    """
    folder = find_folder(model, revision)
    raw = read_model_config(folder)
    stored: dict[str, StoredTensor] = {}
    for path in list_weight_files(folder):
        stored |= read_shard(path).tensors
    layout, refusal = _checked(folder, as_files=False)
    by_plan, _ = _checked(folder, as_files=True)
    sizes: Counter[str] = Counter()
    for tensor in stored.values():
        sizes[tensor.dtype] += tensor.nbytes
    layers, values, n_parameters = _layers(raw, by_plan)
    described = raw.get("text_config") if isinstance(raw.get("text_config"), dict) else raw
    assert isinstance(described, dict)
    return Inspection(
        model=model,
        model_type=str(raw.get("model_type")),
        architecture=_architecture(raw),
        n_layers=len(layers) or _integer(described.get("num_hidden_layers")),
        n_parameters=n_parameters or sum(_numel(t.shape) for t in stored.values()),
        stored=dict(sizes.most_common()),
        n_files=len({tensor.path for tensor in stored.values()}),
        quantisation=_quantisation(raw, stored),
        tied=bool(values.get("tie_word_embeddings", raw.get("tie_word_embeddings", False))),
        context=_integer(
            values.get("max_position_embeddings", described.get("max_position_embeddings"))
        ),
        refusal=refusal,
        by_plan=by_plan is not None,
        layers=layers,
        keep_one_of=tuple(sorted(by_plan.keep_one_of)) if by_plan else (),
        **_frame(folder),
        **(_estimate(folder, layout, stored) if layout is not None else {}),
    )


def _estimate(folder: Path, layout: Layout, stored: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """What the default recipe takes, and of that the selection."""
    recipe, device = Recipe(model="default"), find_device("auto")
    shape, rates = measure_checkpoint(folder, layout, stored, recipe, device)
    estimate = estimate_run(shape, recipe, rates, available_memory_bytes())
    mode, reason = choose_residency(estimate, measure_available(device))
    select = next(stage for stage in estimate.stages(mode) if stage.name == "select")
    scoring = {
        "memory_bytes": select.host_bytes,
        "seconds": select.seconds,
        "n_tokens": recipe.calibration.n_sequences * recipe.calibration.seq_len,
    }
    return {
        "estimate": estimate.to_json(mode, reason),
        "summary": tuple(describe_run(estimate, mode, reason)),
        "efforts": describe_efforts(shape, rates),
        "scoring": scoring if select.seconds is not None else {},
    }


def _frame(folder: Path) -> dict[str, Any]:
    """What stands around text; nothing where no tokenizer can be read: `load` says why."""
    try:
        return text_frame(load_tokenizer(folder)).to_json()
    except ModelError:
        return {}


def _architecture(raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else "unknown"


def _integer(value: Any) -> int | None:
    """A configuration's value if it is a whole number: one that is refused may hold anything."""
    return value if type(value) is int else None


def _checked(folder: Path, *, as_files: bool) -> tuple[Layout | None, str]:
    try:
        return check_folder(folder, as_files=as_files)[0], ""
    except ModelError as error:
        return None, str(error)


def _layers(
    raw: dict[str, Any], layout: Layout | None
) -> tuple[tuple[Layer, ...], dict[str, Any], int]:
    """Every layer, the derived configuration and the parameters; nothing for unknown layouts."""
    if layout is None:
        return (), {}, 0
    config = read_config(raw)
    text = config.get_text_config(decoder=True)
    expected = compute_expected_shapes(build_meta_model(config))
    sizes: Counter[int] = Counter()
    for name, (shape, _) in expected.items():
        if name.startswith(f"{layout.layers}."):
            sizes[int(name[len(layout.layers) + 1 :].partition(".")[0])] += _numel(shape)
    kinds = [value for key in TYPE_KEYS if (value := getattr(text, key, None))]
    needs_first = describe("recovery", _default("recovery")).needs_previous_layer
    layers = tuple(
        Layer(
            kind=" + ".join(str(kind[index]) for kind in kinds),
            n_parameters=sizes[index],
            pinned=layout.pinned.get(index, NEEDS_PREVIOUS if needs_first and index == 0 else ""),
        )
        for index in sorted(sizes)
    )
    total = sum(_numel(shape) for shape, tied in expected.values() if not tied)
    return layers, text.to_dict(), total


def _default(section: str) -> str:
    return str(getattr(Recipe(model="default"), section).method)


def _quantisation(raw: Mapping[str, Any], stored: Mapping[str, StoredTensor]) -> str:
    for key in sorted(CONFIG_KEYS):
        if isinstance(value := raw.get(key), dict):
            return str(value.get("quant_method", "yes"))
    return "yes" if is_quantised(raw, stored) else ""


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
