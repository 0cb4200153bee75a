"""One entry's model, measured within the dense one: layers skipped, weights swapped.

Nothing is cut: the model stays dense, so that every entry meets the same weights. What a row
lacks is measured, what it has stays: texts and tasks can be added to a finished comparison.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layercut.comparison.row import DENSE, Row
from layercut.data.calibration import evaluation_windows
from layercut.data.sources import is_detokenized
from layercut.data.tasks import read_rows
from layercut.evaluation.accuracy import texts_of
from layercut.evaluation.evaluate import evaluate
from layercut.evaluation.fidelity import DenseReference, compare_to_dense
from layercut.evaluation.flops import flops_per_token
from layercut.evaluation.generation import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    choose_prompts,
    generation_check,
)
from layercut.evaluation.speed import Opener, add_speeds, measure_speeds
from layercut.models.special_tokens import text_frame
from layercut.recipe.evaluation import EvaluationConfig
from layercut.results import Evaluation, Generation, TextWindows, describe_windows
from layercut.types import CalibrationBatches, LayerSet
from layercut.version import __version__

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

TIMED_TOKENS = 8192
N_TIMED_PASSES = 3


class RowEvaluator:
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
        self._continuations: Tensor | None = None
        frame = text_frame(view.tokenizer)
        for name, source in section.text.items():
            windows = evaluation_windows(
                source,
                view.tokenizer,
                seq_len=section.seq_len,
                max_tokens=section.max_tokens,
                detokenize=section.detokenize,
            )
            self.contents["text"][name] = _hash(windows.tolist())
            restored = is_detokenized(source, section.detokenize)
            cut = TextWindows(source, len(windows), windows.shape[1], restored, **frame.to_json())
            self.contents["windows"][name] = describe_windows(cut)
            if self._windows is None:
                self._windows = windows
        for name, source in section.tasks.items():
            rows = read_rows(source)
            texts_of(view, rows)
            parts = [
                [r.prompt, r.choices, r.answer, r.ending, list(r.messages)]
                + [dict(more) for more in (r.reply, r.variables) if more]
                for r in rows
            ]
            self.contents["tasks"][name] = _hash(parts)

    def record_dense(self) -> None:
        """Keep what the dense model predicts and writes; call it while ``view`` is dense."""
        if self._windows is None or self._reference is not None:
            return
        self._reference = DenseReference(self.view, self._windows)
        self._continuations = self._generate(self.view, None).tokens

    def is_complete(self, row: Row) -> bool:
        """Whether ``row`` has every estimate that is measured here."""
        known = row.evaluation
        return (
            self.section.text.keys() <= known.perplexity.keys()
            and self.section.tasks.keys() <= known.accuracy.keys()
            and (self._windows is None or row.generation is not None)
            and not self._needs_harness(known)
            and not self._needs_speed(known)
        )

    def measure(self, row: Row, view: DecoderView | None = None) -> Row:
        """``row`` with what it lacked.

        Args:
            row: with the estimates so far.
            view: another model than the evaluator's own.

        Raises:
            NumericsError: a loss is not finite.
        """
        view = view or self.view
        known, section = row.evaluation, self.section
        missing = section.model_dump() | {
            "text": {n: s for n, s in section.text.items() if n not in known.perplexity},
            "tasks": {n: s for n, s in section.tasks.items() if n not in known.accuracy},
            "harness": section.harness if self._needs_harness(known) else (),
        }
        new = evaluate(view, **missing, speed=False)
        evaluation = replace(
            known,
            n_parameters=new.n_parameters,
            perplexity={**known.perplexity, **new.perplexity},
            accuracy={**known.accuracy, **new.accuracy},
            harness={**known.harness, **new.harness},
            flops_per_token=flops_per_token(view),
        )
        if self._windows is not None and row.generation is None:
            assert self._reference is not None
            first = next(iter(section.text))
            fidelity = compare_to_dense(view, self._reference, self._windows)
            generation = self._generate(view, self._continuations)
            evaluation = replace(
                evaluation, fidelity={first: fidelity}, generation={first: generation}
            )
        tools = {"layercut": __version__, "threads": torch.get_num_threads()}
        return replace(row, evaluation=evaluation, measured_with=row.measured_with or tools)

    def measure_speed(self, row: Row, opener: Opener | None = None) -> Row:
        """``row`` with its speeds, if they are asked for and it lacked them.

        Args:
            row: with the estimates so far.
            opener: opens its model, which takes turns with the dense one; ``None`` for that one.
        """
        if not self._needs_speed(row.evaluation):
            return row
        models: dict[str, Opener] = {DENSE: lambda: nullcontext(self.view)}
        if opener is not None:
            models["row"] = opener
        speeds = measure_speeds(models)
        own = speeds.get("row")
        evaluation = add_speeds(
            row.evaluation, own or speeds[DENSE], speeds[DENSE] if own else None
        )
        return replace(row, evaluation=evaluation)

    def _needs_harness(self, known: Evaluation) -> bool:
        """Whether a task of the harness is still to be measured; all of them are, together."""
        return not set(self.harness) <= known.harness.keys()

    def _needs_speed(self, known: Evaluation) -> bool:
        # Rows from before speeds had a spread tell the best round, which is another number.
        return self.speed and known.prefill_spread is None

    def _generate(self, view: DecoderView, reference: Tensor | None) -> Generation:
        assert self._windows is not None
        length = min(PROMPT_TOKENS, self.view.context // 2)
        prompts = choose_prompts(self._windows, prompt_tokens=length)
        new_tokens = min(NEW_TOKENS, self.view.context - length)
        return generation_check(view, prompts, reference, new_tokens=new_tokens)

    def count_parameters(self, dropped: LayerSet) -> int:
        """Parameters without those of the dropped layers alone; tied ones counted once.

        Some families share parameters of kept layers with dropped ones.
        """
        kept, only_dropped = set[int](), set[int]()
        for i, layer in enumerate(self.view.layers):
            (only_dropped if i in dropped else kept).update(map(id, layer.parameters()))
        only_dropped -= kept
        return sum(p.numel() for p in self.view.model.parameters() if id(p) not in only_dropped)


@torch.no_grad()
def forward_seconds(view: DecoderView, batches: CalibrationBatches) -> float:
    """One forward pass over the calibration set, with the loss: the unit of ``passes``.

    The median of three passes over at most TIMED_TOKENS of it, scaled: time grows linearly.
    """
    timed = batches.input_ids[: max(1, TIMED_TOKENS // batches.seq_len)]
    durations = []
    for _ in range(N_TIMED_PASSES):
        start = time.perf_counter()
        for ids in timed.split(batches.micro_batch):
            view.token_losses(ids)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations) * batches.input_ids.numel() / timed.numel()


def _hash(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
