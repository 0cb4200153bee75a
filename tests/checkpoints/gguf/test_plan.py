from __future__ import annotations

from pathlib import Path

import pytest

from conftest import plan_of
from gguf_bytes import BOOL, F32, I32, STRING, U32, key, listed, write_toy
from layercut.checkpoints.gguf.header import GgufHeader
from layercut.checkpoints.gguf.layers import find_layers
from layercut.checkpoints.gguf.model import read_language_model
from layercut.checkpoints.gguf.plan import find_warnings, new_names, new_records
from layercut.checkpoints.gguf.rules import BY_PLACE, PLAIN_FAMILIES, RULES
from layercut.errors import ModelError

WINDOW = "attention.sliding_window"
PATTERN = "attention.sliding_window_pattern"


def records(path: Path, *dropped: int) -> dict[str, bytes]:
    layers = find_layers([read_language_model(path)])
    return new_records(layers, plan_of(*dropped, n_layers=layers.n_layers))


def test_counts_and_lists_follow_the_kept_layers(tmp_path: Path) -> None:
    keys = [
        listed("llama.attention.head_count_kv", U32, [1, 2, 3, 4, 5, 6]),
        listed("llama.feed_forward_length", I32, [10, 20, 30, 40, 50, 60]),
        listed(f"llama.{PATTERN}", BOOL, [True, False, True, True, True, False]),
        listed("xielu.beta", F32, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]),
        key("llama.attention.head_count", U32, 9),
        key("llama.leading_dense_block_count", U32, 3),
        listed("llama.rope.dimension_sections", I32, [1, 2, 3, 4, 5, 6]),
        key("general.size_label", STRING, "8x7B"),
        key("general.description", STRING, "from model.layers.3"),
    ]
    path = write_toy(tmp_path / "m.gguf", keys=keys)
    new = records(path, 1, 4)
    expected = {
        "llama.block_count": key("llama.block_count", U32, 4),
        "llama.attention.head_count_kv": listed("llama.attention.head_count_kv", U32, [1, 3, 4, 6]),
        "llama.feed_forward_length": listed("llama.feed_forward_length", I32, [10, 30, 40, 60]),
        f"llama.{PATTERN}": listed(f"llama.{PATTERN}", BOOL, [True, True, True, False]),
        "xielu.beta": listed("xielu.beta", F32, [0.0, 2.0, 3.0, 5.0]),
        "llama.leading_dense_block_count": key("llama.leading_dense_block_count", U32, 2),
        "general.size_label": key("general.size_label", STRING, "8x4.8B"),
    }
    before = {k: field.record for k, field in read_language_model(path).fields.items()}
    assert list(new) == list(before)
    assert new == before | expected


def test_layers_for_multi_token_prediction_stay_behind(tmp_path: Path) -> None:
    keys = [
        key("glm4moe.nextn_predict_layers", U32, 2),
        listed("glm4moe.attention.head_count", U32, [1, 1, 1, 1, 8, 9]),
    ]
    layers = find_layers(
        [read_language_model(write_toy(tmp_path / "m.gguf", "glm4moe", keys=keys))]
    )
    assert (layers.n_layers, layers.n_behind) == (4, 2)
    plan = plan_of(1, n_layers=4)
    names = new_names(layers, plan)
    assert names["blk.3.attn_q.weight"] == "blk.2.attn_q.weight"
    assert names["blk.5.attn_q.weight"] == "blk.4.attn_q.weight"
    assert "blk.1.attn_q.weight" not in names
    new = new_records(layers, plan)
    assert new["glm4moe.block_count"] == key("glm4moe.block_count", U32, 5)
    assert new["glm4moe.nextn_predict_layers"] == key("glm4moe.nextn_predict_layers", U32, 2)
    heads = listed("glm4moe.attention.head_count", U32, [1, 1, 1, 8, 9])
    assert new["glm4moe.attention.head_count"] == heads


def test_an_encoder_in_the_same_file_keeps_its_layers(tmp_path: Path) -> None:
    extra = ["v.blk.1.attn_q.weight", "mm.layers.1.weight"]
    keys = [key("gemma3.vision.block_count", U32, 27)]
    path = write_toy(tmp_path / "m.gguf", "gemma3", keys=keys, extra=extra)
    layers = find_layers([read_language_model(path)])
    names = new_names(layers, plan_of(1))
    assert {names[name] for name in extra} == set(extra)


def window(family: str, size: int = 512) -> bytes:
    return key(f"{family}.{WINDOW}", U32, size)


FITTING: dict[str, tuple[str, int, list[bytes], tuple[int, ...]]] = {
    "gemma2 pair": ("gemma2", 8, [], (2, 3)),
    "gemma2 period of three": ("gemma2", 9, [key(f"gemma2.{PATTERN}", U32, 3)], (3, 4, 5)),
    "gemma3 period": ("gemma3", 12, [window("gemma3")], tuple(range(6))),
    "gemma3 tail": ("gemma3", 9, [window("gemma3")], (8,)),
    "gemma3 without a window": ("gemma3", 9, [], (2,)),
    "gemma4 list": ("gemma4", 3, [listed(f"gemma4.{PATTERN}", BOOL, [True, True, False])], (0,)),
    "exaone4 1.2B": ("exaone4", 30, [], (3,)),
    "deepseek2 lite 27": ("deepseek2", 27, [], (26,)),
    "deepseek2 large": ("deepseek2", 60, [], (9,)),
    "command-r 35B": ("command-r", 40, [], (9,)),
    "llama4 period": ("llama4", 8, [], (4, 5, 6, 7)),
    "llama4 without windows": ("llama4", 8, [window("llama4", 0)], (4,)),
    "minicpm with its scale": ("minicpm", 6, [key("minicpm.residual_scale", F32, 0.2)], (1,)),
    "qwen3next interval": ("qwen3next", 8, [], (0, 1, 2, 3)),
    "qwen3next list": (
        "qwen3next",
        4,
        [listed("qwen3next.attention.recurrent_layers", BOOL, [True, False, True, False])],
        (0, 3),
    ),
    "jamba": ("jamba", 4, [listed("jamba.attention.head_count_kv", U32, [0, 0, 8, 0])], (0, 3)),
    "qwen3vl behind": ("qwen3vl", 6, [key("qwen3vl.n_deepstack_layers", U32, 3)], (3,)),
    "openelm": (
        "openelm",
        3,
        [
            listed("openelm.attention.head_count", U32, [12, 14, 16]),
            key("openelm.attention.key_length", U32, 64),
            key("openelm.attention.value_length", U32, 64),
        ],
        (0,),
    ),
    "smallthinker without a window": ("smallthinker", 6, [], (0,)),
}


@pytest.mark.parametrize("case", FITTING)
def test_plans_that_leave_every_layer_what_it_was_are_taken(tmp_path: Path, case: str) -> None:
    family, n_blocks, keys, dropped = FITTING[case]
    new = records(write_toy(tmp_path / "m.gguf", family, n_blocks=n_blocks, keys=keys), *dropped)
    count = key(f"{family}.block_count", U32, n_blocks - len(dropped))
    assert new[f"{family}.block_count"] == count


ANOTHER = "would become layer"
REFUSED: dict[str, tuple[str, int, list[bytes], tuple[int, ...], str]] = {
    "gemma2": ("gemma2", 8, [], (2,), "of every 2 layers all but one slide"),
    "gemma2 27B": (
        "gemma2",
        46,
        [
            key("gemma2.embedding_length", U32, 4608),
            key("gemma2.attention.head_count", U32, 32),
            key("gemma2.attention.key_length", U32, 128),
        ],
        (44, 45),
        "knows the 27B model of 'gemma2' by 46 layers",
    ),
    "gemma3": ("gemma3", 12, [window("gemma3")], (0,), ANOTHER),
    "gemma3 27B": (
        "gemma3",
        62,
        [
            window("gemma3"),
            key("gemma3.embedding_length", U32, 5376),
            key("gemma3.attention.head_count", U32, 32),
            key("gemma3.attention.key_length", U32, 128),
        ],
        (60, 61),
        "knows the 27B model of 'gemma3' by 62 layers",
    ),
    "gemma3n": ("gemma3n", 6, [], (1,), "no layer of 'gemma3n' can be dropped"),
    "gemma4 without list": ("gemma4", 6, [], (1,), "a list is needed there"),
    "gemma4 shared": (
        "gemma4",
        3,
        [
            listed(f"gemma4.{PATTERN}", BOOL, [True, True, False]),
            key("gemma4.attention.shared_kv_layers", U32, 1),
        ],
        (0,),
        "share keys and values or have inputs of their own",
    ),
    "gpt-oss": (
        "gpt-oss",
        6,
        [window("gpt-oss", 128)],
        (0,),
        "of every 2 layers all but one slide",
    ),
    "cohere2": ("cohere2", 8, [window("cohere2")], (1,), "of every 4 layers all but one slide"),
    "olmo3": ("olmo2", 8, [window("olmo2")], (1,), "of every 4 layers all but one slide"),
    "smollm3": ("smollm3", 8, [], (1,), "one of every 4 layers is without rotation"),
    "afmoe rope": (
        "afmoe",
        4,
        [window("afmoe"), listed(f"afmoe.{PATTERN}", BOOL, [True, True, True, False])],
        (0,),
        "one of every 4 layers is without rotation",
    ),
    "smallthinker": (
        "smallthinker",
        8,
        [window("smallthinker")],
        (0,),
        "of every 4 layers all but one slide",
    ),
    "llama4": ("llama4", 8, [], (1,), "of every 4 layers all but one slide"),
    "llama4 experts": (
        "llama4",
        8,
        [window("llama4", 0), key("llama4.interleave_moe_layer_step", U32, 2)],
        (1,),
        "one of every 2 layers has experts",
    ),
    "ernie": (
        "ernie4_5-moe",
        8,
        [key("ernie4_5-moe.interleave_moe_layer_step", U32, 2)],
        (1,),
        "one of every 2 layers has experts",
    ),
    "exaone4 32B": ("exaone4", 64, [], (60, 61, 62, 63), "a member of 'exaone4' by 64 layers"),
    "exaone4 to 64": ("exaone4", 65, [], (0,), "a member of 'exaone4' by 64 layers"),
    "deepseek2 lite": ("deepseek2", 27, [], (1, 2), "a member of 'deepseek2' by 26 layers"),
    "deepseek2 to lite": ("deepseek2", 28, [], (1,), "a member of 'deepseek2' by 26 layers"),
    "command-r plus": ("command-r", 64, [], (1,), "a member of 'command-r' by 64 layers"),
    "baichuan": ("baichuan", 32, [], (1,), "chosen by the number of layers"),
    "minicpm": ("minicpm", 6, [], (1,), "computes it from the number of layers"),
    "minimax": ("minimax-01", 8, [], (1,), "each layer's decay"),
    "qwen3next": ("qwen3next", 8, [], (1,), "one of every 4 layers attends to everything"),
    "qwen35 interval": (
        "qwen35",
        8,
        [key("qwen35.full_attention_interval", U32, 2)],
        (1,),
        "one of every 2 layers attends to everything",
    ),
    "qwen3next no attention": ("qwen3next", 4, [], (3,), "no layer with attention"),
    "jamba no attention": (
        "jamba",
        4,
        [listed("jamba.attention.head_count_kv", U32, [0, 0, 8, 0])],
        (2,),
        "no layer with attention",
    ),
    "nemotron without mamba": (
        "nemotron_h",
        4,
        [
            listed("nemotron_h.attention.head_count_kv", U32, [0, 0, 8, 0]),
            listed("nemotron_h.feed_forward_length", U32, [0, 64, 0, 64]),
        ],
        (0,),
        "no layer with attention, or none without",
    ),
    "first heads": (
        "openelm",
        3,
        [listed("openelm.attention.head_count", U32, [12, 14, 16])],
        (0,),
        "would become the first one with 14 heads",
    ),
    "deepstack": ("qwen3vl", 6, [key("qwen3vl.n_deepstack_layers", U32, 3)], (2,), "also take im"),
    "unknown family": ("rwkv7", 6, [], (1,), "of the family 'rwkv7', and what llama.cpp derives"),
    "unknown list": (
        "llama",
        6,
        [listed("llama.new", F32, [0.0] * 6)],
        (1,),
        "may speak of single",
    ),
    "unknown count": ("llama", 6, [key("llama.dense_layers", U32, 2)], (1,), "may speak of single"),
    "short list": (
        "llama",
        6,
        [listed("llama.feed_forward_length", U32, [1, 2, 3])],
        (1,),
        "has 3 entries of uint32 for 6 layers",
    ),
    "named layers": (
        "llama",
        6,
        [listed("general.tensor_extra.name", STRING, ["blk.3.attn_q.weight"])],
        (1,),
        "names single layers, which layercut cannot renumber",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_llama_cpp_would_misread_are_refused(tmp_path: Path, case: str) -> None:
    family, n_blocks, keys, dropped, why = REFUSED[case]
    path = write_toy(tmp_path / "m.gguf", family, n_blocks=n_blocks, keys=keys)
    with pytest.raises(ModelError, match=why):
        records(path, *dropped)


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"missing": [2]}, "says that it has 6 layers and lacks layer 2"),
        ({"extra": ["blk.6.attn_q.weight"]}, "says that it has 6 layers and holds layer 6"),
        ({"extra": ["dec.blk.0.attn_q.weight"]}, "belongs to single layers in a way"),
        ({"extra": ["per_layer_token_embd.weight"]}, "belongs to single layers in a way"),
    ],
)
def test_tensors_that_belong_to_no_layer_are_refused(
    tmp_path: Path, kwargs: dict[str, list[int]], why: str
) -> None:
    with pytest.raises(ModelError, match=why):
        find_layers([read_language_model(write_toy(tmp_path / "m.gguf", **kwargs))])  # type: ignore[arg-type]


def test_a_listed_pattern_warns_of_readers_that_count(tmp_path: Path) -> None:
    keys = [window("olmo2"), listed(f"olmo2.{PATTERN}", BOOL, [True, True, True, False] * 2)]
    header: GgufHeader = read_language_model(
        write_toy(tmp_path / "m", "olmo2", n_blocks=8, keys=keys)
    )
    layers = find_layers([header])
    assert not find_warnings(layers, plan_of(0, 1, 2, 3, n_layers=8))
    [warning] = find_warnings(layers, plan_of(1, n_layers=8))
    assert "take one of every 4 to be global" in warning


def test_every_family_has_one_row() -> None:
    assert not set(PLAIN_FAMILIES) & BY_PLACE.keys()
    assert len(PLAIN_FAMILIES) == len(set(PLAIN_FAMILIES))
    assert len(RULES) == len(PLAIN_FAMILIES) + len(BY_PLACE)
