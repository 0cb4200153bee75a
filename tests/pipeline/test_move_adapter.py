from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import N_LAYERS
from layercut.checkpoints.adapter import CONFIG_FILE, WEIGHTS_FILE
from layercut.cli import main
from layercut.errors import LayercutError, ModelError, OutputError, PlanError
from layercut.models.load import load
from layercut.pipeline.move_adapter import move_adapter
from layercut.pipeline.prune_files import prune

DROPPED = (1, 4)
ALL = ["q_proj", "down_proj"]
PATTERN = "base_model.model.model.layers"


@pytest.fixture(scope="module")
def pruned(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama without two layers, with the plan that `layercut prune` writes."""
    folder = tmp_path_factory.mktemp("pruned") / "out"
    prune(str(tiny_llama), folder, drop=DROPPED)
    return folder


def trained(model: Path, folder: Path, config: PeftConfig) -> Path:
    """A saved adapter of random numbers."""
    wrapped = get_peft_model(load(str(model), dtype="float32").model, config)
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert name
    wrapped.save_pretrained(str(folder))
    return folder


def plan_in(pruned: Path) -> Path:
    return pruned / "layercut" / "plan.json"


def logits_with(model: Any, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    wrapped = PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        logits: torch.Tensor = wrapped(ids).logits
    return logits


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"r": 2, "target_modules": ALL, "task_type": "CAUSAL_LM"} | settings))


CONFIGS: dict[str, PeftConfig] = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora": lora(use_rslora=True, bias="lora_only"),
    "layers": lora(layers_to_transform=[1, 2, 5], layers_pattern="layers"),
    "one layer": lora(layers_to_transform=5),
    "named": lora(target_modules=["layers.2.self_attn.q_proj", "model.layers.4.mlp.up_proj"]),
    "expression": lora(target_modules=r".*layers\.[2-4]\.self_attn\.[qv]_proj"),
    "excluded": lora(exclude_modules=["layers.3.self_attn.q_proj"]),
    "ranks": lora(
        rank_pattern={r"model.layers.3.self_attn.q_proj": 4, "down_proj": 3},
        alpha_pattern={r"layers\.[45]\..*": 32},
    ),
    "head": lora(modules_to_save=["lm_head"]),
    "saved layer": lora(modules_to_save=["model.layers.2.input_layernorm"]),
    "ia3": IA3Config(target_modules=ALL, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "loha": LoHaConfig(r=2, target_modules=ALL, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_moved_adapter_gives_the_logits_of_the_dense_one_without_its_dropped_layers(
    tiny_llama: Path, pruned: Path, tmp_path: Path, ids: torch.Tensor, kind: str
) -> None:
    source = trained(tiny_llama, tmp_path / "adapter", CONFIGS[kind])
    dense = load(str(tiny_llama), dtype="float32")
    with dense.skipping(DROPPED):
        expected = logits_with(dense.model, source, ids)
    moved = move_adapter(source, tmp_path / "out", plan=plan_in(pruned))
    found = logits_with(load(str(pruned), dtype="float32").model, tmp_path / "out", ids)
    assert torch.equal(found, expected)
    plain = load(str(pruned), dtype="float32").model
    with torch.no_grad():
        assert not torch.equal(plain(ids).logits, expected)
    before, after = load_file(source / WEIGHTS_FILE), load_file(tmp_path / "out" / WEIGHTS_FILE)
    assert moved.n_kept == len(after) == len(before) - moved.n_dropped
    new_index = {old: new for new, old in enumerate(i for i in range(6) if i not in DROPPED)}
    for name, tensor in before.items():
        if name.startswith(f"{PATTERN}."):
            number, _, rest = name.removeprefix(f"{PATTERN}.").partition(".")
            if int(number) in DROPPED:
                continue
            name = f"{PATTERN}.{new_index[int(number)]}.{rest}"
        assert torch.equal(after[name], tensor)


def test_a_configuration_that_names_no_layer_stays_as_it_is(
    tiny_llama: Path, pruned: Path, tmp_path: Path
) -> None:
    source = trained(tiny_llama, tmp_path / "adapter", lora(rank_pattern={"q_proj": 4}))
    moved = move_adapter(source, tmp_path / "out", plan=plan_in(pruned))
    assert moved.edited == ("base_model_name_or_path",)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(pruned)
    assert config["rank_pattern"] == {"q_proj": 4}
    plan = (tmp_path / "out" / "layercut" / "plan.json").read_bytes()
    assert plan == plan_in(pruned).read_bytes()


def test_layers_of_another_stack_do_not_follow_the_plan(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from conftest import byte_tokenizer

    text = {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "layer_types": ["full_attention"] * 6,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense = tmp_path / "dense"
    model.save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    wrapped = get_peft_model(model, lora(target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    prune(str(dense), tmp_path / "pruned", drop=DROPPED)
    moved = move_adapter(tmp_path / "adapter", tmp_path / "out", plan=plan_in(tmp_path / "pruned"))
    before, after = (
        load_file(tmp_path / "adapter" / WEIGHTS_FILE),
        load_file(tmp_path / "out" / WEIGHTS_FILE),
    )
    towers = [name for name in before if "vision" in name]
    assert len(towers) == 12
    assert all(torch.equal(after[name], before[name]) for name in towers)
    assert (moved.n_kept, moved.n_dropped) == (12 + 8, 4)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rename_one(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS_FILE)
    save_file({name.replace(old, new): t for name, t in tensors.items()}, folder / WEIGHTS_FILE)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")


FAULTS: dict[str, tuple[Any, type[LayercutError], str]] = {
    "no config": (
        lambda f: (f / CONFIG_FILE).unlink(),
        ModelError,
        "holds no adapter: there is no",
    ),
    "pickled": (pickled, ModelError, "is a pickle, which can run code"),
    "no weights": (lambda f: (f / WEIGHTS_FILE).unlink(), ModelError, "holds no adapter_model"),
    "type": (lambda f: edit(f, peft_type="PREFIX_TUNING"), ModelError, "of type 'PREFIX_TUNING'"),
    "replicated": (
        lambda f: edit(f, layer_replication=[[0, 4], [2, 6]]),
        ModelError,
        "sets layer_replication",
    ),
    "layer beyond": (
        lambda f: rename_one(f, "layers.5.", "layers.17."),
        PlanError,
        "has tensors for layer 17",
    ),
    "fewer layers": (
        lambda f: rename_one(f, "model.layers.5.", "model.layers.0."),
        PlanError,
        "adapts all of 5 layers, and the plan is for 6",
    ),
    "unknown stack": (
        lambda f: rename_one(f, "model.layers.0.", "tower.layers.0."),
        ModelError,
        "belongs to no module of the pruned model",
    ),
    "layers listed beyond": (
        lambda f: edit(f, layers_to_transform=[2, 9]),
        PlanError,
        "names layer 9",
    ),
    "layers listed dropped": (
        lambda f: edit(f, layers_to_transform=[1, 4]),
        PlanError,
        "are dropped, so nothing of the adapter would be left",
    ),
    "odd save": (
        lambda f: edit(f, modules_to_save=["layers.3.mlp"]),
        ModelError,
        "modules_to_save names layers in a way",
    ),
}


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_llama, tmp_path_factory.mktemp("adapter") / "lora", lora())


@pytest.mark.parametrize("fault", FAULTS)
def test_adapters_that_cannot_be_moved_are_refused(
    adapter: Path, pruned: Path, tmp_path: Path, fault: str
) -> None:
    damage, kind, why = FAULTS[fault]
    shutil.copytree(adapter, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    with pytest.raises(kind, match=why):
        move_adapter(tmp_path / "adapter", tmp_path / "out", plan=plan_in(pruned))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_dropped_layers_alone_is_refused(
    tiny_llama: Path, pruned: Path, tmp_path: Path
) -> None:
    source = trained(tiny_llama, tmp_path / "a", lora(target_modules=r".*layers\.[14]\..*q_proj"))
    with pytest.raises(PlanError, match="nothing of it would be left"):
        move_adapter(source, tmp_path / "out", plan=plan_in(pruned))


def test_models_that_do_not_belong_together_are_refused(
    tiny_llama: Path, adapter: Path, pruned: Path, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match="has 6 layers, and the plan leaves 4"):
        move_adapter(adapter, tmp_path / "out", plan=plan_in(pruned), base=tiny_llama)
    with pytest.raises(ModelError, match="holds a whole model"):
        move_adapter(tiny_llama, tmp_path / "out", plan=plan_in(pruned))
    with pytest.raises(OutputError, match="in the source model's folder"):
        move_adapter(adapter, adapter / "out", plan=plan_in(pruned))
    lonely = tmp_path / "plan.json"
    shutil.copy(plan_in(pruned), lonely)
    with pytest.raises(PlanError, match="Name the pruned model by --base"):
        move_adapter(adapter, tmp_path / "out", plan=lonely)
    assert move_adapter(adapter, tmp_path / "out", plan=lonely, base=pruned).base == str(pruned)
    on_pruned = trained(pruned, tmp_path / "on-pruned", lora())
    with pytest.raises(PlanError, match=r"itself\. Use it as it is"):
        move_adapter(on_pruned, tmp_path / "no", plan=plan_in(pruned))
    shutil.copytree(pruned, tmp_path / "copy")
    edit(on_pruned, base_model_name_or_path=str(tmp_path / "copy"))
    with pytest.raises(
        PlanError, match=r"\(pruned already\), which has 4 layers; the plan is for 6"
    ):
        move_adapter(on_pruned, tmp_path / "no", plan=plan_in(pruned))


def test_the_command_moves_an_adapter_and_says_so(
    adapter: Path, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["adapter", str(adapter), "--plan", str(plan_in(pruned)), "-o", str(out)]
    assert main(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    n_dropped = len(DROPPED) * len(ALL) * 2
    n_kept = (N_LAYERS - len(DROPPED)) * len(ALL) * 2
    assert f"{n_kept} copied, {n_dropped} of dropped layers left out" in shown
    assert main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "-q"]) == 0
    assert not capsys.readouterr().out


def test_a_repaired_model_takes_adapters_too(adapter: Path, pruned: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    content = json.loads(plan_in(pruned).read_text())
    plan.write_text(json.dumps(content | {"recovery": {"method": "refit", "tensors_changed": 3}}))
    moved = move_adapter(adapter, tmp_path / "out", plan=plan, base=pruned)
    assert (moved.plan.dropped, moved.base) == (tuple(DROPPED), str(pruned))
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
