from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import N_LAYERS, save_tiny
from layercut.errors import ModelError, NetworkError, NumericsError, RecipeError
from layercut.models.load import load

Damage = Callable[[Path], object]


@pytest.fixture
def broken(tiny_llama: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def config(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def damage(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def drop(part: str) -> Damage:
    def change(state: dict[str, torch.Tensor]) -> None:
        for name in [name for name in state if part in name]:
            del state[name]

    return tensors(change)


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def replace_by_pipe(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return damage


REFUSALS: dict[str, tuple[Damage, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json cannot be read"),
    "truncated config": (text("config.json", '{"model_type": "lla'), r"config\.json is not valid"),
    "config list": (text("config.json", "[]"), r"config\.json does not hold a JSON object"),
    "remote code": (config(auto_map={"AutoModel": "x.M"}), "own code .auto_map.*built-in"),
    "no type": (config(model_type=None), "names no model_type"),
    "unknown type": (config(model_type="llama9"), r"transformers 5\S+ does not know .*'llama9'"),
    "other family": (
        config(model_type="zamba2"),
        "no layer of 'zamba2' can be dropped exactly: one shared",
    ),
    "encoder": (config(model_type="bert"), "is an encoder .is_decoder is false."),
    "encoder-decoder": (config(model_type="t5", is_encoder_decoder=True), "causal language models"),
    "quantised": (config(quantization_config={"bits": 4}), "original, unquantised checkpoint"),
    "redirected": (config(transformers_weights="x.safetensors"), "transformers_weights"),
    "bad value": (config(hidden_size="x"), "does not describe a model: .*hidden_size"),
    "impossible value": (config(num_attention_heads=0), "does not describe a model"),
    "unknown activation": (
        config(hidden_act="nope"),
        "does not describe a model: KeyError: 'nope'",
    ),
    "more layers in config": (config(num_hidden_layers=7), "= 7, the weights hold 6 layers"),
    "fewer layers in config": (config(num_hidden_layers=5), "= 5, the weights hold 6 layers"),
    "missing layer": (drop("layers.3."), "= 6, the weights hold 5 layers"),
    "missing head": (drop("lm_head"), "weights lack lm_head.weight.*causal language model"),
    "missing tensors": (drop("q_proj"), "lack .*0.self_attn.q_proj.weight.* and 3 more"),
    "surplus tensor": (
        tensors(lambda s: s.update({"score.weight": torch.zeros(2)})),
        "hold score.weight, which the configured model does not have",
    ),
    "wrong shape": (
        tensors(lambda s: s.update({"model.norm.weight": torch.zeros(8)})),
        r"model.norm.weight has shape \[8\], config.json makes it \[16\]",
    ),
    "wrong size": (config(vocab_size=300), r"has shape \[259, 16\], config.json makes it \[300"),
    "adapter": (text("adapter_config.json", "{}"), "Merge the adapter"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
    "damaged tokenizer": (text("tokenizer.json", "{"), "tokenizer in .* cannot be read"),
    "tokenizer pointer": (
        text("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n"),
        "git-lfs pointer",
    ),
    "config pipe": (replace_by_pipe("config.json"), r"config\.json is a named pipe"),
    "weights pipe": (replace_by_pipe("model.safetensors"), "safetensors is a named pipe"),
    "generation pipe": (replace_by_pipe("generation_config.json"), "is a named pipe"),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_checkpoints_that_cannot_be_pruned_are_refused(broken: Path, fault: str) -> None:
    damage, why = REFUSALS[fault]
    damage(broken)
    with pytest.raises(ModelError, match=why):
        load(str(broken))


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(ModelError, match=rf"{shard.name} is damaged or truncated"):
        load(str(folder))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = save_sharded(tmp_path)
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="both hold"):
        load(str(folder))


def save_sharded(tmp_path: Path) -> Path:
    from transformers import AutoModelForCausalLM

    folder = save_tiny(tmp_path / "sharded")
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def test_code_beside_a_checkpoint_is_never_run(broken: Path) -> None:
    (broken / "evil.py").write_text("raise SystemExit('ran')")
    config(auto_map={"AutoConfig": "evil.Config"})(broken)
    with pytest.raises(ModelError, match="auto_map"):
        load(str(broken))
    assert "evil" not in sys.modules


def test_the_view_describes_the_checkpoint(tiny_llama: Path) -> None:
    view = load(str(tiny_llama), dtype="float32")
    assert view.n_layers == N_LAYERS
    assert view.path == tiny_llama
    assert view.model.dtype == torch.float32
    assert not view.mixed_precision
    assert not view.model.training
    stored = load_file(tiny_llama / "model.safetensors")
    assert all(torch.equal(view.model.state_dict()[name], t) for name, t in stored.items())


def test_tied_heads_need_not_be_stored(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    model = load(str(folder)).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_sharded_checkpoints_load(tmp_path: Path) -> None:
    assert load(str(save_sharded(tmp_path))).n_layers == N_LAYERS


def test_stored_rotary_tables_of_old_checkpoints_are_no_surplus(broken: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors(lambda state: state.update({name: torch.ones(2)}))(broken)
    assert load(str(broken)).n_layers == N_LAYERS


def test_an_invalid_generation_config_does_not_block(broken: Path) -> None:
    (broken / "generation_config.json").write_text('{"temperature": 0.3, "do_sample": false}')
    assert load(str(broken)).n_layers == N_LAYERS


@pytest.mark.parametrize(
    ("stored", "asked", "loaded"),
    [
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.float32),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_dtypes(broken: Path, stored: torch.dtype, asked: str, loaded: torch.dtype) -> None:
    tensors(lambda s: s.update({n: t.to(stored) for n, t in s.items()}))(broken)
    view = load(str(broken), dtype=asked, device="cpu")
    assert view.model.dtype == loaded
    assert not (view.mixed_precision and (asked == "float32" or loaded != torch.float32))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(broken: Path, value: float) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    tensors(lambda state: state[name][1].fill_(value))(broken)
    with pytest.raises(NumericsError, match=f"{name} holds NaN or Inf"):
        load(str(broken))


def test_the_fingerprint_follows_weights_config_and_tokenizer(broken: Path) -> None:
    before = load(str(broken)).fingerprint
    (broken / "README.md").write_text("words")
    assert load(str(broken)).fingerprint == before
    tensors(lambda state: state["model.norm.weight"].add_(1))(broken)
    weights = load(str(broken)).fingerprint
    config(rms_norm_eps=1e-5)(broken)
    assert len({before, weights, load(str(broken)).fingerprint}) == 3


def test_loading_and_long_text_are_silent(
    broken: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = broken / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 4}))
    content = path.read_bytes()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        view = load(str(broken))
        assert len(view.tokenizer("a text of many bytes").input_ids) == 20
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "../owner/name", "owner/..name", "./x", ""])
def test_names_of_neither_kind_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither an existing folder nor a Hub name"):
        load(name)


def test_a_file_is_not_a_model_folder(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match=r"is neither a folder nor a \.gguf file"):
        load(str(tiny_llama / "config.json"))


def test_unknown_embedded_models_name_the_known_one() -> None:
    with pytest.raises(ModelError, match="'embedded:smollm2-135m'"):
        load("embedded:smollm2")


def test_names_the_hub_would_not_accept_are_refused() -> None:
    with pytest.raises(ModelError, match="not a valid Hub name"):
        load("owner/na--me")


def test_hub_models_need_the_hub_or_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(NetworkError, match=r"owner/name at revision v1 .*cache") as caught:
        load("owner/name", revision="v1")
    assert "secret" not in str(caught.value)


def test_unknown_dtypes_and_devices_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match=r"'bfloat' is none of .*did you mean 'bfloat16'"):
        load(str(tiny_llama), dtype="bfloat")
    with pytest.raises(RecipeError, match="'gpu' is none of"):
        load(str(tiny_llama), device="gpu")
    with pytest.raises(RecipeError, match="'mps' is not supported"):
        load(str(tiny_llama), device="mps")
    with pytest.raises(RecipeError, match="'cuda:63' is not there"):
        load(str(tiny_llama), device="cuda:63")
