"""A folder is the registry: a method is a file of ``STAGE/methods`` that declares itself.

A method file has three names: ``METHOD``, a `Method`; ``Options``, a `MethodOptions`; and the
stage's function: ``score`` in scoring, ``plan`` in selection, ``fit`` in recovery. Its name in a
recipe is its file name with ``-`` for ``_``. docs/add_a_method.md walks through two of them.
"""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from layercut.errors import RecipeError, suggestion

Stage = Literal["scoring", "selection", "recovery"]
Rounds = Literal["one-shot", "each"]
Check = Callable[[Any, Any, Any, int], None]
"""``check(view, batches, options, n_drop)``: refuses, before any long work, what cannot work."""

FUNCTIONS = {"scoring": "score", "selection": "plan", "recovery": "fit"}
"""Stage → the function that its method files have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method file declares of itself.

    Attributes:
        stage: the stage of its folder; may be left out.
        reads_model: whether it runs or compares layers one by one, which some families forbid.
        check: refuses models, texts and sizes that it cannot work with.
        revision: raised when its results change: cached rows of an older revision are recomputed.
        strategy: of a score: how `compare` chooses layers by it.
        rounds: of a score: whether `compare` scores again after every dropped layer.
        needs_scoring: of a selection: the only score that it works with.
        needs_tasks: it learns task rows, and calibration text only where there are none.
        needs_previous_layer: of a recovery: a kept layer must stand before every cut.
        needs_gradient_log: of a recovery: it reads the gradients that a score recorded.
        shares_dense_stream: of a recovery: ``fit`` takes ``dense=``, the intact model's stream.
        streams: whether it works with layers that are read from their files one at a time.
        records_steps: of a recovery: ``fit`` takes ``journal=``, where it records what it decides.
        several_ranks: whether it gives on several ranks what it gives on one.
        stores: of a recovery: a checkpoint can hold the result; else `compare` alone takes it.
    """

    stage: str | None = None
    reads_model: bool = True
    check: Check | None = None
    revision: int = 1
    strategy: str = "lowest"
    rounds: Rounds = "one-shot"
    needs_scoring: str | None = None
    needs_tasks: bool = False
    needs_previous_layer: bool = False
    needs_gradient_log: bool = False
    shares_dense_stream: bool = False
    streams: bool = True
    records_steps: bool = False
    several_ranks: bool = True
    stores: bool = True


class MethodOptions(BaseModel):
    """Options of one method: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A method with its options, ready to be called.

    Attributes:
        stage: what it is a method of.
        name: as a recipe names it.
        method: what its file declares.
        options: checked, and completed with defaults.
        function: ``score``, ``plan`` or ``fit`` of its file.
    """

    stage: Stage
    name: str
    method: Method
    options: Any
    function: Callable[..., Any]


def available(stage: Stage) -> tuple[str, ...]:
    """Names of the methods of a stage, sorted; imports none of them.

    Raises:
        RecipeError: a file declares no method, or wrongly, or has a name taken twice.
    """
    return tuple(sorted(_find_methods(stage)))


def check_files() -> None:
    """Refuse folders with a file that is no method, of whatever stage; imports none of them.

    Raises:
        RecipeError: as for `available`.
    """
    for stage in get_args(Stage):
        available(stage)


def describe(stage: Stage, name: str) -> Method:
    """What a method's file declares, but for its ``check``; the file is not imported.

    Raises:
        RecipeError: there is no such method; the closest name is suggested.
    """
    return _find_method(stage, name)[1]


def resolve(
    stage: Stage, name: str, options: dict[str, Any] | None = None, *, seed: int | None = None
) -> MethodCall:
    """A method with its options, checked and completed with its defaults.

    Args:
        stage: what it is a method of.
        name: as a recipe names it.
        options: the method's own.
        seed: for a method that draws and whose options set no seed of their own.

    Raises:
        RecipeError: no such method, an unknown key or an impossible value; names every one.
    """
    method, model, function = _load(stage, name)
    values = dict(options or {})
    if seed is not None and "seed" in model.model_fields:
        values.setdefault("seed", seed % 2**32)  # what trainers take
    try:
        return MethodCall(stage, name, method, model(**values), function)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            unknown = item["type"] == "extra_forbidden"
            hint = suggestion(key, model.model_fields) if unknown else ""
            # What concerns several options has no key of its own.
            path = f"{stage}.options.{key}" if key else f"{stage}.options"
            problems.append(f"{path}: {item['msg'].removeprefix('Value error, ')}{hint}")
        raise RecipeError("; ".join(problems)) from None


def check_stores(name: str) -> None:
    """Refuse a recovery whose result no checkpoint can hold.

    Raises:
        RecipeError: it adds operations at run time.
    """
    if not describe("recovery", name).stores:
        raise RecipeError(
            f"recovery '{name}' adds an operation at run time that no checkpoint holds. Use it in "
            "`layercut compare`, or choose another recovery.method."
        )


def _load(stage: Stage, name: str) -> tuple[Method, type[MethodOptions], Callable[..., Any]]:
    path = _find_method(stage, name)[0]
    contents = vars(importlib.import_module(f"layercut.{stage}.methods.{path.stem}"))
    method, options = contents["METHOD"], contents.get("Options")
    function = contents.get(FUNCTIONS[stage])
    if not isinstance(method, Method):
        raise RecipeError(f"{path}: METHOD is not a layercut.registry.Method. Make it one.")
    if not (isinstance(options, type) and issubclass(options, MethodOptions)):
        raise RecipeError(f"{path} has no class Options of MethodOptions. Add one.")
    if not callable(function):
        raise RecipeError(f"{path} has no function {FUNCTIONS[stage]}. Add it.")
    return method, options, function


def _find_method(stage: Stage, name: str) -> tuple[Path, Method]:
    methods = _find_methods(stage)
    if name not in methods:
        hint = suggestion(name, methods)
        raise RecipeError(
            f"unknown {stage} method '{name}'{hint} (known: {', '.join(sorted(methods))})"
        )
    return methods[name]


def _find_methods(stage: Stage) -> dict[str, tuple[Path, Method]]:
    """Name → file and declaration of every method in the folders of ``layercut.STAGE.methods``."""
    package = importlib.import_module(f"layercut.{stage}.methods")
    methods: dict[str, tuple[Path, Method]] = {}
    for folder in package.__path__:
        for module in pkgutil.iter_modules([folder]):
            if module.name.startswith("_"):
                continue
            path = Path(folder) / f"{module.name}.py"
            name = module.name.replace("_", "-")
            if name in methods:
                raise RecipeError(
                    f"{path}: there is a {stage} method '{name}' already, in {methods[name][0]}. "
                    "Rename one of the files."
                )
            written = 0 if module.ispkg else path.stat().st_mtime_ns
            methods[name] = path, _read_declaration(path, stage, written)
    return methods


@functools.cache
def _read_declaration(path: Path, stage: Stage, written_ns: int) -> Method:
    """``METHOD = Method(…)`` of a file that is not imported; its values but ``check`` are literals.

    Importing all files would bring in torch, which recipes and ``--help`` do not wait for. A file
    is read once, and again if its time of writing is another one.
    """
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as a method file ({error}). Mend it.") from error
    for statement in body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id="METHOD")], value=ast.Call() as call)
                | ast.AnnAssign(target=ast.Name(id="METHOD"), value=ast.Call() as call)
            ):
                return _evaluate(path, stage, call)
    raise RecipeError(
        f"{path} does not say what it is: declare METHOD = Method(…), as the other files of "
        f"{stage}/methods do."
    )


def _evaluate(path: Path, stage: Stage, call: ast.Call) -> Method:
    known = {field.name: field.default for field in fields(Method)}
    values: dict[str, Any] = {}
    for keyword in call.keywords:
        name = str(keyword.arg)
        if name not in known:
            hint = suggestion(name, known)
            raise RecipeError(f"{path}: METHOD has an unknown field '{name}'{hint}")
        if name == "check":
            continue
        try:
            values[name] = ast.literal_eval(keyword.value)
        except ValueError:
            raise RecipeError(
                f"{path}: METHOD's {name} is not a literal, and the file is read without being "
                "imported. Write the value itself."
            ) from None
        default = known[name]
        if type(values[name]) is not (str if default is None else type(default)):
            raise RecipeError(f"{path}: METHOD's {name} cannot be {values[name]!r}. Correct it.")
    if call.args or values.get("rounds", "each") not in get_args(Rounds):
        raise RecipeError(
            f"{path}: METHOD takes keywords alone, and rounds is one of "
            f"{', '.join(get_args(Rounds))}. Correct it."
        )
    method = Method(**values)
    if method.stage not in (None, *FUNCTIONS):
        hint = suggestion(str(method.stage), FUNCTIONS)
        raise RecipeError(
            f"{path} declares the unknown stage '{method.stage}'{hint} (known: "
            f"{', '.join(FUNCTIONS)})"
        )
    if method.stage not in (None, stage):
        raise RecipeError(
            f"{path} declares the stage '{method.stage}' but lies among the methods of {stage}. "
            "Move the file, or correct METHOD."
        )
    return method
