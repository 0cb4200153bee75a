"""Every causal model type of the installed transformers: exact, refused, or not built with why."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from conftest import plan_of
from decoder_status import ALIKE, CACHE_INEXACT, NOT_BUILT, REFUSED, TIED
from family_configs import FAMILIES, Family
from layercut.checkpoints.layout import LAST_TO_COUNT, Layout
from layercut.checkpoints.preflight import check_folder
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import ModelError
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.output.decoding import cached_logits, measure_cache_gap
from layercut.recovery.fit import fit
from layercut.scoring.score import score
from layercut.types import CalibrationBatches
from saved_families import NOTHING, pass_over, save_family, strictly
from stable_topk import ties_broken_alike
from toy_configs import toy_settings

TYPES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_BUILT.keys())
TESTED_BY_FAMILY = {family.model_type for family in FAMILIES.values()}
IRREGULAR = (1, 2, 5)
TOLERANCE = 1e-5


@dataclass
class Toy:
    """A saved toy model, dense and loaded."""

    model_type: str
    folder: Path
    model: Any

    @property
    def layers(self) -> tuple[str, nn.ModuleList]:
        """Its layer list: the longest way of as many modules as it has layers, by size."""
        n = self.model.config.get_text_config(decoder=True).num_hidden_layers
        lists = [
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == n and ".0." not in name
        ]
        text = [(name, m) for name, m in lists if "vision" not in name and "audio" not in name]
        return max(text, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))


def text_tokens() -> Tensor:
    """Ids below those of images and sounds, (2, 14)."""
    return torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(text_tokens(), use_cache=False).logits


def toy_of(model_type: str, folder: Path) -> Toy:
    save_family(folder, Family(model_type, toy_settings(model_type)))
    return Toy(model_type, folder, strictly(folder))


def drop_sets(toy: Toy) -> Iterator[tuple[int, ...]]:
    """First, last, two in the middle, a half, every second, scattered, one and all of each kind."""
    _, layers = toy.layers
    n = len(layers)
    kinds = {
        str([(name, type(m)) for name, m in layer.named_modules()]): i
        for i, layer in enumerate(layers[1:-1], start=1)
    }
    found = [(0,), (n - 1,), (n // 2 - 1, n // 2), tuple(range(0, n, 2)), tuple(range(1, n, 2))]
    found += [(i,) for i in kinds.values()] + [tuple(range(n // 2)), (1, n - 2, n - 1), IRREGULAR]
    types = getattr(toy.model.config.get_text_config(decoder=True), "layer_types", None) or ()
    found += [tuple(i for i, t in enumerate(types) if t == kind) for kind in dict.fromkeys(types)]
    yield from (d for d in dict.fromkeys(found) if len(d) < n and max(d) < n)


def is_refused(toy: Toy) -> bool:
    """Whether the type is refused before any layer is named, for the reason that is known."""
    try:
        check_folder(toy.folder)
    except ModelError as error:
        pytest_match(str(error), toy.model_type)
        return True
    return False


def write(toy: Toy, dropped: tuple[int, ...], out: Path) -> None:
    layout, _ = check_folder(toy.folder)
    name, layers = toy.layers
    assert layout.layers == name
    write_checkpoint(toy.folder, layout, plan_of(*dropped, n_layers=len(layers)), NOTHING, out)


def check_drop(toy: Toy, dropped: tuple[int, ...], out: Path) -> Any:
    """The written model once it is found exact; the message where the drop is rightly refused."""
    out.mkdir()
    try:
        write(toy, dropped, out)
    except ModelError as error:
        assert not list(out.iterdir())
        if LAST_TO_COUNT in str(error):
            check_none_counts(toy, dropped, out)
        else:
            pytest_match(str(error), toy.model_type)
        return str(error)
    _, layers = toy.layers
    model = strictly(out)
    logits = logits_of(model)
    for i in dropped:
        pass_over(layers[i])
    try:
        expected = logits_of(toy.model)
    finally:
        for i in dropped:
            del layers[i].forward
    assert torch.equal(logits, expected), f"dropping {dropped}"
    if CACHE_INEXACT.get(toy.model_type, TIED) == TIED:
        with ties_broken_alike() if toy.model_type in CACHE_INEXACT else contextlib.nullcontext():
            assert cache_gap(model) <= TOLERANCE, f"cached, dropping {dropped}"
    return model


def cache_gap(model: Any) -> float:
    """In float32, or where that is more than the tolerance, in float64: rounding vanishes."""
    gap = measure_cache_gap(model, text_tokens(), prefill=5)
    if gap > TOLERANCE:
        double = copy.deepcopy(model).double()
        double.set_experts_implementation("eager")  # the grouped one takes no float64
        gap = measure_cache_gap(double, text_tokens(), prefill=5)
    return gap


def check_none_counts(toy: Toy, dropped: tuple[int, ...], out: Path) -> None:
    """Without the refusal, the written model could not decode, or would be refused for more."""
    with patch.object(Layout, "check_dropped"):
        try:
            write(toy, dropped, out)
        except ModelError as error:
            pytest_match(str(error), toy.model_type)
            return
    with pytest.raises(ValueError, match="only contain LinearAttention layers"):
        cached_logits(strictly(out), text_tokens(), prefill=5)


def pytest_match(message: str, model_type: str) -> None:
    reason = REFUSED.get(model_type)
    assert reason, f"{model_type} must be exact, but is refused: {message}"
    with pytest.raises(ModelError, match=reason):
        raise ModelError(message)


@pytest.mark.parametrize("model_type", sorted(set(TYPES) - TESTED_BY_FAMILY - ALIKE))
def test_scattered_layers_go_exactly_or_are_refused(model_type: str, tmp_path: Path) -> None:
    check_drop(toy_of(model_type, tmp_path / "toy"), IRREGULAR, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_any_layers_go_exactly_or_are_refused(model_type: str, tmp_path: Path) -> None:
    toy = toy_of(model_type, tmp_path / "toy")
    if is_refused(toy):
        return
    found = {d: check_drop(toy, d, tmp_path / str(n)) for n, d in enumerate(drop_sets(toy))}
    messages = [message for message in found.values() if isinstance(message, str)]
    assert any(LAST_TO_COUNT not in m for m in messages) == (model_type in REFUSED)
    exact = [(dropped, model) for dropped, model in found.items() if not isinstance(model, str)]
    for dropped, model in exact[-1:]:
        model.generate(text_tokens()[:, :5], max_new_tokens=4, do_sample=False)
        logits = logits_of(model)
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits_of(strictly(tmp_path / "again")), logits)
        view = load(str(toy.folder), dtype="float32")
        apply(view, plan_of(*dropped, n_layers=view.n_layers))
        assert torch.equal(logits_of(view.model), logits)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_scores_and_the_refit_see_the_models_own_stream_or_are_refused(
    model_type: str, tmp_path: Path
) -> None:
    folder = toy_of(model_type, tmp_path / "toy").folder
    batches = CalibrationBatches(text_tokens().repeat(4, 1), 8, 2, "test", "0")
    try:
        view = load(str(folder), dtype="float32")
        found = score(view, batches, method="residual-sensitivity")
    except ModelError:
        return
    assert all(map(math.isfinite, found.values))
    inputs = view.embed(text_tokens())
    hidden = inputs.hidden
    with torch.no_grad():
        for layer in range(view.n_layers):
            hidden = view.run_layer(layer, hidden, inputs)
    torch.testing.assert_close(
        view.stream_losses(hidden, text_tokens()), view.token_losses(text_tokens())
    )
    plan = plan_of(view.n_layers - 2, n_layers=view.n_layers)
    with contextlib.suppress(ModelError):
        apply(view, plan, fit(view, plan, None, batches))


@pytest.mark.parametrize("model_type", sorted(NOT_BUILT))
def test_types_that_are_listed_as_not_built_are_not(model_type: str, tmp_path: Path) -> None:
    part, _ = NOT_BUILT[model_type]
    with pytest.raises(Exception, match=part):
        toy_of(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(CACHE_INEXACT))
def test_types_whose_cache_is_listed_as_inexact_are_so_unpruned(
    model_type: str, tmp_path: Path
) -> None:
    toy = toy_of(model_type, tmp_path / "toy")
    for seed in range(30):
        ids = torch.randint(3, 200, (2, 14), generator=torch.Generator().manual_seed(seed))
        if measure_cache_gap(toy.model, ids, prefill=5) > TOLERANCE:
            break
    else:
        pytest.fail("cached logits are exact")
    if CACHE_INEXACT[model_type] == TIED:
        with ties_broken_alike():
            assert measure_cache_gap(toy.model, ids, prefill=5) <= TOLERANCE


def test_the_tables_name_types_of_this_transformers_only() -> None:
    assert {
        *NOT_BUILT,
        *REFUSED,
        *CACHE_INEXACT,
        *ALIKE,
    } <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert not NOT_BUILT.keys() & REFUSED.keys()


def test_at_least_145_types_are_built() -> None:
    assert len(TYPES) >= 145
