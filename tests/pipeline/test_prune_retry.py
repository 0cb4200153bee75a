"""A GPU whose memory runs out while layers are chosen and repaired: once more, with less on it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layercut.pipeline import prune as pruning
from layercut.spool import choose_device
from pretended_gpu import GPU, pretended_gpu


def fail(times: int, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Let the first calls run out of memory; where rows of 40 bytes would lie at each."""
    places: list[torch.device] = []

    def run(job: Any, journal: Any, result: Any) -> str:
        places.append(choose_device(GPU, 40))
        if len(places) <= times:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return "pruned"

    monkeypatch.setattr(pruning, "prune", run)
    return places


def job_of(world: int) -> Any:
    return SimpleNamespace(view=SimpleNamespace(ranks=SimpleNamespace(world=world)))


def test_it_is_tried_once_more_with_less_on_the_gpu(monkeypatch: pytest.MonkeyPatch):
    places = fail(1, monkeypatch)
    with pretended_gpu(100), pytest.warns(UserWarning, match="once more with fewer rows"):
        assert pruning.prune_with_retry(job_of(1), None, None) == "pruned"
        assert choose_device(GPU, 40) == GPU  # only while it is tried again
    assert [place.type for place in places] == ["cuda", "cpu"]


def test_it_ends_where_that_does_not_help(monkeypatch: pytest.MonkeyPatch):
    places = fail(2, monkeypatch)
    with pretended_gpu(100), pytest.warns(), pytest.raises(torch.OutOfMemoryError):
        pruning.prune_with_retry(job_of(1), None, None)
    assert len(places) == 2


def test_ranks_do_not_try_again_while_others_wait(monkeypatch: pytest.MonkeyPatch):
    places = fail(1, monkeypatch)
    with pretended_gpu(100), pytest.raises(torch.OutOfMemoryError):
        pruning.prune_with_retry(job_of(2), None, None)
    assert len(places) == 1
