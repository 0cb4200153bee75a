"""The count from shapes against torch's counter, which watches the operations themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import save_tiny
from layercut.evaluation.flops import flops_per_token
from layercut.models.load import load
from layercut.models.view import DecoderView

N_TOKENS = 32
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


def counted(view: DecoderView) -> int:
    # Only eager attention and experts are made of operations that the counter knows.
    view.model.set_attn_implementation("eager")
    view.model.set_experts_implementation("eager")
    ids = torch.randint(3, 259, (1, N_TOKENS))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        view.model(input_ids=ids, use_cache=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("gpt2", {"n_embd": 16, "n_layer": 6, "n_head": 4, "n_positions": 128}),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
        ("qwen3_moe", EXPERTS | {"num_experts": 4, "decoder_sparse_step": 2}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": None}),
        (
            "deepseek_v3",
            LATENT | EXPERTS | {"n_routed_experts": 4, "first_k_dense_replace": 2},
        ),
    ],
)
def test_the_count_is_that_of_the_operations(
    model_type: str, settings: dict[str, Any], tmp_path: Path
):
    view = load(str(save_tiny(tmp_path / "m", model_type, **settings)), dtype="float32")
    assert flops_per_token(view, context=N_TOKENS) * N_TOKENS == counted(view)


def test_skipped_layers_cost_nothing(view: DecoderView):
    whole = flops_per_token(view, context=N_TOKENS)
    # One layer: 2·(q 16·16 + k, v 2·16·8 + o 16·16 + mlp 3·16·32) + 4·32·16 = 6656
    with view.skipping([1, 4]):
        assert whole - flops_per_token(view, context=N_TOKENS) == 2 * 6656
        assert flops_per_token(view, context=N_TOKENS) * N_TOKENS == counted(view)


def test_a_longer_context_costs_attention_alone(view: DecoderView):
    # 6 layers · 2 · (16 + 16) per token of context
    assert flops_per_token(view, context=33) - flops_per_token(view, context=32) == 6 * 64


def test_an_unknown_number_of_active_experts_leaves_the_count_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = EXPERTS | {"num_experts": 4, "decoder_sparse_step": 1}
    view = load(str(save_tiny(tmp_path / "m", "qwen3_moe", **settings)), dtype="float32")
    monkeypatch.setattr("layercut.evaluation.flops.ACTIVE_EXPERTS", ())
    assert flops_per_token(view) is None
