"""What processes that share a run do in tests: a spawned process must import it from here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conftest import VOCABULARY, plan_of
from contract_models import cheap_call
from layercut.errors import DataError, LayercutError
from layercut.evaluation.perplexity import perplexity
from layercut.models.load import load
from layercut.models.ranks import Ranks
from layercut.models.view import DecoderView
from layercut.models.weight_store import collect
from layercut.pipeline.join_ranks import joined_ranks
from layercut.recovery.fit import fit_repair
from layercut.recovery.gradient_steps import (
    ETA,
    find_directions,
    step_weights,
    walk_divergence_gradients,
)
from layercut.registry import MethodCall, available, describe, resolve
from layercut.scoring.score import score_layers
from layercut.selection.select import choose_layers, resolve_request
from layercut.types import CalibrationBatches, WeightPatch

SHAPES = {"uneven": (5, 32), "few tokens": (4, 7), "one sequence": (1, 24)}
"""Sequences and tokens: more tokens than the MLP is wide, fewer, and fewer sequences than ranks."""
N_LAYERS = 4
PLAN = plan_of(1, 3, n_layers=N_LAYERS)
HELD_OUT = {"held_out_every": 2}
FURTHER: list[tuple[str, dict[str, Any]]] = [
    ("projection", {"penalty": "held-out"}),
    ("projection", {"solver": "gradient-descent"}),
    ("linear-map", {"alpha": 0.1}),
]
"""Options of recoveries that take other ways than the defaults do."""


def text_of(shape: str) -> CalibrationBatches:
    """Random token ids, two sequences per gradient group and one in memory at once."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, SHAPES[shape], generator=generator)
    return CalibrationBatches(ids, gradient_batch=2, micro_batch=1, source="", fingerprint=shape)


def list_computations(view: DecoderView) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Stage, method and text → what computes its numbers.

    Streamed layers change how gradients are walked, and few tokens on which side a ridge regression
    is solved: of these, what depends on it.
    """
    streamed = view.source is not None
    found: dict[str, Callable[[], dict[str, Tensor]]] = {}
    for shape in ["one sequence"] if streamed else ["one sequence", "uneven"]:
        text = text_of(shape)
        found[f"evaluation perplexity {shape}"] = partial(estimate, view, text)
        for name in available("scoring"):
            call = cheap_call("scoring", name)
            found[f"scoring {name} {shape}"] = partial(scores, view, text, call)
    for shape in ["uneven"] if streamed else ["uneven", "few tokens"]:
        text = text_of(shape)
        found[f"summed gradients {shape}"] = partial(sum_gradients, view, text)
        found[f"gradient step {shape}"] = partial(take_step, view, text)
        found[f"selection priced-cuts {shape}"] = partial(chosen, view, text, "priced-cuts")
        call = resolve("recovery", "refit", HELD_OUT)
        found[f"recovery refit {shape}, more held out"] = partial(repaired, view, text, call)
    if streamed:
        return found
    text = text_of("uneven")
    for name in available("selection"):
        found[f"selection {name}"] = partial(chosen, view, text, name)
    for name in available("recovery"):
        call = cheap_call("recovery", name)
        found[f"recovery {name}"] = partial(repaired, view, text, call)
    for name, options in FURTHER:
        call = resolve("recovery", name, options)
        found[f"recovery {name} {options}"] = partial(repaired, view, text, call)
    return found


def compute_or_refuse(compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | str:
    """The numbers, or the sentence that refuses them."""
    try:
        return compute()
    except LayercutError as error:
        return str(error)


def estimate(view: DecoderView, text: CalibrationBatches) -> dict[str, Tensor]:
    measured = perplexity(view, text.input_ids)
    return {
        "value": torch.tensor([measured.value, measured.stderr, measured.n], dtype=torch.float64),
        "losses": torch.tensor(measured.losses, dtype=torch.float64),
    }


def scores(view: DecoderView, text: CalibrationBatches, call: MethodCall) -> dict[str, Tensor]:
    values = score_layers(view, text, call).values
    return {"scores": torch.tensor([float(v or 0) for v in values], dtype=torch.float64)}


def chosen(view: DecoderView, text: CalibrationBatches, strategy: str) -> dict[str, Tensor]:
    scoring = cheap_call("scoring", describe("selection", strategy).needs_scoring or "gradmap")
    rounds = "each" if strategy == "lowest" else "one-shot"
    request = resolve_request(
        view, scoring=scoring, strategy=strategy, rounds=rounds, drop_layers=2
    )
    plan, evidence = choose_layers(view, text, request)
    values = [float(v or 0) for s in evidence.scores for v in s.values]
    return {
        "dropped": torch.tensor(plan.dropped),
        "scores": torch.tensor(values, dtype=torch.float64),
        "curve": torch.tensor(list(plan.curve.values()), dtype=torch.float64),
    }


def repaired(view: DecoderView, text: CalibrationBatches, call: MethodCall) -> dict[str, Tensor]:
    repair = fit_repair(view, PLAN, None, text, call)
    if isinstance(repair, WeightPatch):
        return {name: tensor.clone() for name, tensor in repair.tensors.items()}
    return {str(layer): matrix for layer, matrix in repair.maps.items()}


def sum_gradients(view: DecoderView, text: CalibrationBatches) -> dict[str, Tensor]:
    walk = walk_divergence_gradients(view, PLAN, {}, text.input_ids, text.micro_batch)
    return {name: gradient for layer in walk for name, gradient in layer.items()}


def take_step(view: DecoderView, text: CalibrationBatches) -> dict[str, Tensor]:
    """The weights behind one step of usual length, whether it pays or not."""
    directions = find_directions(view, PLAN, {}, text.input_ids, text.micro_batch)
    return dict(collect(view, step_weights(view, {}, directions, ETA)))


def take_place(rank: int, world: int, port: int) -> None:
    """Tell this process what a launcher would."""
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in values.items()})
    os.environ["MASTER_ADDR"] = "localhost"


def run_all_methods(rank: int, port: int, model: Path, folder: Path) -> None:
    """Every method on this rank's share, resident and streamed, written for the test to read."""
    take_place(rank, 2, port)
    with joined_ranks() as ranks:
        found: dict[str, Any] = {}
        found["other text"] = compute_or_refuse(partial(compare_texts, ranks))
        for residency in ("resident", "streamed"):
            view = load(str(model), dtype="float32", residency=residency)
            view.ranks = ranks
            computations = list_computations(view)
            found[residency] = {n: compute_or_refuse(c) for n, c in computations.items()}
    torch.save(found, folder / f"rank{rank}.pt")


def compare_texts(ranks: Ranks) -> dict[str, Tensor]:
    """What the ranks do before any work, here with another text on each."""
    ranks.check_same("calibration text", "the same", DataError)
    ranks.check_same("calibration text", f"rank {ranks.rank}'s", DataError)
    return {}


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])
