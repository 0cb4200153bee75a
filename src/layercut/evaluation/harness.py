"""Zero-shot tasks through lm-evaluation-harness, on the model in memory.

The harness brings prompts, metrics and standard errors; its task names, its own YAML files and the
groups below can be given. Its data come from the Hub unless a task's file names local ones.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from layercut import progress
from layercut.checkpoints.hf_calls import guard
from layercut.data import files
from layercut.errors import DataError, NumericsError, RecipeError, suggestion
from layercut.evaluation.harness_model import wrap_model
from layercut.models.check_method import require_resident
from layercut.results import Estimate

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

INSTALL = 'pip install "lm_eval==0.4.13"'

GROUPS = {
    # arXiv:2602.14649
    "gradmap7": (
        "boolq",
        "piqa",
        "hellaswag",
        "winogrande",
        "arc_easy",
        "arc_challenge",
        "openbookqa",
    ),
}
"""Names of our own for several of the harness's tasks."""

BATCH_SIZE = 8
FILES = (".yaml", ".yml")
SEED = 1234
"""Of the harness's examples in prompts, as where it runs by itself."""
CORRECT = "Correct the task's file, or leave the task out."
CONNECT = "Connect, or give a task's YAML file whose dataset_kwargs name local files."


def check_harness(names: Sequence[str]) -> None:
    """Refuse tasks that cannot be run, before any compute; reads or fetches their data.

    The first row of each is made into requests, which shows what is wrong with a task's templates.

    Args:
        names: the harness's tasks, groups and tags, those of ``GROUPS``, and paths of YAML files.

    Raises:
        RecipeError: the harness or a package that a task needs is not installed, or it does not
            know a task.
        DataError: a task's file or data cannot be read or used.
        NetworkError: a task's data are on the Hub, which cannot be reached.
    """
    with _random_state():
        for name, task in _tasks(tuple(names)).items() if names else ():
            with _task_guard(name, "cannot be used"):
                task.set_fewshot_seed(seed=SEED)
                task.build_all_requests(limit=1, rank=0, world_size=1)


def harness_rows(names: Sequence[str], limit: int | None) -> dict[str, list[str]]:
    """Task → the rows that are used, as JSON, for tasks that choose among answers.

    Args:
        names: as for `check_harness`.
        limit: rows of each task, from its start; ``None`` for all.

    Raises:
        RecipeError: a task lets the model write: a model whose layers are passed over cannot, as
            the library asks the cache of its first layer where it is.
    """
    rows_by_task = {}
    with _random_state():
        for name, task in _tasks(tuple(names)).items() if names else ():
            if task.OUTPUT_TYPE == "generate_until":
                raise RecipeError(
                    f"task '{name}' lets the model write, which a comparison cannot: it passes "
                    "over layers. Measure pruned checkpoints with `layercut eval --harness`."
                )
            with _task_guard(name, "cannot be used"):
                rows = list(itertools.islice(task.eval_docs, limit))
                rows_by_task[name] = [json.dumps(row, sort_keys=True, default=str) for row in rows]
    return rows_by_task


def run_harness(
    view: DecoderView,
    names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
) -> dict[str, dict[str, Estimate]]:
    """Task → metric → estimate, under the harness's own names.

    A metric of another filter than ``none`` is called ``metric,filter``. Figures whose rows are
    right or wrong carry the rows' outcomes.

    Args:
        view: the model as it is now, be it skipped or patched; unchanged afterwards.
        names: as for `check_harness`.
        limit: rows of each task, from its start; ``None`` for all.
        batch_size: requests in memory at once; changes no result beyond rounding.

    Raises:
        RecipeError, DataError, NetworkError: as for `check_harness`; what only a later row or the
            metrics show is raised here.
        NumericsError: a metric is not finite.
    """
    require_resident(view, "the harness")
    with _random_state():
        tasks = _tasks(tuple(names))
        for name, task in tasks.items():
            _check_answers(name, task, limit)
        results = _evaluate_tasks(view, tasks, limit, batch_size)
    estimates = {
        name: _estimates(
            name, metrics, results["n-samples"][name]["effective"], results["samples"][name]
        )
        for name, metrics in results["results"].items()
        if name in tasks
    }
    for name, metrics in estimates.items():
        shown = ", ".join(f"{metric} {estimate.value:.3f}" for metric, estimate in metrics.items())
        progress.status(f"{name} {shown}")
    return estimates


def expand_groups(names: Sequence[str]) -> list[str]:
    """``names`` with those of ``GROUPS`` replaced by their tasks, each once, in order."""
    every = (task for name in names for task in GROUPS.get(name, (name,)))
    return list(dict.fromkeys(every))


@cache
def _manager() -> Any:
    """The index of the harness's tasks: thousands of files, read once.

    Raises:
        RecipeError: the harness is not installed, or another version of it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError(f"tasks of lm-evaluation-harness need its package. Run: {INSTALL}")
    what = "the installed lm-evaluation-harness cannot be used"
    with guard(what, RecipeError, f"Run: {INSTALL}"):
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        manager.load, manager.all_tasks  # noqa: B018 - other versions lack them
    return manager


@cache
def _tasks(names: tuple[str, ...]) -> Mapping[str, Any]:
    """The harness's own task objects by name, their data loaded."""
    manager = _manager()
    wanted = expand_groups(names)
    known = {*manager.all_tasks, *GROUPS}
    for name in wanted:
        if name.endswith(FILES) and not files.exists(files.local_path(name)):
            raise DataError(f"task file {name} does not exist")
        if name not in known and not name.endswith(FILES):
            raise RecipeError(
                f"unknown task '{name}' of lm-evaluation-harness"
                f"{suggestion(name, known) or '.'} List them with `lm_eval ls tasks`, or give the "
                "path of a task's YAML file."
            )
    tasks_by_name: dict[str, Any] = {}
    for name in wanted:
        tasks_by_name |= _load(manager, name)
    return tasks_by_name


def _load(manager: Any, name: str) -> dict[str, Any]:
    """The tasks that one name stands for."""
    with _task_guard(name, "cannot be loaded"):
        try:
            tasks: dict[str, Any] = manager.load([name])["tasks"]
        except ImportError as error:
            raise RecipeError(
                f"task {name} needs what cannot be imported: {error}. Install its package, or "
                "leave the task out."
            ) from error
    return tasks


def _task_guard(name: str, what: str) -> AbstractContextManager[None]:
    """For the harness's calls on what a task's file and data say."""
    return guard(f"task {name} {what}", DataError, CORRECT, offline=CONNECT)


def _check_answers(name: str, task: Any, limit: int | None) -> None:
    """Refuse rows whose answer is none of their choices: the harness would count them as wrong.

    Such are the rows of test splits whose answers are withheld.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "multiple_input"):
        return
    for number, row in enumerate(itertools.islice(task.eval_docs, limit), start=1):
        with _task_guard(name, "cannot be used"):
            choices = task.doc_to_choice(row)
            answer = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
        for one in answer if isinstance(answer, list) else [answer]:
            known = range(len(choices)) if isinstance(one, int) else choices
            if one not in known:
                raise DataError(
                    f"task {name}, row {number}: the answer {one!r} is none of its {len(choices)} "
                    "choices. Correct the row, or use a split whose answers are known."
                )


def _evaluate_tasks(
    view: DecoderView, tasks: Mapping[str, Any], limit: int | None, size: int
) -> Any:
    """The harness's own results."""
    from lm_eval import simple_evaluate

    model = wrap_model(view, size)
    with _task_guard(", ".join(tasks), "cannot be run"):
        return simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            task_manager=_manager(),
            limit=limit,
            batch_size=size,
        )


def _estimates(
    task: str, metrics: Mapping[str, Any], n_rows: int, samples: Sequence[Mapping[str, Any]]
) -> dict[str, Estimate]:
    """One task's metrics; the harness's keys are ``metric,filter`` and ``metric_stderr,filter``."""
    estimates = {}
    for key, value in metrics.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not np.isfinite(value):
            raise NumericsError(
                f"{metric} of task {task} is {value}: the model yields values that are not finite. "
                "Use dtype: float32, or check the weights."
            )
        stderr = metrics.get(f"{metric}_stderr,{kept}")
        error = float(stderr) if isinstance(stderr, int | float) else 0.0
        rows = [row.get(metric) for row in samples if row.get("filter", kept) == kept]
        judged = len(rows) == n_rows and all(row in (0, 1) for row in rows)
        outcomes = tuple(bool(row) for row in rows) if judged else ()
        name = metric if kept == "none" else key
        estimates[name] = Estimate(float(value), error, n_rows, outcomes)
    return estimates


@contextmanager
def _random_state() -> Iterator[None]:
    """Give every generator its state back: the harness seeds them all."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
