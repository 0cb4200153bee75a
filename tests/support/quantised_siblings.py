"""Checkpoints whose linear weights are stored as GPTQ, AWQ, FP8 or bitsandbytes store them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def packed(name: str, weight: Tensor, kind: str) -> Tensors:
    """What quantisers store instead of a linear weight, with random content."""
    module = name.removesuffix(".weight")
    rows, columns = weight.shape
    if kind == "fp8":
        return {
            name: weight.to(torch.float8_e4m3fn),
            f"{module}.weight_scale_inv": torch.rand(1, 1),
        }
    if kind == "bnb":
        state = json.dumps({"quant_type": "nf4", "shape": [rows, columns]}).encode()
        return {
            name: torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8),
            f"{name}.absmax": torch.rand(rows * columns // 64 + 1),
            f"{name}.quant_map": torch.rand(16),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(state), dtype=torch.uint8),
        }
    found = {
        f"{module}.qweight": torch.randint(-9, 9, (columns // 8, rows), dtype=torch.int32),
        f"{module}.qzeros": torch.randint(-9, 9, (1, rows // 2), dtype=torch.int32),
        f"{module}.scales": torch.rand(1, rows).half(),
    }
    if kind == "gptq":
        found[f"{module}.g_idx"] = torch.zeros(columns, dtype=torch.int32)
    return found


CONFIGS = {
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]],
        "dynamic": {r"-:model\.layers\.4\.mlp\..*": {}, r"-:.*\.lm_head": {}},
    },
    "awq": {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["model.layers.4.mlp"]},
    "fp8": {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp", "model.layers.4.mlp"],
    },
    "bnb": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "llm_int8_skip_modules": ["lm_head", "model.layers.1.mlp", "model.layers.4.mlp"],
    },
}
SKIPPED = {kind: {1, 4} if kind in ("fp8", "bnb") else {4} for kind in CONFIGS}


def quantised(source: Path, folder: Path, kind: str) -> Path:
    """A sibling of ``source`` whose linear weights are stored as ``kind`` stores them."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    new: Tensors = {}
    torch.manual_seed(1)
    for name, tensor in state.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        plain = "_proj.weight" not in name or (layer in SKIPPED[kind] and ".mlp." in name)
        new |= {name: tensor} if plain else packed(name, tensor, kind)
    save_file(new, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, quantization_config=CONFIGS[kind])
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))
