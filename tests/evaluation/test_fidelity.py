"""Agreement and KL against full logits, for one model under contexts and for two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import plan_of, save_tiny
from layercut.errors import DataError, ModelError, NumericsError
from layercut.evaluation import fidelity
from layercut.evaluation.fidelity import DenseReference, compare_to_dense
from layercut.models.load import load
from layercut.models.surgery import apply
from layercut.models.view import DecoderView


def logits(view: DecoderView, ids: torch.Tensor) -> torch.Tensor:
    return view.model(input_ids=ids, use_cache=False).logits.double()


def expected(dense: torch.Tensor, pruned: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Agreement and KL of every position from whole logits, (n, seq)."""
    q, p = (torch.distributions.Categorical(logits=x) for x in (dense, pruned))
    same = (dense.argmax(-1) == pruned.argmax(-1)).double()
    return same, torch.distributions.kl_divergence(q, p)


def test_a_skipped_model_is_compared_as_with_whole_logits(view: DecoderView, ids: torch.Tensor):
    reference = DenseReference(view, ids)
    dense = logits(view, ids)
    with view.skipping([1, 4]):
        found = compare_to_dense(view, reference, ids)
        same, kl = expected(dense, logits(view, ids))
    assert 0 < float(same.mean()) < 1
    assert found.agreement.value == pytest.approx(float(same.mean()))
    assert found.kl.value == pytest.approx(float(kl.mean()), rel=1e-5)
    # The standard error is that of the four windows' means: s / √4.
    assert found.kl.stderr == pytest.approx(float(kl.mean(dim=1).std()) / 2, rel=1e-4)
    assert found.agreement.n == ids.numel()


def test_the_dense_model_agrees_with_itself_exactly(view: DecoderView, ids: torch.Tensor):
    found = compare_to_dense(view, DenseReference(view, ids), ids)
    assert (found.agreement.value, found.agreement.stderr) == (1.0, 0.0)
    assert (found.kl.value, found.kl.stderr) == (0.0, 0.0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_patched_head_does_not_reach_the_reference(tmp_path: Path, ids: torch.Tensor, tied: bool):
    view = load(str(save_tiny(tmp_path / "m", tie_word_embeddings=tied)), dtype="float32")
    dense = logits(view, ids)
    reference = DenseReference(view, ids)
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    patch = {name: 1.5 * view.model.get_parameter(name)}
    with view.patched(patch), view.skipping([2]):
        found = compare_to_dense(view, reference, ids)
        _, kl = expected(dense, logits(view, ids))
        assert view.model.get_parameter(name).data.equal(patch[name])
    assert found.kl.value == pytest.approx(float(kl.mean()), rel=1e-5)
    assert logits(view, ids).equal(dense)


def test_a_model_pruned_in_place_is_compared_as_two_views_are(
    view: DecoderView, tiny_llama: Path, ids: torch.Tensor
):
    reference = DenseReference(view, ids)
    with view.skipping([3]):
        skipped = compare_to_dense(view, reference, ids)
    apply(view, plan_of(3))
    view.model.lm_head.weight.data *= 1  # in place: the copy is the reference's own
    assert compare_to_dense(view, reference, ids) == skipped
    other = load(str(tiny_llama), dtype="float32")
    assert compare_to_dense(view, DenseReference(other, ids), ids) == skipped


def test_chunks_and_spooling_change_nothing(
    view: DecoderView, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    reference = DenseReference(view, ids)
    with view.skipping([1]):
        whole = compare_to_dense(view, reference, ids)
        part = compare_to_dense(view, reference, ids[:2])
    monkeypatch.setattr(fidelity, "LOGITS_AT_ONCE", 7)
    monkeypatch.setattr("layercut.spool.MEMORY_LIMIT_BYTES", 0)
    reference = DenseReference(view, ids)
    assert reference.states.on_disk
    with view.skipping([1]):
        again = compare_to_dense(view, reference, ids)
    assert again.agreement == whole.agreement
    assert again.kl.value == pytest.approx(whole.kl.value, rel=1e-5)
    assert part.agreement.n == ids[:2].numel()


def test_other_windows_and_vocabularies_are_refused(
    view: DecoderView, ids: torch.Tensor, tmp_path: Path
):
    reference = DenseReference(view, ids)
    with pytest.raises(DataError, match="not those that the dense model was run on"):
        compare_to_dense(view, reference, ids.flip(0))
    other = load(str(save_tiny(tmp_path / "m", vocab_size=300)), dtype="float32")
    with pytest.raises(ModelError, match=r"predicts 300 tokens .* is compared with 259"):
        compare_to_dense(other, reference, ids)


def test_values_that_are_not_finite_are_named(view: DecoderView, ids: torch.Tensor):
    reference = DenseReference(view, ids)
    token = int(ids[2, 5])  # the first window that holds it
    first = int((ids == token).any(dim=1).nonzero()[0])
    view.model.model.embed_tokens.weight.data[token] = float("nan")
    with pytest.raises(NumericsError, match=f"is not finite in window {first}"):
        compare_to_dense(view, reference, ids)
    with pytest.raises(NumericsError, match="the dense model's states are not finite"):
        DenseReference(view, ids)
