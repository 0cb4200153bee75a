"""Tiny models built from configurations, saved as ordinary checkpoints; no network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.types import CalibrationBatches, PruningPlan

N_LAYERS = 6
VOCABULARY = 259


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids are bytes: 0 = end of text, 1–2 unused, byte b = b + 3."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<eos>": 0, "<bos>": 1, "<pad>": 2} | {c: i + 3 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )


def leading_tokenizer(after: str = "") -> PreTrainedTokenizerFast:
    """The byte tokenizer with ``<bos>`` in front of every text, and perhaps something behind it."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A{after}", special_tokens=[("<bos>", 1), ("<eos>", 0)]
    )
    return tokenizer


def save_tiny(folder: Path, model_type: str = "llama", **overrides: object) -> Path:
    """Write a tiny random checkpoint with a byte tokenizer into ``folder`` and return it.

    Every parameter gets noise, so that no norm is a no-op and every bias is seen.
    """
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "pad_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **(settings | overrides))
    return save_with_noise(folder, config, AutoModelForCausalLM, scale=0.2)


def save_with_noise(folder: Path, config: Any, auto_class: Any, *, scale: float) -> Path:
    """A float32 checkpoint of a configuration with noise on every parameter, and a tokenizer."""
    torch.manual_seed(0)
    model = auto_class.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint; read-only by convention."""
    return save_tiny(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def view(tiny_llama: Path) -> DecoderView:
    """The tiny Llama, freshly loaded, in exact float32 arithmetic."""
    return load(str(tiny_llama), dtype="float32")


@pytest.fixture
def ids() -> torch.Tensor:
    """Four sequences of 32 random tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (4, 32), generator=generator)


@pytest.fixture
def batches(ids: torch.Tensor) -> CalibrationBatches:
    """The same four sequences as calibration batches, two per gradient group."""
    return CalibrationBatches(ids, gradient_batch=2, micro_batch=2, source="test", fingerprint="0")


def plan_of(*dropped: int, n_layers: int = N_LAYERS) -> PruningPlan:
    """A plan that drops ``dropped``."""
    return PruningPlan(model="tiny", n_layers=n_layers, dropped=dropped, method="given")
