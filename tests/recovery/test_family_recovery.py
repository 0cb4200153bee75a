"""Every recovery on families that store and add their MLP's output in different ways.

Either the written checkpoint computes what the patched model in memory does, or the recovery is
refused before it computes anything.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer, plan_of
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.verify import verify_checkpoint
from layercut.recovery.fit import fit
from layercut.types import CalibrationBatches

SIZES = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 2,
}
GPT = {"vocab_size": 259, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS = {
    "llama": ("llama", SIZES | {"mlp_bias": True}),
    "gpt2": ("gpt2", GPT),
    "gpt2 inverse": ("gpt2", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "gpt_neox": ("gpt_neox", SIZES),
    "falcon": ("falcon", SIZES),
    "phi": ("phi", SIZES),
    "opt": ("opt", SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 16, "layerdrop": 0.5}),
    "opt post-norm": (
        "opt",
        SIZES | {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "mixtral": ("mixtral", SIZES | EXPERTS),
    "gpt_oss": ("gpt_oss", SIZES | EXPERTS | {"head_dim": 4}),
    "deepseek_v3": (
        "deepseek_v3",
        SIZES
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        | {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
        | {"v_head_dim": 4, "head_dim": 4, "num_key_value_heads": 4, "n_group": 1}
        | {"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "granite": ("granite", SIZES | {"residual_multiplier": 0.2}),
    "gemma2": ("gemma2", SIZES | {"head_dim": 4, "query_pre_attn_scalar": 4}),
    "olmo2": ("olmo2", SIZES),
    "mamba": ("mamba", {"vocab_size": 259, "hidden_size": 16, "num_hidden_layers": 4}),
}
BETWEEN, ADAPTERS = "does not add its MLP", "holds several linear maps"
NO_MLP, SCALE = "has no MLP whose output projection", "does not follow the scale"
KERNELS = "cannot have LoRA adapters"
STEPS_ALONE = {("opt post-norm", "refit"): "it is repaired by gradient steps alone"}
REFUSED = {
    ("mixtral", "sign-merge"): ADAPTERS,
    ("gpt_oss", "sign-merge"): ADAPTERS,
    ("deepseek_v3", "sign-merge"): ADAPTERS,
    **{
        (m, r): BETWEEN
        for m in ("granite", "gemma2", "olmo2", "opt post-norm")
        for r in ("linear-map", "projection")
    },
    **{(m, "magnitude-rescale"): SCALE for m in ("gemma2", "olmo2", "opt post-norm")},
    **{("mamba", r): NO_MLP for r in ("linear-map", "magnitude-rescale", "projection")},
    ("mamba", "sign-merge"): KERNELS,
}
OPTIONS: dict[str, dict[str, object]] = {
    "laco": {},
    "linear-map": {"alpha": 0.01},
    "magnitude-rescale": {},
    "projection": {"penalty": 0.01},
    "refit": {"held_out_every": 2},
    "sign-merge": {"steps": 3, "rank": 2, "strength": 1.0},
}


def save_model(folder: Path, name: str) -> Path:
    model_type, settings = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=MODELS)
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    return request.param, save_model(tmp_path_factory.mktemp("family"), request.param)


@pytest.mark.parametrize("method", sorted(OPTIONS))
def test_recovery_is_equal_on_disk_or_refused(
    source: tuple[str, Path], tmp_path: Path, ids: torch.Tensor, method: str
) -> None:
    name, folder = source
    view = load(str(folder), dtype="float32")
    batches = CalibrationBatches(ids, gradient_batch=2, micro_batch=2, source="t", fingerprint="0")
    plan = plan_of(2, n_layers=4)
    if why := REFUSED.get((name, method)):
        with pytest.raises(ModelError, match=why):
            fit(view, plan, None, batches, method=method, **OPTIONS[method])
        return
    told = STEPS_ALONE.get((name, method))
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        patch = fit(view, plan, None, batches, method=method, **OPTIONS[method])
    # A refit that does not lower the held-out loss of this random text is dropped.
    assert patch.tensors or method == "refit"
    write_checkpoint(folder, view.layout, plan, patch, tmp_path)
    apply(view, plan, patch)
    verify_checkpoint(tmp_path, view, plan, patch)


@pytest.mark.parametrize("name", [name for name in MODELS if (name, "projection") not in REFUSED])
def test_projection_lowers_the_error_that_it_says(
    name: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    save_model(tmp_path, name)
    view = load(str(tmp_path), dtype="float32")
    batches = CalibrationBatches(ids, gradient_batch=2, micro_batch=4, source="t", fingerprint="0")
    plan = plan_of(2, n_layers=4)
    patch = fit(view, plan, None, batches, method="projection", penalty=0.01)
    layer = patch.notes["layer"]
    inputs = view.embed(ids)
    hidden = dense = inputs.hidden
    with torch.no_grad():
        for index in range(plan.target_of(layer)):
            dense = view.run_layer(index, dense, inputs)
        with view.patched(patch.tensors):
            for index in plan.kept[: plan.kept.index(layer) + 1]:
                hidden = view.run_layer(index, hidden, inputs)
    after = float((dense - hidden).square().sum(dim=-1).mean())
    assert after == pytest.approx(patch.notes["squared_error_after"], rel=1e-3)
