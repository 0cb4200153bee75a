"""pydantic's findings as one `RecipeError` that names every problem by its key path."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from layercut.errors import RecipeError, suggestion
from layercut.recipe.base import section_type

Model = TypeVar("Model", bound=BaseModel)

# pydantic speaks of Python types; a recipe has sections, lists and mappings.
_PHRASES = {
    "missing": "is required",
    "model_type": "should be a section of keys",
    "model_attributes_type": "should be a section of keys",
    "too_short": "should not be empty",
    "string_too_short": "should not be empty",
    "tuple_type": "should be a list",
    "dict_type": "should be a mapping of names to values",
}


def validate(
    model: type[Model],
    data: Any,
    name: str,
    *,
    origins: Mapping[str, str] | None = None,
    problems: Sequence[str] = (),
) -> Model:
    """``data`` as a ``model``.

    Args:
        model: what it should become.
        data: nested mappings.
        name: what to call it in errors.
        origins: key path → which flag or variable set it.
        problems: what is already known to be wrong.

    Raises:
        RecipeError: ``problems`` is not empty or ``data`` does not fit; lists everything.
    """
    messages = list(problems)
    try:
        valid = model.model_validate(data)
    except ValidationError as error:
        lines = _describe(model, data, error.errors(include_url=False), origins or {})
        messages += [line for line in lines if not line.startswith(tuple(problems))]
    if not messages:
        return valid
    if len(messages) == 1:
        raise RecipeError(f"{name}: {messages[0]}")
    raise RecipeError(f"{name} has {len(messages)} problems:\n  " + "\n  ".join(messages))


def _describe(
    model: type[BaseModel], data: Any, errors: list[ErrorDetails], origins: Mapping[str, str]
) -> list[str]:
    """One line per key path; what each branch of a union wants is joined by "or"."""
    wishes: dict[str, list[str]] = {}
    endings: dict[str, str] = {}
    for error in errors:
        path = _path(data, error)
        wish, ending = _phrase(model, error)
        wishes.setdefault(path, []).append(wish)
        endings[path] = ending + _origin(path, origins)
    return [
        f"{path or 'recipe'}: {' or '.join(dict.fromkeys(wish))}{endings[path]}"
        for path, wish in wishes.items()
    ]


def _path(data: Any, error: ErrorDetails) -> str:
    """The key path as written; pydantic appends the union branches it tried."""
    parts: list[str] = []
    value = data
    for part in error["loc"]:
        is_item = isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)
        if is_item or (isinstance(value, Mapping) and part in value):
            value = value[part]
        elif error["type"] != "missing":
            break
        parts.append(str(part))
    return ".".join(parts)


def _phrase(model: type[BaseModel], error: ErrorDetails) -> tuple[str, str]:
    """What the value should be, and what is said after it."""
    kind = error["type"]
    if kind == "extra_forbidden":
        *sections, key = error["loc"]
        known = _keys(model, sections)
        return "unknown key", suggestion(str(key), known) or f" (known: {', '.join(known)})"
    if kind == "value_error":
        return str(error["ctx"]["error"]), ""
    phrase = _PHRASES.get(kind, error["msg"].removeprefix("Input "))
    return phrase, "" if kind == "missing" else f", got {_shown(error['input'])}"


def _keys(model: type[BaseModel], sections: Sequence[int | str]) -> list[str]:
    for section in sections:
        inner = section_type(model.model_fields[str(section)].annotation)
        assert inner is not None, section
        model = inner
    return list(model.model_fields)


def _shown(value: Any) -> str:
    """``value`` as YAML would have it, cut to a readable length."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _origin(path: str, origins: Mapping[str, str]) -> str:
    """Which flag or variable set the key or one above or below it."""
    for key, origin in origins.items():
        if f"{path}.".startswith(f"{key}.") or f"{key}.".startswith(f"{path}."):
            return f" (from {origin})"
    return ""
