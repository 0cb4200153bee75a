"""Edits single values of a JSON object and leaves every other character of the file alone.

Engines differ in which spelling of a key they read, so a pruned config.json keeps the original's:
key order, indentation, number formats and escapes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_SPACE = re.compile(r"\s*")


def replace_values(text: str, changes: Mapping[str, Any]) -> str:
    """``text`` with the keys of ``changes`` set; unknown keys are added in front.

    Args:
        text: a JSON object with at least one key.
        changes: key → new value; what is an object before and after is edited key by key.
    """
    spans = _value_spans(text)
    start = text.index("{") + 1
    gap = _SPACE.match(text, start)
    margin = gap.group() if gap else ""
    indent = margin.rpartition("\n")[2] if "\n" in margin else ""
    edits = []
    for key, value in changes.items():
        if key in spans:
            begin, end = spans[key]
            edits.append((begin, end, _edit_value(text[begin:end], value, indent)))
        else:
            edits.append((start, start, f"{margin}{json.dumps(key)}: {_spell(value, indent)},"))
    for begin, end, new in sorted(edits, reverse=True):
        text = text[:begin] + new + text[end:]
    return text


def remove_key(text: str, key: str) -> str:
    """``text`` without one of its keys, which is not its only one."""
    spans = list(_value_spans(text).items())
    place = [name for name, _ in spans].index(key)
    if place == 0:
        begin, end = text.index("{") + 1, _skip(text, spans[0][1][1]) + 1
    else:
        begin, end = spans[place - 1][1][1], spans[place][1][1]
    return text[:begin] + text[end:]


def _edit_value(old: str, value: Any, indent: str) -> str:
    before = json.loads(old)
    if isinstance(before, dict) and isinstance(value, dict) and before.keys() <= value.keys():
        return replace_values(old, {k: v for k, v in value.items() if before.get(k, ...) != v})
    return _spell(value, indent if "\n" in old else "")


def _spell(value: Any, indent: str) -> str:
    """JSON on one line, or with lists spread over lines that start with ``indent``."""
    if not indent:
        return json.dumps(value)
    return json.dumps(value, indent=indent).replace("\n", "\n" + indent)


def _value_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where each top-level value begins and ends; ``text`` is known to be a valid object."""
    decoder = json.JSONDecoder()
    spans = {}
    position = _skip(text, text.index("{") + 1)
    while text[position] == '"':
        key, position = decoder.raw_decode(text, position)
        begin = _skip(text, _skip(text, position) + 1)
        _, end = decoder.raw_decode(text, begin)
        spans[key] = (begin, end)
        position = _skip(text, end)
        if text[position] == ",":
            position = _skip(text, position + 1)
    return spans


def _skip(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position
