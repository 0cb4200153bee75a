from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from family_configs import HYBRID, LINEAR, ROTARY, Family
from gguf_files import write_llama
from layercut.cli import main
from layercut.errors import ResourceError
from layercut.machine import measure_rates
from layercut.pipeline import prepare as preparation
from layercut.pipeline.estimate import RunEstimate, StageEstimate, estimate_run
from layercut.pipeline.inspect import inspect
from layercut.pipeline.model_shape import ModelShape
from layercut.pipeline.pass_costs import CALL_SECONDS, TOUCHES, VOCABULARY_TOUCHES, PassCosts
from layercut.pipeline.resources import Available, check_resources, choose_residency, describe_run
from layercut.pipeline.stage_times import STATES_BACKWARD, StageTimes
from saved_families import save_family
from toy_estimates import GB, LAYER, RATES, SHAPE, recipe_of, seconds_of


def test_a_pass_through_a_toy_layer_is_its_products_and_what_they_write() -> None:
    passes = PassCosts(SHAPE, RATES, ranks=1, micro_batch=64)
    # 128 tokens in two calls; per token 2·900 + 2·16·20 operations and 50 numbers.
    expected = 128 * (2440 / 1e9 + TOUCHES * 50 / 1e9) + 2 * CALL_SECONDS
    assert passes.run_layer(LAYER, 128, 16) == pytest.approx(expected)
    # Logits of 100 words from 10 numbers.
    head = 128 * (2 * 100 * 10 / 1e9 + VOCABULARY_TOUCHES * 100 / 1e9)
    assert passes.run_head(128) == pytest.approx(head)
    halved = replace(passes, ranks=2)
    assert halved.run_layer(LAYER, 128, 16) == pytest.approx(expected / 2)


def test_a_score_is_as_many_passes_as_its_method_makes() -> None:
    section = {"n_sequences": 8, "seq_len": 16}
    lowest = {"strategy": "lowest", "drop_layers": 2}
    passes = PassCosts(SHAPE, RATES, ranks=1, micro_batch=8 * 16)
    forward = 8 * passes.run_layer(LAYER, 128, 16)
    for method, expected in (
        ("block-influence", forward),
        ("residual-sensitivity", (1 + STATES_BACKWARD) * (forward + passes.run_head(128))),
        ("random", 0.0),
    ):
        recipe = recipe_of(calibration=section, selection=lowest, scoring={"method": method})
        assert seconds_of(SHAPE, recipe)["select"] == pytest.approx(expected)
    given = recipe_of(calibration=section, selection={"drop": [3]})
    assert seconds_of(SHAPE, given)["select"] == 0


def test_memory_of_a_toy_run_is_weights_rows_and_sums() -> None:
    none = recipe_of(recovery={"method": "none"})
    plain, refit = (
        {e.name: e for e in estimate_run(SHAPE, r, RATES, GB).resident} for r in (none, recipe_of())
    )
    # Eight layers of 1,000 parameters and 1,000 outside of them, four bytes each.
    fixed = plain["recover"].host_bytes - 36_000
    # 48 sequences of 256 tokens: three streams of 10 numbers and inputs of 30; 42 × 256 rows are
    # fitted with 30 features; three layers (4 to 7 less the six that go, at least one).
    rows = 12_288 * 4 * (3 * 10 + 30)
    sums = 8 * 30 * (6 * 30 + 6 * 10) + 4 * (30 + 30) * 40 + 4 * 4096 * (2 * 30 + 4 * 10)
    changed = 1 * 30 * 10 * 4
    logits = fixed + 36_000 + rows + sums + changed
    assert refit["recover"].host_bytes == pytest.approx(logits, abs=1)
    assert "gradient steps" not in plain


@pytest.mark.parametrize(
    ("shape", "section"),
    [
        (replace(SHAPE, layers=(LAYER,) * 16), {}),
        (replace(SHAPE, width=20, n_outside=2000), {}),
        (SHAPE, {"n_sequences": 192}),
    ],
    ids=["layers", "width", "tokens"],
)
def test_more_takes_more(shape: ModelShape, section: dict[str, int]) -> None:
    small = estimate_run(SHAPE, recipe_of(), RATES, GB)
    large = estimate_run(shape, recipe_of(calibration=section), RATES, GB)
    for mode in ("resident", "streamed"):
        assert large.total_seconds(mode) > small.total_seconds(mode)
        pairs = [
            (before.host_bytes or 0, after.host_bytes or 0)
            for before, after in zip(small.stages(mode), large.stages(mode), strict=True)
        ]
        assert all(after >= before for before, after in pairs)
        assert any(after > before for before, after in pairs)


def test_more_ranks_take_less_time() -> None:
    one, two = (sum(seconds_of(SHAPE, recipe_of(), ranks=n).values()) for n in (1, 2))
    assert two < one


def test_streamed_weights_take_two_layers_of_memory_and_a_reading_for_each_pass() -> None:
    layers = (replace(LAYER, n_parameters=10**8, stored_bytes=4 * 10**8),) * 8
    shape = replace(SHAPE, layers=layers, stored_bytes=32 * 10**8)
    estimate = estimate_run(shape, recipe_of(), RATES, GB)
    resident, streamed = (
        next(e for e in stages if e.name == "evaluate dense")
        for stages in (estimate.resident, estimate.streamed)
    )
    assert resident.host_bytes - streamed.host_bytes == 6 * 4 * 10**8
    times = StageTimes(shape, recipe_of(), RATES, 1)
    text = times.evaluate() - times.measure_speed()
    assert streamed.seconds == pytest.approx(text + 3.2)  # one text, read once


def estimate_of(host_bytes: int, streamed_bytes: int = 0, disk_bytes: int = 0) -> RunEstimate:
    stage = StageEstimate("select", 60.0, 0, host_bytes, disk_bytes)
    streamed = replace(stage, host_bytes=streamed_bytes)
    return RunEstimate((stage,), (streamed,), 1, "cpu", RATES)


ROOM = Available(device_bytes=None, host_bytes=10 * GB, temporary_bytes=GB)


def test_weights_are_streamed_where_the_stages_do_not_fit_beside_them() -> None:
    both = ("resident", "streamed")
    assert choose_residency(estimate_of(9 * GB), ROOM, both)[0] == "resident"
    mode, reason = choose_residency(estimate_of(11 * GB, GB), ROOM, both)
    assert mode == "streamed"
    assert "'select' needs about 11.00 GB of memory, and 10.00 GB are free" in reason
    assert choose_residency(estimate_of(11 * GB, GB), ROOM, ("resident",))[0] == "resident"
    asked = choose_residency(estimate_of(GB), ROOM, both, residency="streamed")
    assert asked == ("streamed", "as asked for")


def test_only_what_cannot_fit_is_refused_and_what_may_not_is_warned_of() -> None:
    alone = ("resident",)
    check_resources(estimate_of(9 * GB), ROOM, "resident", alone)
    with pytest.warns(UserWarning, match="memory may run out: 'select' needs about 12"):
        check_resources(estimate_of(12 * GB), ROOM, "resident", alone)
    with pytest.raises(ResourceError, match=r"needs about 15\.38 GB of memory.*Lower calibration"):
        check_resources(estimate_of(20 * GB), ROOM, "resident", alone)
    with pytest.raises(ResourceError, match="Set residency: streamed"):
        check_resources(estimate_of(20 * GB, GB), ROOM, "resident", ("resident", "streamed"))
    with pytest.raises(ResourceError, match=r"2\.00 GB of temporary files.*TMPDIR"):
        check_resources(estimate_of(GB, disk_bytes=2 * GB), ROOM, "resident")


def test_a_gpu_with_too_little_memory_is_refused() -> None:
    stage = StageEstimate("select", 60.0, 20 * GB, GB, 0)
    estimate = RunEstimate((stage,), (stage,), 1, "cuda", RATES)
    with pytest.raises(ResourceError, match=r"of device memory, and 8\.00 GB are free"):
        check_resources(estimate, replace(ROOM, device_bytes=8 * GB), "resident")


def test_methods_without_a_formula_are_named() -> None:
    recipe = recipe_of(
        scoring={"method": "igia"},
        selection={"strategy": "lowest"},
        recovery={"method": "sign-merge"},
        heal={"minutes": 2},
    )
    estimate = estimate_run(SHAPE, recipe, RATES, GB)
    rows = {stage.name: stage for stage in estimate.resident}
    assert rows["select"].seconds is None and rows["select"].host_bytes is None
    assert rows["heal"].seconds == 120
    assert (
        "not estimated: scoring igia, recovery sign-merge"
        in list(describe_run(estimate, "resident", ""))[1]
    )


def test_a_gguf_file_has_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAYERCUT_CACHE", str(tmp_path / "cache"))
    found = inspect(str(write_llama(tmp_path / "model.gguf")))
    assert found.refusal == ""
    assert all(stage["seconds"] > 0 for stage in found.estimate["stages"])


def test_layers_of_which_one_must_stay_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = Family("qwen3_5_text", ROTARY | LINEAR | {"layer_types": HYBRID})
    source = save_family(tmp_path / "source", family)
    assert main(["inspect", str(source), "--json", str(tmp_path / "i.json")]) == 0
    assert "one of the layers 2, 4, 7: transformers reads" in capsys.readouterr().out
    assert json.loads((tmp_path / "i.json").read_text())["keep_one_of"] == [2, 4, 7]


def test_inspect_tells_what_a_default_run_takes(tiny_llama: Path) -> None:
    found = inspect(str(tiny_llama))
    names = [stage["name"] for stage in found.estimate["stages"]]
    assert names[:4] == ["load", "evaluate dense", "select", "recover"]
    assert found.estimate["ranks"] == 1
    assert found.estimate["residency"] == "resident"
    assert len(found.summary) == 3


def test_a_run_says_it_first_and_records_it(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *run_of(tiny_llama, tmp_path)]) == 0
    shown = capsys.readouterr().err.splitlines()
    first = next(
        i for i, line in enumerate(shown) if line.startswith("resident on the CPU, 1 rank")
    )
    assert shown[first + 1].startswith("about ")
    assert shown[first + 2].startswith("up to ")
    assert shown[first + 3].startswith("load ... ")
    content = json.loads((tmp_path / "out" / "layercut" / "result.json").read_text())
    assert content["estimate"]["stages"][0]["name"] == "load"


def run_of(source: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("Layers that change little can go, and the others make up for it. " * 40)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {source}\ncalibration: {{data: {text}, n_sequences: 8, seq_len: 32}}\n"
        f"selection: {{drop: [3]}}\nrecovery: {{method: none}}\n"
        f"evaluation: {{text: {{own: {text}}}, seq_len: 32, max_tokens: 64}}\n"
    )
    return [str(recipe), "--output-dir", str(tmp_path / "out")]


def test_too_little_memory_is_refused_before_a_weight_is_read(
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        preparation, "measure_available", lambda _: replace(ROOM, host_bytes=1_000_000)
    )
    monkeypatch.setattr(preparation, "load", lambda *_, **__: pytest.fail("it was loaded"))
    arguments = run_of(tiny_llama, tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["run", *arguments]) == 7
    error = capsys.readouterr().err.splitlines()[-1]
    assert "'load' needs about" in error
    assert "0.00 GB are free. Lower calibration.n_sequences" in error
    assert sorted(tmp_path.iterdir()) == before


def test_rates_are_positive_and_a_file_is_read_in_part_only(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(1000))
    rates = measure_rates(path, 16, 32, torch.float32, torch.device("cpu"))
    assert min(rates.product, rates.factor, rates.elements, rates.read, rates.hash) > 0
