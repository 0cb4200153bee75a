"""A gradient log as numbers and one tensor, and back: to the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from layercut.gradients.log import GradientLog, LoggedWeight
from layercut.spool import Spool


def pack_log(log: GradientLog) -> tuple[dict[str, Any], Tensor]:
    """What JSON can hold of a log, and its rows, (steps, numbers) float32."""
    weights = {name: asdict(weight) for name, weight in log.weights.items()}
    assert log.rows is not None  # of a finished run
    return {"weights": weights, "n_layers": log.n_layers}, log.rows.rows[: log.n_steps]


def unpack_log(content: Mapping[str, Any], rows: Tensor) -> GradientLog:
    """The log that `pack_log` took apart."""
    log = GradientLog(steps=len(rows))
    log.n_steps, log.n_layers = len(rows), content["n_layers"]
    for name, weight in content["weights"].items():
        shapes = {key: tuple(weight[key]) for key in ("shape_a", "shape_b")}
        log.weights[name] = LoggedWeight(**{**weight, **shapes})
    log.rows = Spool(*rows.shape)
    log.rows.write(0, rows)
    return log
