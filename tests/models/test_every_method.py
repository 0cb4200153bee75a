"""Every score and every recovery on every family: it works, or it is refused as the page says."""

from __future__ import annotations

import warnings

import pytest
import torch

from conftest import plan_of
from family_configs import FAMILIES
from layercut.errors import LayercutError
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit_repair
from layercut.registry import MethodCall, available, resolve
from layercut.scoring.score import score_layers
from layercut.types import CalibrationBatches
from method_status import find_refusal
from saved_families import save_family

PRUNABLE = sorted(name for name, family in FAMILIES.items() if not family.unprunable)
CHEAP = {"igia": {"steps": 3}, "sign-merge": {"steps": 3, "strength": 1.0}}
METHODS = [("scoring", name) for name in available("scoring")]
METHODS += [("recovery", name) for name in available("recovery")]
QUICK = ("llama", "gemma3", "mixtral", "mamba")
"""Families of four kinds, in the normal suite; all others are slow tests."""


@pytest.fixture(
    scope="module",
    params=[
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRUNABLE
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, DecoderView]:
    folder = save_family(tmp_path_factory.mktemp("family"), FAMILIES[request.param])
    return request.param, load(str(folder), dtype="float32")


@pytest.mark.parametrize(("stage", "method"), METHODS)
def test_it_works_or_is_refused_as_the_page_says(
    case: tuple[str, DecoderView], stage: str, method: str
) -> None:
    family, view = case
    call = resolve(stage, method, CHEAP.get(method, {}))  # type: ignore[arg-type]
    why = find_refusal(method, family) if call.method.reads_model else None
    if why is None:
        use(view, family, call)
        return
    with pytest.raises(LayercutError, match=why):
        use(view, family, call)


def use(view: DecoderView, family: str, call: MethodCall) -> None:
    """Score the layers, or repair a plan that the family allows."""
    ids = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(3))
    batches = CalibrationBatches(ids, 2, 4, "random", "random")
    if call.stage == "scoring":
        values = score_layers(view, batches, call).values
        assert len(values) == view.n_layers and None not in values
        return
    plans = [drops for drops in FAMILIES[family].drops if 0 not in drops]
    plan = plan_of(*(plans[-1] if plans else (view.n_layers - 1,)), n_layers=view.n_layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny models are not like others
        assert fit_repair(view, plan, None, batches, call)
