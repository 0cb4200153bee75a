"""The whole flow on families that differ from Llama, and its early refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import layercut
from family_configs import FAMILIES
from layercut.errors import ModelError
from saved_families import save_family

REFIT = {"strategy": "priced-cuts", "drop_layers": 2}
LOWEST = {"strategy": "lowest", "drop_layers": 2}
BLOCK = {"strategy": "block", "drop_layers": 2}


def recipe_for(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    save_family(folder / "model", FAMILIES[name])
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    text = str(folder / "text.txt")
    return {
        "model": str(folder / "model"),
        "dtype": "float32",
        "calibration": {"data": text, "n_sequences": 8, "seq_len": 32, "gradient_batch": 2},
        "evaluation": {"text": {"fox": text}, "seq_len": 32, "max_tokens": 128},
        **sections,
    }


@pytest.mark.parametrize(
    ("name", "selection", "scoring", "recovery"),
    [
        ("gpt2 inverse", REFIT, "residual-sensitivity", "refit"),
        ("gpt_neox", REFIT, "residual-sensitivity", "refit"),
        ("bloom", REFIT, "residual-sensitivity", "refit"),
        ("mixtral", LOWEST, "gradmap", "projection"),
        ("mixtral", REFIT, "residual-sensitivity", "refit"),
        ("gemma2", REFIT, "residual-sensitivity", "refit"),
        ("granitemoehybrid", REFIT, "residual-sensitivity", "refit"),
        ("gemma2", LOWEST, "gradmap", "none"),
        ("gpt2", LOWEST, "igia", "sign-merge"),
        ("gpt_neox", BLOCK, "angular-distance", "linear-map"),
        ("bloom", LOWEST, "perplexity", "magnitude-rescale"),
        ("falcon", LOWEST, "taylor", "laco"),
        ("gemma4", {"drop": [1, 2]}, "gradmap", "none"),
    ],
)
def test_whole_runs(
    tmp_path: Path, name: str, selection: dict[str, Any], scoring: str, recovery: str
) -> None:
    steps = {"options": {"steps": 3}}
    recipe = recipe_for(
        tmp_path,
        name,
        selection={"strategy": "lowest"} | selection,
        scoring={"method": scoring} | (steps if scoring == "igia" else {}),
        recovery={"method": recovery} | (steps if recovery == "sign-merge" else {}),
    )
    result = layercut.run(recipe, tmp_path / "out")
    assert result.stages["pruned"].n_layers == 6
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("modernbert-decoder", {"selection": {"drop": [0]}}, "layer 0 cannot be dropped"),
        ("jamba", {"selection": {"drop": [0]}}, "cannot be expressed"),
        ("gemma3n", {}, "cannot work on 'gemma3n_text'"),
        ("olmo2", {"recovery": {"method": "projection"}}, "does not add its MLP's output"),
    ],
)
def test_refused_before_anything_is_computed(
    tmp_path: Path, name: str, changes: dict[str, Any], why: str
) -> None:
    if "selection" in changes:
        changes |= {"recovery": {"method": "none"}}
    with pytest.raises(ModelError, match=why) as caught:
        layercut.run(recipe_for(tmp_path, name, **changes), tmp_path / "out")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "out").exists()
