"""YAML without its surprises.

``1e-4`` is a number, ``no`` and ``012`` are text, a key may appear once, and tags, deep nesting and
heaps of aliases are refused, so that no recipe runs code or expands without bound.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from layercut.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_ALIASES = 16

_FLOAT = re.compile(
    r"""[-+]?(?: [0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
               | \.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
               | [0-9][0-9_]*[eE][-+]?[0-9]+
               | \.(?:inf|Inf|INF) )$ | \.(?:nan|NaN|NAN)$""",
    re.VERBOSE,
)


class _Loader(yaml.SafeLoader):
    """SafeLoader with fewer scalar types and a limit on what a document may do."""

    # A fresh table: SafeLoader's own also knows yes/no, octal, base 60 and dates.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node within the limits."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            return self._compose_alias(parent, index)
        if getattr(event, "tag", None) is not None:
            raise _yaml_error(f"the tag {event.tag} is not allowed", event)
        if self._depth == MAX_DEPTH:
            raise _yaml_error(f"nested deeper than {MAX_DEPTH} levels", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _compose_alias(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._aliases += 1
        if self._aliases > MAX_ALIASES:
            raise _yaml_error(f"more than {MAX_ALIASES} aliases", event)
        node = super().compose_node(parent, index)
        if node is not None and node.end_mark is None:  # an alias inside its own anchor
            raise _yaml_error("an alias that contains itself", event)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are text and differ."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _yaml_error(
                    f"the key {getattr(key, 'value', '')!r} is not text; quote it", key
                )
            if key.value in seen:
                raise _yaml_error(f"the key '{key.value}' appears twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which `_Loader` would read as a number."""

    yaml_implicit_resolvers = dict(yaml.SafeDumper.yaml_implicit_resolvers)  # noqa: RUF012


for _tag, _pattern, _first in (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list(_first))
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load(text: str, name: str) -> Any:
    """The value of a YAML document.

    Args:
        text: the document.
        name: what to call it in errors.

    Raises:
        RecipeError: it is malformed or does one of the refused things; names the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(f"{name}, line {line}: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        raise RecipeError(f"{name}{where}: {error.problem}{hint}") from None
    except ValueError as error:  # an integer with thousands of digits
        raise RecipeError(f"{name}: {error}") from None


def load_file(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        RecipeError: there is no such file, it cannot be read, or `load` refuses it.
    """
    try:
        if not path.exists():
            raise RecipeError(
                f"the recipe {path} does not exist; `layercut recipe` prints a template"
            )
        if not path.is_file():
            raise RecipeError(f"the recipe {path} is not a regular file")
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"the recipe {path} is larger than {MAX_BYTES:,} bytes")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"the recipe {path} is not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
    data = load(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(
            f"the recipe {path} has no keys of its own; `layercut recipe` prints a template"
        )
    return data


def dump(value: Any) -> str:
    """``value`` as YAML that `load` reads back equal; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=100)


def _yaml_error(problem: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
