"""``layercut recipe``: the default recipe as a template, every key explained."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Annotated, Literal

import typer
from pydantic import BaseModel

from layercut.recipe import strict_yaml
from layercut.recipe.base import Config, section_type
from layercut.recipe.recipe import Recipe

EXAMPLE_MODEL = "embedded:smollm2-135m"
HEADER = """\
# A layercut recipe: every key with its default. Only `model` is required.
# Run it:  layercut run recipe.yaml --output-dir out
"""


def recipe(
    format: Annotated[Literal["yaml"], typer.Option("--format", help="How to print it.")] = "yaml",
) -> None:
    """Print the default recipe, every key explained; save it as a start for your own."""
    typer.echo(template(), nl=False)


def template() -> str:
    """The default recipe as commented YAML."""
    return HEADER + "".join(f"{line}\n" for line in _lines(Recipe(model=EXAMPLE_MODEL), ""))


def fields_help() -> str:
    """Every key and its description, one per line, for ``layercut recipe --help``."""
    rows = [f"{path}: {description}" for path, description in _fields(Recipe, "")]
    # \b keeps click from joining the lines into one paragraph.
    return "\b\nKeys:\n" + "\n".join(f"  {row}" for row in rows)


def _lines(section: BaseModel, indent: str) -> Iterator[str]:
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, Config):
            yield ""
        prefix = f"{indent}# "
        yield from textwrap.wrap(
            field.description or "",
            width=100,
            initial_indent=prefix,
            subsequent_indent=prefix,
            break_on_hyphens=False,
        )
        if isinstance(value, Config):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            content = section.model_dump(mode="json", include={key})
            yield from textwrap.indent(strict_yaml.dump(content), indent).splitlines()
        if value is None and (inner := section_type(field.annotation)):
            # What the section would hold: remove the marks, and the null above, to have it.
            lines = [f"{key}:", *_lines(inner.example(), "  ")]
            yield from (f"{indent}#   {line}".rstrip() for line in lines)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for key, field in model.model_fields.items():
        if inner := section_type(field.annotation):
            yield from _fields(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", field.description or ""
