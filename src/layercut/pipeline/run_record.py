"""What a run writes down as it goes, beside its output, so that the same command goes on."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, get_args

import torch

from layercut import progress
from layercut.checkpoints.claimed_folder import remove_claimed
from layercut.checkpoints.folder import list_weight_files
from layercut.checkpoints.output_dir import SPARE_SPACE
from layercut.data.calibration import evaluation_windows
from layercut.data.tasks import read_rows
from layercut.engine.file_journal import FileJournal, open_journal, record_folder
from layercut.engine.journal import NO_JOURNAL, Item, Journal
from layercut.errors import DataError, ModelError, NumericsError, PlanError, RecipeError
from layercut.models.view import DecoderView
from layercut.pipeline.prepare import Job
from layercut.recipe.evaluation import EvaluationConfig
from layercut.registry import Stage
from layercut.version import __version__

MET_AGAIN = (RecipeError, PlanError, ModelError, DataError, NumericsError)
"""Errors that the same command would meet again: going on would be of no use."""

TRAINING = {"heal", "finetune"}
"""Sections of the recipe on which nothing that is recorded depends."""

MOST_LISTED = 3
"""Items with names that a summary lists; more are counted."""


@contextmanager
def recorded(job: Job) -> Iterator[Journal]:
    """The journal of a run; it stays behind if the run ends early, and is gone at its end.

    Several ranks record nothing.

    Raises:
        OutputError: the record beside the output belongs to another run, or is in use.
    """
    if job.view.ranks.world > 1:
        yield NO_JOURNAL  # ranks that had recorded different parts could not go on together
        return
    folder = record_folder(job.output_dir)
    weights = sum(path.stat().st_size for path in list_weight_files(job.view.path))
    with open_journal(
        folder,
        describe_run(job),
        describe_machine(job.view),
        overwrite=job.overwrite,
        reserve_bytes=SPARE_SPACE * weights,
    ) as journal:
        _tell(journal)
        try:
            yield journal
        except MET_AGAIN:
            # A training that failed is mended by its own settings, which the record allows.
            if not (job.heal or job.finetune):
                remove_claimed(folder)
            raise
        remove_claimed(folder)


def describe_run(job: Job) -> dict[str, Any]:
    """All that recorded results depend on, by name: model, data, recipe and code."""
    view = job.view
    return {
        "model": view.fingerprint[:16],
        "arithmetic": f"{view.model.dtype} {view.device.type} mixed={view.mixed_precision}",
        "data": {
            "calibration": job.batches.fingerprint[:16],
            "evaluation": _hash_evaluation(view, job.recipe.evaluation),
        },
        "recipe": job.recipe.model_dump(mode="json", exclude=TRAINING),
        "code": {
            "layercut": __version__,
            "source": hash_source(),
            "torch": metadata.version("torch"),
            "transformers": metadata.version("transformers"),
        },
    }


def describe_machine(view: DecoderView) -> dict[str, Any]:
    """What rounding depends on beside the run itself."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpus": ", ".join(gpus) or "none",
        "residency": "resident" if view.source is None else "streamed",
    }


def hash_source() -> str:
    """Hash of layercut's source files, method files in other folders among them."""
    root = Path(__file__).parents[1]
    folders = {root}
    for stage in get_args(Stage):
        folders |= {Path(p) for p in import_module(f"layercut.{stage}.methods").__path__}
    total = hashlib.sha256()
    for path in sorted({path for folder in folders for path in folder.rglob("*.py")}):
        name = path.relative_to(root) if path.is_relative_to(root) else path
        total.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _hash_evaluation(view: DecoderView, config: EvaluationConfig) -> dict[str, str]:
    """Name of a text or task → hash of what the model is measured on."""
    known = {}
    for name, source in config.text.items():
        windows = evaluation_windows(
            source,
            view.tokenizer,
            seq_len=config.seq_len,
            max_tokens=config.max_tokens,
            detokenize=config.detokenize,
        )
        known[name] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    for name, source in config.tasks.items():
        rows = json.dumps([asdict(row) for row in read_rows(source)], default=str)
        known[f"task {name}"] = hashlib.sha256(rows.encode()).hexdigest()[:16]
    for name in config.harness:
        if Path(name).is_file():
            known[f"harness {name}"] = hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]
    return known


def _tell(journal: FileJournal) -> None:
    """Say where the run goes on, what its seconds are then, and whether it is the same machine."""
    if not journal.records:
        return
    progress.status(f"going on from {journal.folder.name}: {summarise(list(journal.records))}")
    warnings.warn(
        "the run was interrupted and went on from what it had recorded; its seconds and its "
        "memory are those of the last part alone.",
        stacklevel=3,
    )
    others = {
        f"{name} {record.machine.get(name)} there, {value} now"
        for record in journal.records.values()
        for name, value in journal.machine.items()
        if record.machine.get(name) != value
    }
    if others:
        warnings.warn(
            f"a part of the run was computed elsewhere ({'; '.join(sorted(others))}): its result "
            "is not bit for bit that of one machine and number of threads.",
            stacklevel=3,
        )


def summarise(keys: list[tuple[str, str, Item]]) -> str:
    """Kinds with their items: ``evaluated dense, refitted layers 3–17``."""
    kinds: dict[str, list[Item]] = {}
    for _, kind, item in keys:
        kinds.setdefault(kind, []).append(item)
    return ", ".join(f"{kind} {_list_items(items)}" for kind, items in sorted(kinds.items()))


def _list_items(items: list[Item]) -> str:
    numbers = sorted({item for item in items if isinstance(item, int)})
    if not numbers:
        names = [str(item) for item in items]
        return str(len(names)) if len(names) > MOST_LISTED else " and ".join(sorted(names))
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = spans[-1][0], number
        else:
            spans.append((number, number))
    return " ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)
