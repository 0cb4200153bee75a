"""Random edits of a checkpoint's small files: every one ends well, or in one line that is ours."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layercut.checkpoints.export_check import export_check
from layercut.checkpoints.preflight import check_folder
from layercut.errors import LayercutError
from layercut.models.load import load

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
SPECIAL, SETTINGS, INDEX = (
    "special_tokens_map.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
)
FILES = (CONFIG, GENERATION, TOKENIZER, SPECIAL, SETTINGS, INDEX)
REMOVE, DEEP = object(), "deep"
NUMBERS = (0, -1, 1, 7, 2**31, 2**63, 10**9, 10**30, 0.5, 1e308, float("nan"), float("inf"))
WORDS = ("", "x", "12", "flash_attention_2", "auto", "<eos>", "\ud800", DEEP)
PARTS = ([], [None], [1, 2, 3], ["a"] * 6, {}, {"a": {}}, {"rope_type": "nope"})
VALUES = st.sampled_from([REMOVE, None, True, False, *NUMBERS, *WORDS, *PARTS])
EDITS = st.lists(
    st.tuples(st.sampled_from(FILES), st.integers(0, 2000), VALUES), min_size=1, max_size=3
)
ADDED = (
    (CONFIG, "layer_types"),
    (CONFIG, "rope_scaling"),
    (CONFIG, "quantization_config"),
    (CONFIG, "_attn_implementation"),
    (CONFIG, "attn_implementation"),
    (CONFIG, "torch_dtype"),
    (CONFIG, "sliding_window"),
    (CONFIG, "num_nextn_predict_layers"),
    (CONFIG, "text_config"),
    (CONFIG, "per_layer_config"),
    (GENERATION, "temperature"),
    (GENERATION, "cache_implementation"),
    (SETTINGS, "added_tokens_decoder"),
    (SETTINGS, "chat_template"),
    (SETTINGS, "auto_map"),
    (SETTINGS, "extra_special_tokens"),
    (SPECIAL, "additional_special_tokens"),
)
"""Keys that the tiny checkpoint lacks; nothing is there to be edited until they are added."""


def places(part: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a JSON value with each of its keys or indices."""
    if isinstance(part, dict | list):
        for key in part if isinstance(part, dict) else range(len(part)):
            yield part, key
            yield from places(part[key])


def edit(content: dict, name: str, number: int, value: Any) -> None:
    if value == DEEP:
        value = json.loads("[" * 150 + "]" * 150)
    if isinstance(value, dict | list):
        value = copy.deepcopy(value)  # a later edit may write into it, or put it into itself
    added = [key for file, key in ADDED if file == name]
    # One edit in four adds a key; the vocabulary would otherwise take nearly all of the others.
    if number % 4 == 0 and added:
        content[added[number // 4 % len(added)]] = None if value is REMOVE else value
        return
    found = [place for place in places(content) if len(place[0]) < 200 or number % 16 == 1]
    container, key = found[number % len(found)]
    if value is REMOVE:
        del container[key]
    else:
        container[key] = value


@pytest.fixture(scope="module")
def source(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edited") / "source"
    shutil.copytree(tiny_llama, folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    return folder


@pytest.fixture(scope="module")
def contents(source: Path) -> dict[str, dict]:
    from safetensors import safe_open

    file = "model-00001-of-00001.safetensors"
    with safe_open(source / file, "pt") as tensors:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors.keys(), file)}
    tokens = {"bos_token": "<bos>", "eos_token": {"content": "<eos>", "special": True}}
    given = {SPECIAL: tokens, INDEX: index}
    stored = [name for name in FILES if (source / name).exists()]
    return {name: json.loads((source / name).read_text()) for name in stored} | given


SEEDED = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


def check(source: Path, contents: dict[str, dict], edits: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copytree(source, Path(folder) / "model"))
        edited = copy.deepcopy(contents)
        for name, number, value in edits:
            edit(edited[name], name, number, value)
        for name, content in edited.items():
            (path / name).write_text(json.dumps(content))
        for step in (check_folder, lambda p: load(str(p), device="cpu"), export_check):
            try:
                step(path)
            except LayercutError as error:
                text = str(error)
                assert text.count("\n") <= 1, text
                assert len(text) < 1000, text
                named = (*FILES, str(path), "the weights", "config.json", "tokenizer")
                assert any(name in text for name in named), text


@settings(SEEDED, max_examples=25)
@given(edits=EDITS)
def test_random_edits_end_well_or_in_one_line(
    source: Path, contents: dict[str, dict], edits: list
) -> None:
    check(source, contents, edits)


@pytest.mark.slow
@settings(SEEDED, max_examples=3000)
@given(edits=EDITS)
def test_many_random_edits_end_well_or_in_one_line(
    source: Path, contents: dict[str, dict], edits: list
) -> None:
    check(source, contents, edits)
