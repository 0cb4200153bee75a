"""What names a layer is renumbered by the decoder's own prefix, and by nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from family_configs import ROTARY
from layercut.checkpoints.families import find_rules
from layercut.checkpoints.layer_names import LayerNames
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.preflight import find_models
from layercut.errors import ModelError

# 8 layers, of which 2 and 5 go: 3 becomes 2, 6 becomes 4.
NEW = {old: new for new, old in enumerate(i for i in range(8) if i not in (2, 5))}
DECODER, TOWER = "language_model.model.layers", "vision_model.model.layers"
TEXT = ROTARY | {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 32}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "vision_output_dim": 16,
    "projector_input_dim": 16,
    "projector_output_dim": 16,
}
NAMES = [
    *(f"{DECODER}.{i}.self_attn.q_proj.weight" for i in range(8)),
    *(f"{DECODER}.{i}.feed_forward.router.weight" for i in range(8)),
    *(f"{TOWER}.{i}.self_attn.q_proj.weight" for i in range(8)),
    *(f"{TOWER}.{i}.mlp.fc1.weight" for i in range(8)),
    "mtp.layers.0.fc.weight",
    "mtp.layers.3.fc.weight",
    "language_model.lm_head.weight",
]


@pytest.fixture(scope="module")
def names() -> LayerNames:
    """A Llama 4 of text and vision, both eight layers deep, with prediction layers beside."""
    config = AutoConfig.for_model("llama4", text_config=TEXT, vision_config=VISION)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layout = Layout("llama4_text", find_rules("llama4_text"), 8, "model.layers", DECODER)
    return LayerNames(layout, NEW, NAMES, lambda: find_models(config, model))


@pytest.mark.parametrize(
    ("text", "new"),
    [
        # The decoder as it is stored, in memory, as other libraries wrap it, and its last part.
        (f"{DECODER}.3.self_attn.q_proj", f"{DECODER}.2.self_attn.q_proj"),
        ("model.layers.3.self_attn", "model.layers.2.self_attn"),
        ("model.language_model.layers.6", "model.language_model.layers.4"),
        (f"{DECODER}.2.self_attn", None),
        ("model.layers.5", None),
        # Another part, as it is stored and in any other spelling.
        (f"{TOWER}.3.mlp.fc1", f"{TOWER}.3.mlp.fc1"),
        (f"{TOWER}.5", f"{TOWER}.5"),
        ("mtp.layers.3.fc", "mtp.layers.3.fc"),
        # Endings alone, as libraries read them: only one part has such a module.
        ("layers.3.mlp.fc1", "layers.3.mlp.fc1"),
        ("layers.3.feed_forward", "layers.2.feed_forward"),
        # Numbers that stay, and numbers that no layer has.
        ("layers.1.self_attn", "layers.1.self_attn"),
        ("other.layers.1.self_attn", "other.layers.1.self_attn"),
        ("other.layers.61.self_attn", "other.layers.61.self_attn"),
        # Expressions and wildcards: by what they pick.
        (r"re:language_model\.model\.layers\.3\..*", r"re:language_model\.model\.layers\.2\..*"),
        (r"re:.*language_model.*layers\.3\..*", r"re:.*language_model.*layers\.2\..*"),
        (r"re:.*vision_model.*layers\.3\..*", r"re:.*vision_model.*layers\.3\..*"),
        (r"re:vision_model\.model\.layers\.[35]\..*", r"re:vision_model\.model\.layers\.[35]\..*"),
        (r"re:.*layers\.3\.mlp\.fc1", r"re:.*layers\.3\.mlp\.fc1"),
        (r"re:.*layers\.3\.feed_forward.*", r"re:.*layers\.2\.feed_forward.*"),
        (r"-:model\.layers\.6\.self_attn.*", r"-:model\.layers\.4\.self_attn.*"),
        (r"-:model\.layers\.5\.self_attn.*", None),
        (r"re:language_model\.layers\.5\..*", None),
        ("*.layers.*.mlp.fc1", "*.layers.*.mlp.fc1"),
        (f"{TOWER}.3.*", f"{TOWER}.3.*"),
    ],
)
def test_only_the_decoders_own_names_follow_the_drop(
    names: LayerNames, text: str, new: str | None
) -> None:
    assert names.renumber(text) == new


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("layers.3.self_attn.q_proj", "neither one of"),  # both parts have it
        ("draft.layers.3.self_attn", "neither one of"),
        ("blk.3.attn_q", "neither one of"),
        (r"re:.*layers\.3\.self_attn.*", "cannot be renumbered"),
        (r"re:.*layers\.[3-5]\.feed_forward", "cannot be renumbered"),
        (r"re:draft\.layers\.3\..*", "picks nothing"),
    ],
)
def test_what_cannot_be_told_is_refused_by_name(names: LayerNames, text: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        names.renumber(text)


def test_every_place_of_a_configuration_is_walked(names: LayerNames) -> None:
    content: dict[str, Any] = {
        "note": "see layers.3 of the paper",
        "path": "org/h.3-model",
        "groups": {"group_0": {"targets": [f"{DECODER}.3.mlp", f"{TOWER}.3.mlp"]}},
        "quantization_config": {
            "layers_to_keep": [0, 3, 5],
            "extra_config": {"model.layers.5.mlp": {"bits": 8}, "model.layers.6.mlp": {"bits": 2}},
            "version": ">=1 (x)",
        },
    }
    assert names.walk(content) == content | {
        "groups": {"group_0": {"targets": [f"{DECODER}.2.mlp", f"{TOWER}.3.mlp"]}},
        "quantization_config": {
            "layers_to_keep": [0, 2],
            "extra_config": {"model.layers.4.mlp": {"bits": 2}},
            "version": ">=1 (x)",
        },
    }


def test_metadata_of_a_file_is_renumbered_in_keys_values_and_json(names: LayerNames) -> None:
    inner = json.dumps({"layers": {f"{DECODER}.6.mlp": {"format": "x"}, f"{TOWER}.6.mlp": {}}})
    metadata = {
        "format": "pt",
        f"{DECODER}.3.norm.weight": f"{DECODER}.6.norm.weight",
        f"{DECODER}.5.norm.weight": "x",
        "_quantization_metadata": inner,
        "note": '{"not": json',
    }
    assert names.renumber_metadata(metadata) == {
        "format": "pt",
        f"{DECODER}.2.norm.weight": f"{DECODER}.4.norm.weight",
        "_quantization_metadata": inner.replace(f"{DECODER}.6", f"{DECODER}.4"),
        "note": '{"not": json',
    }
    assert names.renumber_metadata(None) is None


def test_wildcards_that_are_known_as_such_are_not_read_as_expressions() -> None:
    layout = Layout("llama", find_rules("llama"), 20, "model.layers", "model.layers")
    new = {old: new for new, old in enumerate(i for i in range(20) if i != 0)}
    names = LayerNames(layout, new, [f"model.layers.{i}.mlp.weight" for i in range(20)])
    # As an expression, it would pick layers 10 to 19 too.
    assert names.walk({"exclude_modules": ["model.layers.1.*"]}, every_pattern=True) == {
        "exclude_modules": ["model.layers.0.*"]
    }
    with pytest.raises(ModelError, match="cannot be renumbered"):
        names.walk({"ignore": ["model.layers.1.*"]}, every_pattern=True)
