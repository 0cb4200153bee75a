from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import save_tiny
from layercut.errors import ModelError, OutputError, PlanError, VerificationError
from layercut.models.load import load
from layercut.output import verify
from layercut.pipeline.prune_files import prune
from quantised_siblings import CONFIGS, edit_config, quantised

Tensors = dict[str, Tensor]


def write_plan(folder: Path, *dropped: int, n_layers: int = 6, **more: object) -> Path:
    content = {"schema": 1, "n_layers": n_layers, "dropped": list(dropped), **more}
    (folder / "plan.json").write_text(json.dumps(content))
    return folder / "plan.json"


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_plan_prunes_quantised_siblings_by_renaming(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    source = quantised(tiny_llama, tmp_path / "source", kind)
    plan, out = write_plan(tmp_path, 1, 3), tmp_path / "out"
    result = prune(str(source), out, plan=plan)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    new = {"0": "0", "2": "1", "4": "2", "5": "3"}
    expected = {}
    for name, tensor in before.items():
        parts = name.split(".")
        if parts[1] == "layers":
            if parts[2] not in new:
                continue
            parts[2] = new[parts[2]]
        expected[".".join(parts)] = tensor
    assert expected.keys() == after.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].view(torch.uint8).equal(tensor.view(torch.uint8))
    config = json.loads((out / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    text = json.dumps(config["quantization_config"])
    assert "layers.2.mlp" in text.replace("\\", "")
    assert "layers.1" not in text.replace("\\", "")
    assert "layers.4" not in text.replace("\\", "")
    assert result.checks == [
        f"{len(after)} tensors have the names, shapes and sha256 that they should.",
        "Logits were not compared: the weights are quantised.",
        "Whether it decodes with a cache and generates was not tried, for the same reason.",
    ]
    with pytest.raises(ModelError, match=r"prune this one by .layercut prune MODEL --plan"):
        load(str(out))


def test_older_quantisation_files_are_renumbered_too(tiny_llama: Path, tmp_path: Path) -> None:
    source = quantised(tiny_llama, tmp_path / "source", "awq")
    (source / "quant_config.json").write_text('{"w_bit": 4, "skip": ["model.layers.4.mlp"]}')
    prune(str(source), tmp_path / "out", drop=[0, 3])
    content = (tmp_path / "out" / "quant_config.json").read_text()
    assert content == '{"w_bit": 4, "skip": ["model.layers.2.mlp"]}'


def test_unquantised_models_are_run_layer_by_layer(
    tiny_llama: Path, tmp_path: Path, ids: Tensor
) -> None:
    result = prune(str(tiny_llama), tmp_path / "out", drop=[4, 1])
    assert result.checks[-1].startswith("Logits are those of the source")
    dense = load(str(tiny_llama), dtype="float32")
    with dense.skipping([1, 4]):
        expected = dense.model(ids, use_cache=False).logits
    out = load(str(tmp_path / "out"), dtype="float32")
    assert torch.equal(out.model(ids, use_cache=False).logits, expected)
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    files = {f"layercut/{n}" for n in ("plan.json", "recipe.yaml", "report.html", "result.json")}
    assert files | {"README.md", "config.json"} <= written
    # The plan that it writes can be applied again: nothing but layers changed.
    prune(str(tiny_llama), tmp_path / "again", plan=tmp_path / "out" / "layercut" / "plan.json")
    first, again = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert first.keys() == again.keys()


def test_the_same_as_a_run_without_recovery(tmp_path: Path) -> None:
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
    source = save_tiny(tmp_path / "source", "qwen2", tie_word_embeddings=True, **windows)
    result = prune(str(source), tmp_path / "out", drop=[2, 4])
    assert result.checks[-1].startswith("Logits are those of the source")
    types = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert types == ["full_attention"] * 2 + ["sliding_attention"] * 2


def snapshot(model: Path, cache: Path) -> Path:
    """The Hub cache's layout: a folder of links to blobs, and nothing that may be written to."""
    (cache / "blobs").mkdir(parents=True)
    folder = cache / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        blob = cache / "blobs" / f"{number:040x}"
        shutil.copyfile(path, blob)
        blob.chmod(0o444)
        (folder / path.name).symlink_to(Path("../../blobs") / blob.name)
    folder.chmod(0o555)
    return folder


def state_of(folder: Path) -> list[tuple[str, int, int, str]]:
    return sorted(
        (
            p.relative_to(folder).as_posix(),
            s.st_mtime_ns,
            s.st_mode,
            str(p.readlink()) if p.is_symlink() else "",
        )
        for p in folder.rglob("*")
        for s in [p.lstat()]
    )


def test_a_linked_hub_cache_is_only_read(tiny_llama: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--owner--name"
    source = snapshot(tiny_llama, cache)
    before = state_of(cache)
    prune(str(source), tmp_path / "out", drop=[2])
    assert state_of(cache) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(OutputError, match="source model's folder"):
        prune(str(source), source, drop=[2], overwrite=True)
    source.chmod(0o755)


def lose(part: str) -> Callable[[Tensors], object]:
    def change(state: Tensors) -> None:
        for name in [n for n in state if part in n]:
            del state[name]

    return change


DAMAGES: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "a scale": (lose("layers.3.self_attn.q_proj.scales"), "layer 3 differs .*q_proj: scales"),
    "a module": (lose("layers.0.self_attn.v_proj"), "layer 0 lacks self_attn.v_proj, unlike"),
    "a norm": (lose("layers.5.input_layernorm"), "layer 5 lacks input_layernorm"),
    "a layer": (lose("layers.2."), "= 6, the weights hold 5 layers"),
    "every module": (lose("self_attn.k_proj"), "layer 0 lack self_attn.k_proj"),
    "the head": (lose("lm_head"), "the model lack lm_head"),
    "surplus": (
        lambda s: s.update({"model.layers.1.adapter.qweight": torch.zeros(1)}),
        "layer 1 alone holds adapter",
    ),
    "surplus outside": (
        lambda s: s.update({"score.weight": torch.zeros(1)}),
        "the model hold score, which",
    ),
    "a shape": (
        lambda s: s.update({"model.norm.weight": torch.zeros(8)}),
        r"norm.weight has shape \[8\], config.json makes it \[16\]",
    ),
}


@pytest.mark.parametrize("fault", DAMAGES)
def test_damaged_quantised_checkpoints_are_refused(
    tiny_llama: Path, tmp_path: Path, fault: str
) -> None:
    source = quantised(tiny_llama, tmp_path / "source", "gptq")
    change, message = DAMAGES[fault]
    state = load_file(source / "model.safetensors")
    change(state)
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=message):
        prune(str(source), tmp_path / "out", drop=[1])
    assert not (tmp_path / "out").exists()


PLANS: dict[str, tuple[dict[str, object], str]] = {
    "other size": ({"n_layers": 7}, "plan is for 7 layers, but .* has 6"),
    "recovery": (
        {"recovery": {"method": "refit", "tensors_changed": 9}},
        "recovery 'refit' or a fine-tuning changed kept weights.*recovery.method: none.*--drop",
    ),
    "later schema": ({"schema": 2}, "is not a plan of schema 1"),
    "no list": ({"dropped": "1"}, "is not a plan"),
    "booleans": ({"dropped": [True]}, "is not a plan"),
    "out of range": ({"dropped": [6]}, "the model's layers are 0 to 5"),
    "twice": ({"dropped": [1, 1]}, "names layer 1 twice"),
    "all": ({"dropped": [0, 1, 2, 3, 4, 5]}, "cannot drop 6 of 6 layers"),
    "contradiction": ({"kept": [0, 1]}, "kept and dropped are not the two parts"),
}


@pytest.mark.parametrize("fault", PLANS)
def test_plans_that_do_not_fit_are_refused(tiny_llama: Path, tmp_path: Path, fault: str) -> None:
    changes, message = PLANS[fault]
    content = {"n_layers": 6, "dropped": [1]} | changes
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(PlanError, match=message):
        prune(str(tiny_llama), tmp_path / "out", plan=tmp_path / "plan.json")
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_plans_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "cut.json").write_text("{")
    for name, message in [
        ("pipe", "is not a plain file"),
        ("none", "does not exist"),
        ("list.json", "does not hold a JSON object"),
        ("cut.json", "cannot be read as JSON"),
    ]:
        with pytest.raises(PlanError, match=message):
            prune(str(tiny_llama), tmp_path / "out", plan=tmp_path / name)


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (
            {"schema": 1, "recovery": {"method": "refit", "gradient_steps": [0.001]}},
            "recovery 'refit' changed",
        ),
        (
            {"schema": 2, "recovery": {"method": "refit", "steps": [0.001]}},
            "recovery 'refit' changed",
        ),
        ({"recovery": {"method": "none"}, "recipe": {"finetune": {"mode": "lora"}}}, "fine-tuning"),
    ],
)
def test_plans_without_a_word_on_recovery_are_judged_by_their_result(
    tiny_llama: Path, tmp_path: Path, beside: dict, message: str
) -> None:
    plan = write_plan(tmp_path, 1)
    (tmp_path / "result.json").write_text(json.dumps(beside))
    with pytest.raises(PlanError, match=message):
        prune(str(tiny_llama), tmp_path / "out", plan=plan)


@pytest.mark.parametrize("schema", [1, 2])
def test_a_result_of_either_schema_without_recovery_lets_its_plan_through(
    tiny_llama: Path, tmp_path: Path, schema: int
) -> None:
    beside = {"schema": schema, "recipe": {"finetune": None}, "recovery": {"method": "none"}}
    (tmp_path / "result.json").write_text(json.dumps(beside))
    result = prune(str(tiny_llama), tmp_path / "out", plan=write_plan(tmp_path, 1))
    assert result.plan is not None
    assert result.plan.dropped == (1,)


def test_either_a_plan_or_layers(tiny_llama: Path, tmp_path: Path) -> None:
    for arguments in ({}, {"plan": write_plan(tmp_path, 1), "drop": [1]}):
        with pytest.raises(PlanError, match="either a plan or the layers"):
            prune(str(tiny_llama), tmp_path / "out", **arguments)


@pytest.mark.parametrize("what", ["bytes", "names", "logits"])
def test_a_wrong_copy_is_never_kept(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    from layercut.pipeline import prune_files as module

    write = module.write_checkpoint

    def write_wrongly(
        source: Path, rules: object, plan: object, patch: object, folder: Path
    ) -> None:
        write(source, rules, plan, patch, folder)
        if what == "logits":
            edit_config(folder, rms_norm_eps=0.5)
            return
        state = load_file(folder / "model.safetensors")
        if what == "names":
            state["model.norm.extra"] = torch.zeros(1)
        else:
            state["model.layers.2.mlp.up_proj.weight"][0, 0] += 1
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(module, "write_checkpoint", write_wrongly)
    messages = {
        "bytes": "sha256 of .*up_proj",
        "names": "holds model.norm.extra",
        "logits": "logits differ from the source's",
    }
    with pytest.raises(VerificationError, match=messages[what]):
        prune(str(tiny_llama), tmp_path / "out", drop=[1])
    assert not (tmp_path / "out").exists()


def test_past_the_memory_limit_a_run_is_verified_by_files_and_streams(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layercut.models.surgery import apply
    from layercut.output.save import save
    from layercut.types import PruningPlan, WeightPatch

    monkeypatch.setattr(verify, "available_memory_bytes", lambda: 0)
    monkeypatch.setattr(verify, "load_strictly", None)
    view, plan = load(str(tiny_llama), dtype="float32"), PruningPlan("tiny", 6, (1, 4), "given")
    patch = WeightPatch({"model.layers.0.mlp.down_proj.weight": torch.randn(16, 32)}, "test")
    apply(view, plan, patch)
    save(view, plan, patch, tmp_path / "out")
    content = json.loads((tmp_path / "out" / "layercut" / "plan.json").read_text())
    assert content["recovery"] == {"method": "test", "tensors_changed": 1}
    view.model.model.norm.weight[0] += 1
    with pytest.raises(VerificationError, match="differ from the model's in memory"):
        save(view, plan, patch, tmp_path / "other")
    other = WeightPatch({**patch.tensors, "model.norm.weight": torch.zeros(16)}, "test")
    with pytest.raises(VerificationError, match=r"sha256 of model\.norm\.weight"):
        verify.verify_files(tiny_llama, tmp_path / "out", view.layout, plan, other)
