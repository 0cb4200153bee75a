"""One contestant's model, measured within the dense one: layers skipped, weights swapped.

Nothing is cut: the model stays dense, so that every contestant meets the same weights. What a row
lacks is measured, what it has stays: texts and tasks can be added to a finished comparison.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from layercut.data.calibration import evaluation_windows
from layercut.data.tasks import read_rows
from layercut.evaluation import BY_LENGTH, evaluate
from layercut.evaluation.choices import texts_of
from layercut.evaluation.cost import prefill_tokens_per_second
from layercut.recipe import EvaluationSection
from layercut.types import CalibrationBatches

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

TIMED_TOKENS = 8192
TIMES = 3


class Judge:
    """Measures whatever ``view`` is at the moment, by one set of texts and tasks.

    Attributes:
        contents: name → hash of a text's tokens or a task's rows.
    """

    def __init__(self, view: DecoderView, section: EvaluationSection, *, speed: bool) -> None:
        """Read everything once.

        Raises:
            DataError: a text or task cannot be read or does not fit the model.
        """
        self.view = view
        self.section = section
        self.speed = speed
        self.contents: dict[str, dict[str, str]] = {"text": {}, "tasks": {}}
        for name, source in section.text.items():
            windows = evaluation_windows(
                source,
                view.tokenizer,
                seq_len=section.seq_len,
                max_tokens=section.max_tokens,
                detokenize=section.detokenize,
            )
            self.contents["text"][name] = _hash(windows.tolist())
        for name, source in section.tasks.items():
            rows = read_rows(source)
            texts_of(view, rows)
            told = [[r.prompt, r.choices, r.answer, r.ending, list(r.messages)] for r in rows]
            self.contents["tasks"][name] = _hash(told)

    def missing(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row`` lacks a figure that this judge measures."""
        wanted = [("perplexity", self.section.text), ("accuracy", self.section.tasks)]
        lacking = any(name not in row[part] for part, names in wanted for name in names)
        return lacking or (self.speed and "prefill_tokens_per_second" not in row)

    def measure(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What ``row`` lacks, together with what it has.

        Raises:
            NumericsError: a loss is not finite.
        """
        text = {n: s for n, s in self.section.text.items() if n not in row["perplexity"]}
        tasks = {n: s for n, s in self.section.tasks.items() if n not in row["accuracy"]}
        figures = evaluate(
            self.view,
            text=text,
            tasks=tasks,
            seq_len=self.section.seq_len,
            max_tokens=self.section.max_tokens,
            detokenize=self.section.detokenize,
            speed=False,
        )
        found = figures.to_json()
        measured = {
            "perplexity": {**row["perplexity"], **found["perplexity"]},
            "accuracy": {**row["accuracy"], **found["accuracy"]},
            "outcomes": row.get("outcomes", {})
            | {n: "".join("01"[o] for o in f.outcomes) for n, f in figures.accuracy.items()},
        }
        if self.speed and "prefill_tokens_per_second" not in row:
            measured["prefill_tokens_per_second"] = prefill_tokens_per_second(self.view)
        return measured

    def n_parameters(self, dropped: tuple[int, ...]) -> int:
        """Parameters without those of the dropped layers alone; tied ones counted once."""
        gone = {
            id(p) for layer in dropped for p in self.view.layers[layer].parameters()
        } - self._elsewhere(dropped)
        return sum(p.numel() for p in self.view.model.parameters() if id(p) not in gone)

    def _elsewhere(self, dropped: tuple[int, ...]) -> set[int]:
        """Parameters of kept layers, which some families share with dropped ones."""
        kept = (layer for i, layer in enumerate(self.view.layers) if i not in dropped)
        return {id(p) for layer in kept for p in layer.parameters()}


def accuracy_names(row: Mapping[str, Any]) -> list[str]:
    """The row's tasks, each once: by likelihood per character where there is such a count."""
    names = list(row["accuracy"])
    return [name for name in names if f"{name}{BY_LENGTH}" not in names]


@torch.no_grad()
def forward_seconds(view: DecoderView, batches: CalibrationBatches) -> float:
    """One forward pass over the calibration set, with the loss: the unit of ``passes``.

    The median of three passes over at most TIMED_TOKENS of it, scaled: time grows linearly.
    """
    timed = batches.input_ids[: max(1, TIMED_TOKENS // batches.seq_len)]
    runs = []
    for _ in range(TIMES):
        start = time.perf_counter()
        for ids in timed.split(batches.micro_batch):
            view.token_losses(ids)
        runs.append(time.perf_counter() - start)
    return statistics.median(runs) * batches.input_ids.numel() / timed.numel()


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
