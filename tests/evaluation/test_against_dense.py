"""One checkpoint beside another: in Python, from the command line, in tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import save_tiny
from layercut.cli import main
from layercut.errors import ModelError
from layercut.evaluation.against_dense import check_comparable, measure_beside
from layercut.evaluation.evaluate import evaluate
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.report.table import measured


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "fox.txt"
    path.write_text("".join(f"The quick brown fox {i} jumps. " for i in range(40)))
    return str(path)


def test_a_model_beside_itself_agrees(view: DecoderView, text: str):
    cut = {"text": {"fox": text}, "seq_len": 64, "max_tokens": 256}
    figures = measure_beside(evaluate(view, speed=False, **cut), view, view, **cut)
    assert figures.compared_to == view.name
    assert figures.fidelity["fox"].agreement.value == 1
    generation = figures.generation["fox"]
    assert generation.agreement.value == 1
    assert generation.reference.distinct == generation.distinct
    assert (generation.prompt_tokens, generation.tokens.shape) == (64, (4, 64))
    labels = dict(measured(figures))
    assert labels["Next-token agreement, fox"] == "1.000 ± 0.000"
    assert labels["Windows, fox"] == "4 windows of 64 tokens, <eos> between documents"
    assert "(the other: " in labels["Generated, distinct 2-grams, fox"]


def test_models_of_other_vocabularies_are_refused(view: DecoderView, tmp_path: Path):
    other = load(str(save_tiny(tmp_path / "m", vocab_size=300)), dtype="float32")
    with pytest.raises(ModelError, match=r"predicts 259 tokens and the one .* 300"):
        check_comparable(view, other)
    other = load(str(view.path), dtype="float32")
    other.tokenizer.add_tokens("new")
    with pytest.raises(ModelError, match="have different vocabularies"):
        check_comparable(view, other)


def test_the_command_compares_two_checkpoints(
    tiny_llama: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pruned, figures = str(tmp_path / "pruned"), tmp_path / "figures.json"
    assert main(["prune", str(tiny_llama), "--drop", "2", "-o", pruned, "-q"]) == 0
    command = ["eval", pruned, "--text", f"fox={text}", "--compare-to", str(tiny_llama)]
    options = ["--seq-len", "32", "--max-tokens", "128", "--no-speed", "-q"]
    assert main([*command, *options, "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    for label in ("KL, nats per token, fox", "Generated, share in a loop", "GFLOPs per token"):
        assert label in shown
    content = json.loads(figures.read_text())
    assert content["compared_to"] == str(tiny_llama)
    assert content["fidelity"]["fox"]["kl"]["value"] > 0
    assert content["fidelity"]["fox"]["agreement"]["n_tokens"] == 128
    assert content["generation"]["fox"]["reference"]["distinct_1"]["n_prompts"] == 4
    cut = {"source": text, "n_windows": 4, "seq_len": 32, "detokenized": False}
    cut |= {"leading_token": None, "document_separator": "<eos>"}
    assert content["windows"] == {"fox": cut}
    # Head 2·16·259; 5 layers of 2·(2·16·16 + 2·16·8 + 3·16·32) + 4·128·16
    assert content["flops_per_token"] == 8288 + 5 * 12800
    assert content["flops_context"] == 128


def test_comparing_needs_a_text(capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "x", "--compare-to", "y"]) == 2
    assert "needs a --text to compare on" in " ".join(capsys.readouterr().err.split())
