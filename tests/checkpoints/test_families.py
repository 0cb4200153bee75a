"""Every family's pruned checkpoint, written by the real writer, against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from conftest import plan_of
from family_configs import FAMILIES, MOE, ROTARY, Family
from layercut.checkpoints.preflight import read_layout
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.decoding import cached_logits
from saved_families import NOTHING, identity_logits, save_family, strictly, tokens


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Path]:
    family = FAMILIES[request.param]
    return family, save_family(tmp_path_factory.mktemp("family"), family)


def n_layers_of(family: Family) -> int:
    config = AutoConfig.for_model(family.model_type, **family.settings)
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def test_written_models_equal_the_dense_one_with_identity_layers(
    case: tuple[Family, Path], tmp_path: Path
) -> None:
    family, source = case
    for dropped in family.drops:
        layout = read_layout(source)
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
        layout = read_layout(source)
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
    layout = read_layout(source)
    with pytest.raises(ModelError, match=what):
        write_checkpoint(source, layout, plan_of(0, n_layers=8), NOTHING, tmp_path)
