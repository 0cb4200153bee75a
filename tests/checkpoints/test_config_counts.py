from __future__ import annotations

import pytest

from layercut.checkpoints.config_counts import MAX_COUNT, check_counts, check_layer_count
from layercut.errors import ModelError


@pytest.mark.parametrize("value", ["12", 12.0, True, 0, -3, [12]])
def test_a_number_of_layers_is_a_positive_integer(value: object) -> None:
    with pytest.raises(ModelError, match="which is no number of layers"):
        check_counts({"num_hidden_layers": value})


@pytest.mark.parametrize(
    "raw",
    [
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_experts": 10**9}},
        {"parts": [{"n_heads": -(10**9)}]},
        {"num_attention_heads": float("nan")},
    ],
)
def test_counts_beyond_any_model_are_refused(raw: dict) -> None:
    with pytest.raises(ModelError, match=f"no model has more than {MAX_COUNT:,}"):
        check_counts(raw)


def test_other_numbers_may_be_large() -> None:
    check_counts({"vocab_size": 10**6, "max_position_embeddings": 10**7, "num_hidden_layers": 126})
    check_counts({"num_layers": None, "layers": 10**9})


def test_more_layers_than_tensors_are_refused_before_any_is_built() -> None:
    check_layer_count({"num_hidden_layers": 6}, 6)
    with pytest.raises(ModelError, match="num_hidden_layers = 7, the weights hold 6 tensors"):
        check_layer_count({"text_config": {"num_hidden_layers": 7}}, 6)
