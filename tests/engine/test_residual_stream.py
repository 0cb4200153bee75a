"""The layer-by-layer walk against the model's own forward pass, in memory and on disk."""

from __future__ import annotations

import pytest
import torch

from layercut.engine.residual_stream import ResidualStream
from layercut.models.view import DecoderView
from layercut.spool import Spool
from layercut.types import CalibrationBatches


def test_stream_equals_the_models_hidden_states(view: DecoderView, batches: CalibrationBatches):
    output = view.model(batches.input_ids, output_hidden_states=True, use_cache=False)
    stream = ResidualStream(view, batches)
    for layer in range(view.n_layers - 1):
        torch.testing.assert_close(stream.states.rows, output.hidden_states[layer].flatten(0, 1))
        stream.advance(layer)


def test_stream_that_leaves_layers_out_equals_skipping(
    view: DecoderView, batches: CalibrationBatches
):
    stream = ResidualStream(view, batches)
    for layer in (0, 2, 5):
        stream.advance(layer)
    with view.skipping([1, 3, 4]):
        skipped = view.model.base_model(batches.input_ids, use_cache=False).last_hidden_state
    normed = view.model.model.norm(stream.states.rows)
    torch.testing.assert_close(normed, skipped.flatten(0, 1))


def test_spool_past_the_limit_holds_the_same_numbers(
    view: DecoderView, batches: CalibrationBatches, monkeypatch: pytest.MonkeyPatch
):
    in_memory = ResidualStream(view, batches)
    monkeypatch.setattr("layercut.spool.MEMORY_LIMIT_BYTES", 0)
    on_disk = ResidualStream(view, batches)
    for stream in (in_memory, on_disk):
        stream.advance(0)
    assert on_disk.states.on_disk
    assert not in_memory.states.on_disk
    assert torch.equal(on_disk.states.rows, in_memory.states.rows)


def test_spool_leaves_no_file(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    spool = Spool(8, 4, limit_bytes=0)
    spool.write(0, torch.ones(8, 4))
    assert list(tmp_path.iterdir()) == []
    assert float(spool.rows.sum()) == 32


def test_filling_writes_outputs_one_after_the_other():
    spool = Spool(6, 2)
    with spool.filling() as write:
        write(torch.empty(0), torch.full((2, 1, 2), 1.0))
        write(torch.empty(0), torch.full((4, 1, 2), 2.0))
    assert spool.rows[:, 0].tolist() == [1, 1, 2, 2, 2, 2]
