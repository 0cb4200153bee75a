"""Every family's pruned checkpoint, written by the real writer, against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from family_configs import FAMILIES, MOE, N_TOKENS, ROTARY, VOCABULARY, Family
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer, plan_of
from layercut.errors import ModelError
from layercut.models.checkpoint import write_checkpoint
from layercut.models.load import load
from layercut.models.preflight import layout_of
from layercut.models.verification import cached_logits
from layercut.surgery import apply
from layercut.types import WeightPatch

NOISE = 0.05
NOTHING = WeightPatch({}, "none")


def save_family(folder: Path, family: Family) -> Path:
    config = AutoConfig.for_model(family.model_type, **family.settings)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(NOISE * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Path]:
    family = FAMILIES[request.param]
    return family, save_family(tmp_path_factory.mktemp("family"), family)


def n_layers_of(family: Family) -> int:
    config = AutoConfig.for_model(family.model_type, **family.settings)
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def strictly(folder: Path) -> Any:
    """As any user of transformers loads it, with every key accounted for."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.eval()


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, N_TOKENS), generator=generator)


def pass_over(layer: Any) -> None:
    forward = layer.forward

    def passed_over(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = forward(hidden_states, *args, **kwargs)
        return (hidden_states, *output[1:]) if isinstance(output, tuple) else hidden_states

    layer.forward = passed_over


@torch.no_grad()
def identity_logits(folder: Path, layers: str, dropped: tuple[int, ...]) -> Tensor:
    """Logits of the dense model whose dropped layers return what they are given."""
    model = strictly(folder)
    for index in dropped:
        pass_over(model.get_submodule(layers)[index])
    return model(tokens(), use_cache=False).logits


def test_written_models_equal_the_dense_one_with_identity_layers(
    case: tuple[Family, Path], tmp_path: Path
) -> None:
    family, source = case
    for dropped in family.drops:
        layout = layout_of(source)
        out = tmp_path / "-".join(map(str, dropped))
        out.mkdir()
        plan = plan_of(*dropped, n_layers=layout.n_layers)
        write_checkpoint(source, layout, plan, NOTHING, out)
        model = strictly(out)
        with torch.no_grad():
            logits = model(tokens(), use_cache=False).logits
        expected = identity_logits(source, layout.layers, dropped)
        if family.tolerance:
            gap = (logits - expected).abs().max() / expected.abs().max()
            assert 0 < gap <= family.tolerance
        else:
            assert torch.equal(logits, expected)
        gap = (cached_logits(model, tokens(), prefill=5) - logits).abs().max()
        assert gap <= 1e-5
        model.save_pretrained(tmp_path / "again")
        with torch.no_grad():
            assert torch.equal(
                strictly(tmp_path / "again")(tokens(), use_cache=False).logits, logits
            )


def test_memory_and_file_agree(case: tuple[Family, Path], tmp_path: Path) -> None:
    family, source = case
    if family.unprunable:
        with pytest.raises(ModelError, match=family.unprunable):
            load(str(source), dtype="float32")
        return
    view = load(str(source), dtype="float32")
    plan = plan_of(*family.drops[-1], n_layers=view.n_layers)
    write_checkpoint(source, view.layout, plan, NOTHING, tmp_path)
    apply(view, plan)
    with torch.no_grad():
        logits = view.model(tokens(), use_cache=False).logits
        assert torch.equal(strictly(tmp_path)(tokens(), use_cache=False).logits, logits)


def test_drops_that_the_family_cannot_express_are_refused(
    case: tuple[Family, Path], tmp_path: Path
) -> None:
    family, source = case
    for dropped, why in (family.refused or {}).items():
        layout = layout_of(source)
        plan = plan_of(*dropped, n_layers=layout.n_layers)
        with pytest.raises(ModelError, match=why):
            write_checkpoint(source, layout, plan, NOTHING, tmp_path)
        assert not list(tmp_path.iterdir())


def test_all_51_configurations_are_there() -> None:
    assert len(FAMILIES) == 51


@pytest.mark.parametrize(
    ("model_type", "settings", "what"),
    [
        ("diffllama", {"num_key_value_heads": 2}, "lambda_init would change"),
        ("beam", MOE | {"sliding_window": 4, "n_group": 1, "topk_group": 1}, "residual_add_idx"),
    ],
)
def test_families_without_a_rule_whose_layers_compute_with_their_number_are_refused(
    tmp_path: Path, model_type: str, settings: dict[str, Any], what: str
) -> None:
    source = save_family(tmp_path / "source", Family(model_type, ROTARY | settings))
    layout = layout_of(source)
    with pytest.raises(ModelError, match=what):
        write_checkpoint(source, layout, plan_of(0, n_layers=8), NOTHING, tmp_path)
