from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import plan_of, save_tiny
from layercut.checkpoints.preflight import read_layout
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import PlanError
from layercut.types import WeightPatch
from written import NOTHING, all_tensors, identity_logits, patch_for, read_back

WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", WINDOWS),
    "qwen2 tied": ("qwen2", WINDOWS | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", WINDOWS),
}
DROPS = [(0,), (5,), (1, 4), (2, 3, 4)]


def write(source: Path, out: Path, *dropped: int, patch: WeightPatch = NOTHING) -> Path:
    out.mkdir()
    write_checkpoint(source, read_layout(source), plan_of(*dropped), patch, out)
    return out


def reshard(folder: Path, size: str = "20KB") -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=size)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_type, settings = FAMILIES[request.param]
    return save_tiny(tmp_path_factory.mktemp("family"), model_type, **settings)


@pytest.mark.parametrize("dropped", DROPS, ids=str)
def test_logits_equal_the_dense_model_with_identity_layers(
    source: Path, tmp_path: Path, ids: Tensor, dropped: tuple[int, ...]
) -> None:
    patch = NOTHING if 2 in dropped else patch_for(source)
    out = write(source, tmp_path / "out", *dropped, patch=patch)
    assert torch.equal(read_back(out, ids), identity_logits(source, dropped, patch, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_and_shards_stay(tmp_path: Path, ids: Tensor, dtype: torch.dtype) -> None:
    source = save_tiny(tmp_path / "source", "qwen3", **WINDOWS)
    AutoModelForCausalLM.from_pretrained(source, dtype=dtype).save_pretrained(source)
    reshard(source)
    patch = patch_for(source)
    out = write(source, tmp_path / "out", 1, 4, patch=patch)
    assert {tensor.dtype for tensor in all_tensors(out).values()} == {dtype}
    assert torch.equal(read_back(out, ids), identity_logits(source, (1, 4), patch, ids))


def test_kept_tensors_are_byte_identical_and_only_the_patch_changes(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    patch = patch_for(source)
    before, after = (
        all_tensors(source),
        all_tensors(write(source, tmp_path / "out", 1, patch=patch)),
    )
    new = {0: 0, 2: 1, 3: 2, 4: 3, 5: 4}
    expected = {}
    for name, tensor in (before | dict(patch.tensors)).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if parts[2] == "1":
                continue
            parts[2] = str(new[int(parts[2])])
        expected[".".join(parts)] = tensor
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].numpy().tobytes() == tensor.numpy().tobytes()
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_shards_keep_their_names_and_the_index_fits(tmp_path: Path, ids: Tensor) -> None:
    source = reshard(save_tiny(tmp_path / "source"), "5KB")
    old = json.loads((source / "model.safetensors.index.json").read_text())
    out = write(source, tmp_path / "out", 1, 2, 3)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    state = all_tensors(out)
    assert index["weight_map"].keys() == state.keys()
    files = {path.name for path in out.glob("*.safetensors")}
    assert files == set(index["weight_map"].values())
    # A layer takes 9,344 bytes, so some shards held nothing but dropped layers.
    assert files < set(old["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())
    assert index["metadata"]["total_parameters"] == sum(t.numel() for t in state.values())
    assert torch.equal(read_back(out, ids), identity_logits(source, (1, 2, 3), NOTHING, ids))


def test_config_keeps_its_spelling(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source", "qwen2", **WINDOWS)
    config = source / "config.json"
    spelled = (
        config.read_text().replace("1e-06", "1e-6").replace('"head_dim"', '"extra": 5, "head_dim"')
    )
    config.write_text(spelled)
    out = write(source, tmp_path / "out", 0, 5)
    new = (out / "config.json").read_text()
    assert [line for line in new.splitlines() if line not in spelled.splitlines()] == [
        '  "max_window_layers": 2,',
        '  "num_hidden_layers": 4,',
    ]
    assert json.loads(new)["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2


def test_derived_patterns_follow_their_counts(tmp_path: Path, ids: Tensor) -> None:
    source = save_tiny(tmp_path / "source", "qwen2", **WINDOWS)
    strip_key(source, "layer_types")
    out = write(source, tmp_path / "out", 1, 4)
    assert "layer_types" not in json.loads((out / "config.json").read_text())
    assert torch.equal(read_back(out, ids), identity_logits(source, (1, 4), NOTHING, ids))


def test_patterns_that_a_count_cannot_express_are_spelled(tmp_path: Path, ids: Tensor) -> None:
    # Layers 0–27 are full by the class's default of 28; of 30 layers only 28 and 29 slide.
    settings = WINDOWS | {"num_hidden_layers": 30, "max_window_layers": 28}
    source = save_tiny(tmp_path / "source", "qwen2", **settings)
    strip_key(source, "layer_types")
    strip_key(source, "max_window_layers")
    (tmp_path / "out").mkdir()
    plan = plan_of(0, n_layers=30)
    write_checkpoint(source, read_layout(source), plan, NOTHING, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_types"] == ["full_attention"] * 27 + ["sliding_attention"] * 2
    assert torch.equal(
        read_back(tmp_path / "out", ids), identity_logits(source, (0,), NOTHING, ids)
    )


def strip_key(source: Path, key: str) -> None:
    config = json.loads((source / "config.json").read_text())
    del config[key]
    (source / "config.json").write_text(json.dumps(config))


def test_side_files_are_copied_and_code_pickles_and_cards_are_not(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    (source / "chat_template.jinja").write_bytes(b"{{ x }}\r\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ y }}")
    (source / "LICENSES").mkdir()
    (source / "tokenizer").mkdir()
    legal = ("LICENCE", "License.md", "COPYING", "USE_POLICY.md", "Notice.txt", "LICENSES/MIT.txt")
    processing = ("chat_template.json", "preprocessor_config.json", "processor_config.json")
    for name in ("LICENSE", *legal, *processing):
        (source / name).write_text("{}")
    (source / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false}')
    for name in ("README.md", "tokenizer_x.py", "vocab.bin", "training_args.bin", "other.txt"):
        (source / name).write_text("x")
    out = write(source, tmp_path / "out", 2)
    copied = {
        "LICENSE",
        *legal,
        *processing,
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert found == copied | {"config.json", "model.safetensors"}
    for name in copied:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("ab").input_ids


def test_plans_and_patches_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    layout = read_layout(tiny_llama)
    with pytest.raises(PlanError, match=r"plan is for 7 layers, .* says 6"):
        write_checkpoint(tiny_llama, layout, plan_of(1, n_layers=7), NOTHING, tmp_path)
    with pytest.raises(PlanError, match=r"layers.2.mlp.down_proj.weight, whose layer is dropped"):
        write_checkpoint(tiny_llama, layout, plan_of(2), patch_for(tiny_llama), tmp_path)
    for name in ("model.norm.bias", "model.norm.weight"):
        wrong = WeightPatch({name: torch.zeros(3)}, "test")
        with pytest.raises(PlanError, match=rf"changes {name} \[3\], which the checkpoint"):
            write_checkpoint(tiny_llama, layout, plan_of(2), wrong, tmp_path)
    assert not any(tmp_path.iterdir())
