"""A model whose layers are read from their files gives what the same model in memory gives."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import plan_of, save_tiny
from layercut.checkpoints.safetensors_file import read_stored_tensors
from layercut.errors import ModelError, NumericsError, RecipeError
from layercut.evaluation.evaluate import evaluate
from layercut.evaluation.perplexity import perplexity
from layercut.models import load as loading
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.output.save import save
from layercut.recovery.fit import fit
from layercut.recovery.gradient_steps import take_steps
from layercut.scoring.score import score
from layercut.selection.select import select
from layercut.types import CalibrationBatches

FAMILIES = ("llama", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by family; the Llama's layer 3 adds little, and layer 2 knows how to."""
    root = tmp_path_factory.mktemp("streamed")
    made = {family: save_tiny(root / family, family) for family in FAMILIES}
    weights = load_file(made["llama"] / "model.safetensors")
    for name in list(weights):
        if name.startswith("model.layers.3.") and name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):
            weights[name] = torch.zeros_like(weights[name])
        if name == "model.layers.3.mlp.down_proj.weight":
            weights[name] = 0.5 * weights["model.layers.2.mlp.down_proj.weight"]
        if name.startswith("model.layers.3.mlp.") and "down" not in name:
            weights[name] = weights[name.replace("layers.3", "layers.2")].clone()
    save_file(weights, made["llama"] / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def text(folders: dict[str, Path]) -> CalibrationBatches:
    """Sixteen sequences that the Llama would write, so that being closer to it predicts them."""
    view = load(str(folders["llama"]), dtype="float32")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 250, (16, 1), generator=generator)
    for _ in range(23):
        with torch.no_grad():
            odds = (3 * view.model(ids, use_cache=False).logits[:, -1]).softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(odds, 1, generator=generator)], dim=1)
    return CalibrationBatches(ids, 4, 2, "written", "written")


def open_both(folder: Path) -> tuple[DecoderView, DecoderView]:
    return tuple(load(str(folder), dtype="float32", residency=r) for r in ("resident", "streamed"))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "method",
    [
        "residual-sensitivity",
        "gradmap",
        "taylor",
        "magnitude",
        "block-influence",
        "angular-distance",
        "perplexity",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_same(
    folders: dict[str, Path], text: CalibrationBatches, family: str, method: str
):
    resident, streamed = open_both(folders[family])
    expected = score(resident, text, method=method).values
    assert score(streamed, text, method=method).values == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["residual-sensitivity", "gradmap", "perplexity"])
def test_scores_are_the_same_where_a_layer_is_skipped(
    folders: dict[str, Path], text: CalibrationBatches, method: str
):
    resident, streamed = open_both(folders["llama"])
    with resident.skipping([1]), streamed.skipping([1]):
        expected, found = (score(v, text, method=method).values for v in (resident, streamed))
    assert expected[1] is found[1] is None
    for layer in (0, 2, 3, 4, 5):
        assert found[layer] == pytest.approx(expected[layer], rel=1e-5)


def test_the_plan_is_the_same(folders: dict[str, Path], text: CalibrationBatches):
    plans = [select(view, text, drop_layers=2)[0] for view in open_both(folders["llama"])]
    assert plans[0].dropped == plans[1].dropped
    assert plans[0].curve == pytest.approx(plans[1].curve, rel=1e-5)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "refit"),
        ("llama", "projection"),
        ("llama", "linear-map"),
        ("llama", "laco"),
        ("llama", "magnitude-rescale"),
        ("gpt2", "refit"),
        ("mixtral", "projection"),
    ],
)
def test_recoveries_are_the_same(
    folders: dict[str, Path], text: CalibrationBatches, family: str, method: str
):
    resident, streamed = open_both(folders[family])
    plan = plan_of(3)
    expected, found = (fit(view, plan, None, text, method=method) for view in (resident, streamed))
    if (family, method) == ("llama", "refit"):
        assert expected.notes["accepted"]
    for key in ("accepted", "steps", "shrinkage"):
        assert found.notes.get(key) == expected.notes.get(key)
    assert_close(dict(found.tensors), dict(expected.tensors))


def test_gradient_steps_are_the_same(folders: dict[str, Path], text: CalibrationBatches):
    plan, damaged = plan_of(3), "model.layers.2.mlp.down_proj.weight"
    found = []
    for view in open_both(folders["llama"]):
        with view.holding(2):
            weight = view.model.get_parameter(damaged).data.clone()
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        patch = {damaged: weight + 0.1 * noise}
        found.append(take_steps(view, plan, patch, text.input_ids, n_steps=2, micro_batch=3))
    (expected, lengths), (streamed, streamed_lengths) = found
    assert lengths == streamed_lengths
    assert all(eta > 0 for eta in lengths)
    assert_close(dict(streamed), dict(expected))


def test_the_written_checkpoint_is_the_same(
    folders: dict[str, Path], text: CalibrationBatches, tmp_path: Path
):
    plan = plan_of(3)
    for name, view in zip(("resident", "streamed"), open_both(folders["llama"]), strict=True):
        patch = fit(view, plan, None, text, method="refit")
        apply(view, plan, patch)
        save(view, plan, patch, tmp_path / name)
    written = [
        load_file(tmp_path / name / "model.safetensors") for name in ("resident", "streamed")
    ]
    assert_close(*written)


def test_evaluation_is_the_same_before_and_after_the_cut(
    folders: dict[str, Path], text: CalibrationBatches
):
    windows = text.input_ids[:6]
    resident, streamed = open_both(folders["gpt2"])
    for _ in range(2):
        expected = perplexity(resident, windows)
        assert perplexity(streamed, windows).losses == pytest.approx(expected.losses, rel=1e-6)
        assert evaluate(streamed).n_parameters == evaluate(resident, speed=False).n_parameters
        if resident.n_layers == 6:
            for view in (resident, streamed):
                apply(view, plan_of(2))


def count_bytes_in_memory(view: DecoderView) -> int:
    parameters = [p for layer in view.layers for p in layer.parameters()]
    return sum(p.numel() * p.element_size() for p in parameters if not p.is_meta)


def test_two_layers_at_most_are_in_memory(
    folders: dict[str, Path], text: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    view = load(str(folders["llama"]), dtype="float32", residency="streamed")
    assert view.source is not None
    assert count_bytes_in_memory(view) == 0
    most = 0
    run_layer = DecoderView.run_layer

    def watch(self: DecoderView, *arguments):
        nonlocal most
        output = run_layer(self, *arguments)
        most = max(most, count_bytes_in_memory(self))
        return output

    monkeypatch.setattr(DecoderView, "run_layer", watch)
    plan, evidence = select(view, text, drop_layers=1)
    patch = fit(view, plan, evidence, text, method="refit")
    assert 0 < most <= 2 * view.source.bytes_of_layer
    apply(view, plan, patch)
    gc.collect()
    assert count_bytes_in_memory(view) == 0


def test_a_tensor_in_the_place_of_a_layers_is_used_while_it_is_held_and_after(
    folders: dict[str, Path],
):
    view = load(str(folders["llama"]), dtype="float32", residency="streamed")
    name = "model.layers.1.mlp.down_proj.weight"
    ids = torch.arange(10)[None]
    before = view.token_losses(ids)
    with view.holding(1):
        own = view.model.get_parameter(name).data.clone()
        with view.patched({name: 2 * own}):
            assert torch.equal(view.model.get_parameter(name), 2 * own)
            changed = view.token_losses(ids)
        assert torch.equal(view.model.get_parameter(name), own)
        assert torch.equal(view.token_losses(ids), before)
    assert not torch.equal(changed, before)
    with view.patched({name: 2 * own}):
        assert torch.equal(view.token_losses(ids), changed)
    assert torch.equal(view.token_losses(ids), before)


def test_what_needs_all_weights_is_refused_by_name(folders: dict[str, Path], text):
    view = load(str(folders["llama"]), dtype="float32", residency="streamed")
    with pytest.raises(RecipeError, match="'igia' needs all weights at once"):
        score(view, text, method="igia")


def test_a_file_that_became_shorter_is_refused(folders: dict[str, Path], tmp_path: Path):
    folder = save_tiny(tmp_path / "short", "llama")
    view = load(str(folder), dtype="float32", residency="streamed")
    path = folder / "model.safetensors"
    stored = read_stored_tensors(folder)
    end = min(t.begin for n, t in stored.items() if n.startswith("model.layers.4."))
    path.write_bytes(path.read_bytes()[:end])
    with pytest.raises(ModelError, match="written to while the model was in use"):
        view.token_losses(torch.arange(10)[None])
    assert count_bytes_in_memory(view) == 0


def test_a_file_that_was_written_to_is_refused(tmp_path: Path):
    folder = save_tiny(tmp_path / "changed", "llama")
    view = load(str(folder), dtype="float32", residency="streamed")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(ModelError, match="written to while the model was in use"):
        view.token_losses(torch.arange(10)[None])
    path.unlink()
    with pytest.raises(ModelError, match="gone while the model is in use"):
        view.token_losses(torch.arange(10)[None])


def test_a_layer_that_could_not_be_read_is_let_go_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    view = load(str(save_tiny(tmp_path / "once", "llama")), dtype="float32", residency="streamed")
    assert view.source is not None
    ids = torch.arange(10)[None]
    expected = view.token_losses(ids)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="a bad block"):
        fill = type(view.source)._fill

        def fail_at_three(source, index, layer):
            if index == 3:
                raise OSError("a bad block")
            fill(source, index, layer)

        patched.setattr(type(view.source), "_fill", fail_at_three)
        view.token_losses(ids)
    assert torch.equal(view.token_losses(ids), expected)
    assert count_bytes_in_memory(view) == 0


def test_a_weight_that_is_not_finite_is_found_when_its_layer_is_read(tmp_path: Path):
    folder = save_tiny(tmp_path / "nan", "llama")
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.4.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    view = load(str(folder), dtype="float32", residency="streamed")
    with pytest.raises(NumericsError, match=r"layers\.4\.mlp\.up_proj\.weight holds NaN"):
        view.token_losses(torch.arange(10)[None])


@pytest.mark.parametrize(("free", "streamed"), [(2**40, False), (1000, True)])
def test_a_model_that_does_not_fit_is_streamed_by_itself(
    folders: dict[str, Path], free: int, streamed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loading, "available_memory_bytes", lambda: free)
    view = load(str(folders["llama"]), dtype="float32")
    assert (view.source is not None) == streamed


def test_an_unknown_residency_is_refused(folders: dict[str, Path]):
    with pytest.raises(RecipeError, match="did you mean 'streamed'"):
        load(str(folders["llama"]), residency="streaming")
