"""The configuration of the pruned model: edited by rule, then held against the old one.

Every per-layer value that transformers derives from the new configuration must be the kept layers'
old one. What a rule gets wrong, or what a configuration cannot express, is refused here.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from layercut.checkpoints.config_counts import check_counts
from layercut.checkpoints.families import (
    INDEX_LISTS,
    LAYER_COUNTS,
    MTP_COUNTS,
    NOT_PER_LAYER,
    ONE_BASED_LISTS,
    PER_LAYER_STRINGS,
    PREFIX_COUNTS,
    RE_KEYED,
    STEPS,
    SUFFIX_COUNTS,
    TYPE_LISTS,
    FamilyRules,
)
from layercut.checkpoints.hf_calls import guard, quiet
from layercut.checkpoints.intervals import mend_intervals
from layercut.errors import ModelError

Json = dict[str, Any]
NUMBER_LISTS = INDEX_LISTS + ONE_BASED_LISTS

NO_MODEL = "config.json does not describe a model"
RESTORE = "Restore the original configuration."


def edit_config(
    raw: Mapping[str, Any], rules: FamilyRules, kept: Sequence[int], *, with_mtp: bool = False
) -> Json:
    """A copy of a parsed config.json for the kept layers only.

    Keys that are present are edited. A key that is absent is added only where the value that
    transformers derives without it would be wrong.

    Args:
        raw: the parsed config.json.
        rules: the family's row.
        kept: sorted indices of the layers that stay.
        with_mtp: whether the tensors of multi-token prediction are written.

    Raises:
        ModelError: the kept layers' values cannot be expressed in this family's configuration.
    """
    edited = copy.deepcopy(dict(raw))
    config = read_config(edited)
    path = section_path(config)
    text = get_section(config, path)
    section = _section(edited, path)
    wanted = _wanted(text, kept)
    _edit_section(section, text, rules, kept)
    for key in () if with_mtp else MTP_COUNTS:
        if section.get(key):
            section[key] = 0
    missing = _differences(edited, path, wanted)
    for key in missing.keys() - section.keys():
        # What transformers would derive is wrong: spell it, if it can be spelled at all.
        if key in vars(text) or key in text.attribute_map:
            section[key] = missing[key]
    wrong = _differences(edited, path, wanted)
    if wrong:
        key, value = next(iter(wrong.items()))
        raise ModelError(
            f"the kept layers' {key} cannot be expressed in this family's configuration: it would "
            f"have to be {value}. Drop whole periods of its pattern."
        )
    return edited


def read_config(raw: Mapping[str, Any]) -> Any:
    """The configuration object that transformers makes of a parsed config.json.

    Raises:
        ModelError: it is not a valid one.
    """
    check_counts(raw)
    with tempfile.TemporaryDirectory(prefix="layercut-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        with guard(NO_MODEL, ModelError, RESTORE):
            return AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )


def section_path(config: Any) -> tuple[str, ...]:
    """Where the text decoder's values are inside a configuration: () or, say, (text_config,)."""
    text = config.get_text_config(decoder=True)
    if text is config:
        return ()
    for key in config.sub_configs:
        part = getattr(config, key, None)
        if part is text:
            return (key,)
        if part is not None and part.get_text_config(decoder=True) is text:
            return (key, *section_path(part))
    raise ModelError(
        f"config.json: the text decoder of '{config.model_type}' is not found in it. "
        "Choose a text-only model."
    )


def get_section(config: Any, path: Sequence[str]) -> Any:
    """The sub-configuration at ``path``."""
    for key in path:
        config = getattr(config, key)
    return config


def layer_values(text: Any) -> dict[str, list[Any]]:
    """Lists of a text configuration that speak of its layers, given or derived.

    They have one entry per layer, or are lists of layer numbers.
    """
    per_layer: dict[str, list[Any]] = {}
    keys = [key for key in dir(text) if not key.startswith("_")]
    with quiet():
        values = {key: _value(text, key) for key in keys}
    for key, value in values.items():
        if not isinstance(value, list):
            continue
        if key in NUMBER_LISTS or _is_per_layer(key, value, text.num_hidden_layers):
            per_layer[key] = value
    return per_layer


def _section(raw: Json, path: Sequence[str]) -> Json:
    for key in path:
        raw = raw.setdefault(key, {})
    return raw


def _is_per_layer(key: str, value: Any, n_layers: int) -> bool:
    if isinstance(value, str):
        return key in PER_LAYER_STRINGS and len(value) == n_layers
    if not isinstance(value, list | tuple) or NOT_PER_LAYER.fullmatch(key):
        return False
    return len(value) == n_layers or (len(value) > n_layers and key in TYPE_LISTS)


def _edit_section(section: Json, text: Any, rules: FamilyRules, kept: Sequence[int]) -> None:
    n_layers = text.num_hidden_layers
    new_index = {old: new for new, old in enumerate(kept)}
    for key, value in list(section.items()):
        if value is None:
            continue
        if key in rules.patterns:
            section[key] = _pattern(value, rules.patterns[key], kept)
        elif key in NUMBER_LISTS:
            section[key] = _renumber(key, value, new_index)
        elif _is_per_layer(key, value, n_layers):
            part = [value[i] for i in kept]
            section[key] = "".join(part) if isinstance(value, str) else part
        elif key in PREFIX_COUNTS:
            section[key] = sum(i < value for i in kept)
        elif key in SUFFIX_COUNTS:
            section[key] = sum(i >= n_layers - value for i in kept)
        elif key in RE_KEYED:
            section[key] = {str(new_index[int(i)]): v for i, v in value.items() if int(i) in kept}
    section.update(_remove_steps(text, kept))
    section.update(mend_intervals(section, text, kept))
    for count in (*LAYER_COUNTS, _count_key(text)):
        if section.get(count) == n_layers:
            section[count] = len(kept)


def _renumber(key: str, layers: Sequence[int], new_index: Mapping[int, int]) -> list[int]:
    """The kept ones of listed layers by their new numbers."""
    base = int(key in ONE_BASED_LISTS)
    return [new_index[i - base] + base for i in layers if i - base in new_index]


def _remove_steps(text: Any, kept: Sequence[int]) -> Json:
    """Sparse layers at every s-th place, as a step of 1 and a list of the dense kept ones."""
    values: Json = {}
    for step, dense in STEPS.items():
        every, listed = getattr(text, step, None) or 1, getattr(text, dense, None) or []
        if every > 1:
            values[step] = 1
            values[dense] = [n for n, i in enumerate(kept) if i in listed or (i + 1) % every]
    return values


def _count_key(text: Any) -> str:
    return str(text.attribute_map.get("num_hidden_layers", "num_hidden_layers"))


def _pattern(value: Any, kind: str, kept: Sequence[int]) -> list[Any]:
    """A pattern of the kept layers, one entry each."""
    if kind == "cycle":
        return [value[i % len(value)] for i in kept]
    expanded = [entry for types, times in value for _ in range(times) for entry in types]
    return [[[expanded[i]], 1] for i in kept]


def _wanted(text: Any, kept: Sequence[int]) -> Json:
    """What the pruned configuration must say of the kept layers, given or derived."""
    new_index = {old: new for new, old in enumerate(kept)}
    wanted: Json = {
        key: _renumber(key, value, new_index) if key in NUMBER_LISTS else [value[i] for i in kept]
        for key, value in layer_values(text).items()
    }
    return wanted | _remove_steps(text, kept) | {_count_key(text): len(kept)}


def _differences(edited: Json, path: Sequence[str], wanted: Json) -> Json:
    """Wanted values that the edited configuration does not give."""
    try:
        text = get_section(read_config(edited), path)
    except ModelError:
        return wanted
    with quiet():
        return {key: value for key, value in wanted.items() if _value(text, key) != value}


def _value(text: Any, key: str) -> Any:
    """An attribute, tuples as lists; ``None`` where a derived one refuses to be computed."""
    try:
        value = getattr(text, key, None)
    except Exception:  # noqa: BLE001 - a library's property; `guard` takes long for each of them
        return None
    return list(value) if isinstance(value, tuple) else value
