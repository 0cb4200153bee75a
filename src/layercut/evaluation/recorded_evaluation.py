"""A measured model that is measured once: every stage of a run is in the journal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from layercut.engine.journal import Entry, Journal
from layercut.evaluation.evaluate import evaluate
from layercut.results import Estimate, Evaluation, TextWindows

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def recall_evaluation(
    view: DecoderView, config: Mapping[str, Any], journal: Journal, stage: str
) -> Evaluation:
    """What `evaluate` measures of the model but its speed, or measured of the same stage before.

    Args:
        view: the model; unchanged afterwards.
        config: what is measured, as `evaluate` takes it.
        journal: knows the stages that are measured.
        stage: ``dense`` or ``pruned``.

    Raises:
        LayercutError: as for `evaluate`.
    """
    entry = journal.recall(
        "evaluated", stage, lambda: Entry(asdict(evaluate(view, **config, speed=False)))
    )
    return read_evaluation(entry.values)


def read_evaluation(content: Mapping[str, Any]) -> Evaluation:
    """What ``asdict`` made of an evaluation without comparisons, through JSON or not."""
    fields = dict(content)
    for name in ("perplexity", "accuracy", "accuracy_change"):
        fields[name] = _read_estimates(fields[name])
    fields["harness"] = {task: _read_estimates(m) for task, m in fields["harness"].items()}
    fields["windows"] = {name: TextWindows(**cut) for name, cut in fields["windows"].items()}
    return Evaluation(**fields)


def _read_estimates(content: Mapping[str, Any]) -> dict[str, Estimate]:
    return {
        name: Estimate(e["value"], e["stderr"], e["n"], tuple(e["outcomes"]), tuple(e["losses"]))
        for name, e in content.items()
    }
