"""One contestant's model, measured within the dense one: layers skipped, weights swapped.

Nothing is cut: the model stays dense, so that every contestant meets the same weights. What a row
lacks is measured, what it has stays: texts and tasks can be added to a finished comparison.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layercut.comparison.result import SPEEDS
from layercut.data.calibration import evaluation_windows
from layercut.data.sources import is_detokenized
from layercut.data.tasks import read_rows
from layercut.evaluation.accuracy import texts_of
from layercut.evaluation.evaluate import collect_outcomes, evaluate
from layercut.evaluation.fidelity import DenseReference, compare_to_dense
from layercut.evaluation.flops import flops_per_token
from layercut.evaluation.generation import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    can_cache,
    choose_prompts,
    generation_check,
)
from layercut.evaluation.speed import decode_tokens_per_second, prefill_tokens_per_second
from layercut.recipe.evaluation import EvaluationConfig
from layercut.results import Generation
from layercut.types import CalibrationBatches
from layercut.version import __version__

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

TIMED_TOKENS = 8192
TIMES = 3
EMPTY: dict[str, Any] = {"perplexity": {}, "accuracy": {}}
"""What a row starts with."""

DIGITS = 5
"""Of a window's loss in nats; its error is a thousand times as large."""


class Judge:
    """Measures whatever ``view`` is at the moment, by one set of texts and tasks.

    Attributes:
        contents: name → hash of a text's tokens or a task's rows, and how a text is cut.
    """

    def __init__(
        self,
        view: DecoderView,
        section: EvaluationConfig,
        harness: Mapping[str, Sequence[str]],
        *,
        speed: bool,
    ) -> None:
        """Read everything once.

        Args:
            view: the dense model.
            section: texts and tasks.
            harness: the rows of every task that ``section.harness`` stands for.
            speed: whether tokens per second are measured.

        Raises:
            DataError: a text or task cannot be read or does not fit the model.
        """
        self.view = view
        self.section = section
        self.speed = speed
        self.harness = tuple(harness)
        self.contents: dict[str, dict[str, str]] = {
            "text": {},
            "windows": {},
            "tasks": {},
            "harness": {name: _hash(list(rows)) for name, rows in harness.items()},
        }
        self._windows: Tensor | None = None
        self._reference: DenseReference | None = None
        self._continued: Tensor | None = None
        for name, source in section.text.items():
            windows = evaluation_windows(
                source,
                view.tokenizer,
                seq_len=section.seq_len,
                max_tokens=section.max_tokens,
                detokenize=section.detokenize,
            )
            self.contents["text"][name] = _hash(windows.tolist())
            restored = ", detokenized" if is_detokenized(source, section.detokenize) else ""
            cut = f"{len(windows)} windows of {windows.shape[1]:,} tokens{restored}"
            self.contents["windows"][name] = cut
            if self._windows is None:
                self._windows = windows
        for name, source in section.tasks.items():
            rows = read_rows(source)
            texts_of(view, rows)
            told = [[r.prompt, r.choices, r.answer, r.ending, list(r.messages)] for r in rows]
            self.contents["tasks"][name] = _hash(told)

    def see_dense(self) -> None:
        """Keep what the dense model predicts and writes; call it while ``view`` is dense."""
        if self._windows is None or self._reference is not None:
            return
        self._reference = DenseReference(self.view, self._windows)
        self._continued = self._generated(self.view, None).tokens

    def missing(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row`` lacks a figure that this judge measures."""
        wanted = [("perplexity", self.section.text), ("accuracy", self.section.tasks)]
        lacking = any(name not in row[part] for part, names in wanted for name in names)
        unseen = self._windows is not None and "generation" not in row
        unasked = self._needs_harness(row)
        return lacking or unseen or unasked or (self.speed and any(s not in row for s in SPEEDS))

    def measure(self, row: Mapping[str, Any], view: DecoderView | None = None) -> dict[str, Any]:
        """What ``row`` lacks, together with what it has.

        Args:
            row: the figures so far.
            view: another model than the judge's own.

        Raises:
            NumericsError: a loss is not finite.
        """
        view = view or self.view
        text = {n: s for n, s in self.section.text.items() if n not in row["perplexity"]}
        tasks = {n: s for n, s in self.section.tasks.items() if n not in row["accuracy"]}
        figures = evaluate(
            view,
            text=text,
            tasks=tasks,
            seq_len=self.section.seq_len,
            max_tokens=self.section.max_tokens,
            detokenize=self.section.detokenize,
            speed=False,
            harness=self.section.harness if self._needs_harness(row) else (),
            harness_limit=self.section.harness_limit,
            harness_batch_size=self.section.harness_batch_size,
        )
        found = figures.to_json()
        measured = {
            "perplexity": {**row["perplexity"], **found["perplexity"]},
            "accuracy": {**row["accuracy"], **found["accuracy"]},
            "flops_per_token": flops_per_token(view),
            "measured_with": row.get("measured_with")
            or {"layercut": __version__, "threads": torch.get_num_threads()},
            "losses": row.get("losses", {})
            | {n: [round(x, DIGITS) for x in f.losses] for n, f in figures.perplexity.items()},
            "outcomes": row.get("outcomes", {})
            | {n: "".join("01"[o] for o in f) for n, f in collect_outcomes(figures).items()},
        }
        if figures.harness:
            measured["harness"] = {**row.get("harness", {}), **found["harness"]}
        if self._windows is not None and "generation" not in row:
            measured |= self._compare_to_dense(view)
        if self.speed and any(speed not in row for speed in SPEEDS):
            decode = decode_tokens_per_second(view) if can_cache(view) else None
            measured |= zip(SPEEDS, (prefill_tokens_per_second(view), decode), strict=True)
        return measured

    def _needs_harness(self, row: Mapping[str, Any]) -> bool:
        """Whether a task of the harness is still to be measured; all of them are, together."""
        return any(task not in row.get("harness", {}) for task in self.harness)

    def _compare_to_dense(self, view: DecoderView) -> dict[str, Any]:
        """Predictions on the first text and what is written after its starts, against dense."""
        assert self._windows is not None and self._reference is not None
        fidelity = compare_to_dense(view, self._reference, self._windows)
        return {
            "fidelity": fidelity.to_json(),
            "generation": self._generated(view, self._continued).to_json(),
        }

    def _generated(self, view: DecoderView, reference: Tensor | None) -> Generation:
        assert self._windows is not None
        length = min(PROMPT_TOKENS, self.view.context // 2)
        prompts = choose_prompts(self._windows, prompt_tokens=length)
        new_tokens = min(NEW_TOKENS, self.view.context - length)
        return generation_check(view, prompts, reference, new_tokens=new_tokens)

    def n_parameters(self, dropped: tuple[int, ...]) -> int:
        """Parameters without those of the dropped layers alone; tied ones counted once."""
        gone = {
            id(p) for layer in dropped for p in self.view.layers[layer].parameters()
        } - self._find_shared_parameters(dropped)
        return sum(p.numel() for p in self.view.model.parameters() if id(p) not in gone)

    def _find_shared_parameters(self, dropped: tuple[int, ...]) -> set[int]:
        """Parameters of kept layers, which some families share with dropped ones."""
        kept = (layer for i, layer in enumerate(self.view.layers) if i not in dropped)
        return {id(p) for layer in kept for p in layer.parameters()}


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
