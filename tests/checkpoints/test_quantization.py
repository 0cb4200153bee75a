from __future__ import annotations

import pytest

from layercut.checkpoints.families import find_rules
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.quantization import renumber_layers, split_name
from layercut.errors import ModelError

LAYOUT = Layout(
    model_type="llama",
    rules=find_rules("llama"),
    n_layers=20,
    layers="model.layers",
    stored="model.layers",
)
# 20 layers, of which 3 and 12 go: 4 becomes 3, 13 becomes 11.
NEW = {old: new for new, old in enumerate(i for i in range(20) if i not in (3, 12))}
NAMES = [
    *(f"model.layers.{i}.{part}.qweight" for i in range(20) for part in ("attn.q", "mlp.down")),
    "lm_head.weight",
]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.q_proj.qweight", ("a.q_proj", "qweight")),
        ("a.q_proj.weight.absmax", ("a.q_proj", "weight.absmax")),
        (
            "a.q.weight.quant_state.bitsandbytes__nf4",
            ("a.q", "weight.quant_state.bitsandbytes__nf4"),
        ),
        ("norm.weight", ("norm", "weight")),
    ],
)
def test_names_are_split_at_the_module(name: str, parts: tuple[str, str]) -> None:
    assert split_name(name) == parts


@pytest.mark.parametrize(
    ("entry", "new"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.1.mlp", ["model.layers.1.mlp"]),
        ("model.layers.4.mlp", ["model.layers.3.mlp"]),
        ("model.layers.12.mlp.down", []),
        ("layers.19.", ["layers.17."]),
        ("model.sublayers.4.mlp", ["model.sublayers.4.mlp"]),
        (r"re:model\.layers\.13\..*", [r"re:model\.layers\.11\..*"]),
        ("re:.*lm_head", ["re:.*lm_head"]),
        (r"-:model\.layers\.12\.mlp.*", []),
        (r"+:.*\.mlp\.down", [r"+:.*\.mlp\.down"]),
        ("*.mlp.down", ["*.mlp.down"]),
        ("model.layers.4.*", ["model.layers.3.*"]),
        (r"re:model\.layers\.(0|1)\..*", [r"re:model\.layers\.(0|1)\..*"]),
        ("re:[", ["re:["]),
    ],
)
def test_entries_follow_their_layers(entry: str, new: list[str]) -> None:
    assert renumber_layers([entry], LAYOUT, NEW, NAMES) == new
    assert renumber_layers({"dynamic": {entry: {"bits": 8}}}, LAYOUT, NEW, NAMES) == {
        "dynamic": {key: {"bits": 8} for key in new}
    }


def test_other_values_stay() -> None:
    content = {"bits": 4, "desc_act": False, "meta": None, "sizes": [1, None], "version": ">=1 (x)"}
    assert renumber_layers(content, LAYOUT, NEW, NAMES) == content


def test_patterns_that_cannot_be_followed_are_refused() -> None:
    with pytest.raises(ModelError, match=r"picks layers by .*1\[0-5\].*one entry per layer"):
        renumber_layers([r"re:.*layers\.1[0-5]\..*"], LAYOUT, NEW, NAMES)
