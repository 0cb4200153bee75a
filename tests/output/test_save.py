from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import plan_of, save_tiny
from family_configs import FAMILIES, Family
from layercut.checkpoints.output_dir import staged_folder
from layercut.checkpoints.patch import round_patch
from layercut.checkpoints.preflight import read_layout
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import OutputError, PlanError, VerificationError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.save import save
from layercut.output.verify import verify_checkpoint
from layercut.pipeline.prune_files import prune
from layercut.types import WeightPatch
from saved_families import save_family
from toy_configs import toy_settings
from written import NOTHING, all_tensors, digest, identity_logits, patch_for, read_back


def test_rounding_a_patch_keeps_memory_and_file_equal(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "source")
    state = {name: t.bfloat16() for name, t in all_tensors(source).items()}
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    view = load(str(source), dtype="float32")
    name = "model.layers.3.mlp.down_proj.weight"
    patch = round_patch(
        source, read_layout(source), WeightPatch({name: torch.randn(16, 32)}, "test")
    )
    assert patch.tensors[name].dtype == torch.bfloat16
    apply(view, plan_of(1), patch)
    save(view, plan_of(1), patch, tmp_path / "out")


def test_save_writes_what_is_in_memory(tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    view, patch, out = load(str(tiny_llama)), patch_for(tiny_llama), tmp_path / "out"
    before = digest(tiny_llama)
    apply(view, plan_of(1, 4), patch)
    assert save(view, plan_of(1, 4), patch, str(out)) == out
    assert torch.equal(read_back(out, ids), identity_logits(tiny_llama, (1, 4), patch, ids))
    assert json.loads((out / "layercut" / "plan.json").read_text())["dropped"] == [1, 4]
    with pytest.raises(OutputError, match="--overwrite"):
        save(view, plan_of(1, 4), patch, out)
    save(view, plan_of(1, 4), patch, out, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert digest(tiny_llama) == before


def test_a_written_checkpoint_can_be_pruned_again(tiny_llama: Path, tmp_path: Path) -> None:
    view = load(str(tiny_llama))
    apply(view, plan_of(1), NOTHING)
    again = load(str(save(view, plan_of(1), NOTHING, tmp_path / "once")))
    apply(again, plan_of(0, n_layers=5), NOTHING)
    assert load(str(save(again, plan_of(0, n_layers=5), NOTHING, tmp_path / "twice"))).n_layers == 4


def test_save_before_apply_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="has 6 layers, the plan keeps 5: apply the plan first"):
        save(load(str(tiny_llama)), plan_of(1), NOTHING, tmp_path / "out")


def test_a_model_that_differs_from_the_file_is_not_saved(tiny_llama: Path, tmp_path: Path) -> None:
    view = load(str(tiny_llama))
    apply(view, plan_of(1), patch_for(tiny_llama))
    with pytest.raises(VerificationError, match="logits differ from the model's in memory by"):
        save(view, plan_of(1), NOTHING, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_files_that_do_not_reload_fail_verification(tiny_llama: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(tiny_llama, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"does not reload: .*missing keys.*up_proj"):
        verify_checkpoint(broken, load(str(tiny_llama)), plan_of(), NOTHING)


def test_a_wrong_cache_fails_verification(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layercut.output import verify

    def two_layers_share_a_slot(*args: Any) -> Any:
        model = load_strictly(*args)
        model.model.layers[3].self_attn.layer_idx = 2
        return model

    load_strictly = verify.load_strictly
    monkeypatch.setattr(verify, "load_strictly", two_layers_share_a_slot)
    with pytest.raises(VerificationError, match="cached logits differ from its uncached ones"):
        verify_checkpoint(tiny_llama, load(str(tiny_llama)), plan_of(), NOTHING)


def test_a_cache_that_is_wrong_in_the_dense_model_too_fails_nothing(tmp_path: Path) -> None:
    # transformers' own cached decoding of Moshi is off once the sliding window is exceeded.
    source = save_family(tmp_path / "source", Family("moshi", toy_settings("moshi")))
    view = load(str(source), dtype="float32")
    verify_checkpoint(source, view, plan_of(n_layers=8), NOTHING)


def test_a_model_without_keys_and_values_is_pruned_though_its_cache_fails(tmp_path: Path) -> None:
    # transformers reads the cache's length from a layer with keys and values, and Granite has none.
    settings = {**FAMILIES["granitemoehybrid"].settings, "layer_types": ["mamba"] * 8}
    source = save_family(tmp_path / "source", Family("granitemoehybrid", settings))
    checks = prune(str(source), tmp_path / "out", drop=[1, 5]).checks
    assert checks[1] == "It does not decode with a cache as without, and neither does the source."
    view = load(str(tmp_path / "out"), dtype="float32")
    verify_checkpoint(tmp_path / "out", view, plan_of(n_layers=6), NOTHING)


DISK_FULL = """
import resource, sys
from pathlib import Path
from layercut.errors import ResourceError
from layercut.output.save import save
from layercut.models.load import load
from layercut.output.verify import verify_checkpoint
from layercut.models.surgery import apply
from layercut.types import PruningPlan, WeightPatch

source, out = sys.argv[1:]
view, plan = load(source), PruningPlan("tiny", 6, (1,), "given")
apply(view, plan)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(view, plan, WeightPatch({}, "none"), out)
except ResourceError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_nothing_behind(tiny_llama: Path, tmp_path: Path) -> None:
    before = digest(tiny_llama)
    command = [sys.executable, "-c", DISK_FULL, str(tiny_llama), str(tmp_path / "out")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 7, process.stderr
    assert "the disk became full" in process.stdout
    assert not any(tmp_path.iterdir())
    assert digest(tiny_llama) == before


def test_ctrl_c_while_shards_are_written_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        staged_folder(tmp_path / "out", overwrite=False) as folder,
    ):
        write_checkpoint(tiny_llama, read_layout(tiny_llama), plan_of(1), NOTHING, folder)
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())
