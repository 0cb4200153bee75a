"""A pruned checkpoint in an engine with its own model code: Apple's mlx-lm, on any CPU.

pip install --no-deps "mlx[cpu]" mlx-cpu mlx-lm
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from layercut.checkpoints import embedded_model
from layercut.checkpoints.export_check import export_check
from layercut.pipeline.prune_files import prune

INSTALL = 'pip install --no-deps "mlx[cpu]" mlx-cpu mlx-lm'
PROMPTS = ("The capital of France is", "In 1984, the", "def add(a, b):\n")
N_TOKENS = 24


@pytest.mark.slow
def test_mlx_lm_continues_texts_as_transformers_does(tmp_path: Path) -> None:
    if importlib.util.find_spec("mlx_lm") is None:
        pytest.skip(f"mlx-lm is not installed. Run: {INSTALL}")
    if importlib.util.find_spec(embedded_model.PACKAGE) is None:
        pytest.skip(f"the embedded model is not installed. Run: {embedded_model.INSTALL}")
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    out = tmp_path / "out"
    prune(embedded_model.NAME, out, drop=[10, 14, 21])
    assert export_check(out) == ()
    reference = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    engine, _ = load(str(out))
    assert len(engine.layers) == reference.config.num_hidden_layers == 27
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = reference(ids).logits[0]
            text = reference.generate(ids, max_new_tokens=N_TOKENS, do_sample=False)[0]
        logits = torch.tensor(engine(mx.array(ids.numpy())).tolist()[0])
        assert torch.allclose(logits, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        steps = generate_step(mx.array(ids[0].numpy()), engine, max_tokens=N_TOKENS)
        found = [int(token) for token, _ in steps]
        n_same = len(text) - ids.shape[1]
        assert tokenizer.decode(found[:n_same]) == tokenizer.decode(text[ids.shape[1] :])
