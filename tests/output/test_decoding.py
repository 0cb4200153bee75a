"""A checkpoint that cannot decode ends in one line, or is excused with the dense one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from layercut.checkpoints.preflight import load_strictly
from layercut.errors import VerificationError
from layercut.output.decoding import check_decoding_beside

IDS = torch.arange(3, 31)[None]


def open_model(folder: Path) -> Any:
    return load_strictly(folder, torch.float32, torch.device("cpu")).eval()


def without_cache(model: Any) -> Any:
    forward = model.forward

    def refuse(*args: Any, use_cache: bool = True, **kwargs: Any) -> Any:
        if use_cache:
            raise ValueError("no layer counts tokens")
        return forward(*args, use_cache=False, **kwargs)

    model.forward = refuse
    return model


def test_a_model_that_cannot_decode_fails_in_one_line(tiny_llama: Path) -> None:
    why = "cannot decode step by step: no layer counts tokens. Nothing was saved"
    with pytest.raises(VerificationError, match=why):
        check_decoding_beside(
            without_cache(open_model(tiny_llama)), lambda: open_model(tiny_llama), IDS
        )


def test_it_is_excused_where_the_dense_model_cannot_either(tiny_llama: Path) -> None:
    broken = without_cache(open_model(tiny_llama))
    assert check_decoding_beside(open_model(tiny_llama), lambda: broken, IDS)
    assert not check_decoding_beside(broken, lambda: broken, IDS)
