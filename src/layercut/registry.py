"""A folder is the registry: a method is a file of ``scoring/``, ``selection/`` or ``recovery/``.

A method file offers ``Options``, a frozen pydantic model, and one function: ``score`` in scoring,
``select`` in selection, ``fit`` in recovery. What its options ask of a model and text,
``Options.check`` can refuse early. Its recipe name is its file name with ``-`` for ``_``.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from layercut.errors import ModelError, RecipeError, suggestion

if TYPE_CHECKING:
    from layercut.models.view import DecoderView
    from layercut.types import CalibrationBatches

Room = Literal["scoring", "selection", "recovery"]


class MethodOptions(BaseModel):
    """Options of one method: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def check(self, view: DecoderView, batches: CalibrationBatches, n_drop: int) -> None:
        """Refuse, before any long work, what cannot work here; by default nothing.

        Args:
            view: the model.
            batches: calibration text.
            n_drop: layers that are to go, or that may at most under a perplexity budget.
        """


def check_model(room: Room, name: str, view: DecoderView) -> None:
    """Refuse a method that runs layers one by one on a family where that means nothing.

    A method that reads only the number of layers says so with ``READS_MODEL = False``.

    Raises:
        ModelError: the family's layers cannot be run or compared alone.
    """
    if getattr(load_method(room, name), "READS_MODEL", True):
        check_runs_alone(view, f"{room} '{name}'")


def check_runs_alone(view: DecoderView, method: str) -> None:
    """Refuse a family whose layers cannot be run or compared alone.

    Args:
        view: the model.
        method: what needs to, as the message names it.

    Raises:
        ModelError: they cannot.
    """
    if why := view.layout.unscorable:
        raise ModelError(
            f"{method} cannot work on '{view.layout.model_type}': {why}. Name the layers "
            "with selection.drop, and set recovery.method: none."
        )


def available(room: Room) -> tuple[str, ...]:
    """Names of the methods in ``room``, sorted; imports none of them."""
    folder = Path(__file__).parent / room / "methods"
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def load_method(room: Room, name: str) -> ModuleType:
    """The method's module.

    Raises:
        RecipeError: there is no such method; the closest name is suggested.
    """
    known = available(room)
    if name not in known:
        hint = suggestion(name, known)
        raise RecipeError(f"unknown {room} method '{name}'{hint} (known: {', '.join(known)})")
    return importlib.import_module(f"layercut.{room}.methods.{name.replace('-', '_')}")


def parse_options(room: Room, name: str, options: dict[str, Any]) -> MethodOptions:
    """The method's options, checked and completed with its defaults.

    Raises:
        RecipeError: an unknown key or an impossible value; names every one.
    """
    module = load_method(room, name)
    try:
        parsed: MethodOptions = module.Options(**options)
    except ValidationError as error:
        known = list(module.Options.model_fields)
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            hint = suggestion(key, known) if item["type"] == "extra_forbidden" else ""
            # What concerns several options has no key of its own.
            place = f"{room}.options.{key}" if key else f"{room}.options"
            problems.append(f"{place}: {item['msg'].removeprefix('Value error, ')}{hint}")
        raise RecipeError("; ".join(problems)) from None
    return parsed
