"""docs/recipes.md, generated from the recipe's models: ``python scripts/recipes_page.py``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from layercut.recipe.base import section_type
from layercut.recipe.recipe import Recipe
from layercut.recipe.selection import DEFAULT_DROP_LAYERS
from layercut.registry import available

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"

HEAD = """# Recipes

<!-- Written by `python scripts/recipes_page.py`; do not edit. -->

A recipe is a YAML file that holds everything a run depends on.
Every key has a default except `model`. `layercut recipe` prints a recipe with every key explained.

```sh
layercut recipe > my.yaml
layercut run my.yaml --set selection.drop_layers=9 --output-dir out
layercut run my.yaml --print-config            # the resolved recipe; nothing runs
```

The resolved recipe of a run is written to `OUT/layercut/recipe.yaml`. It repeats the run.

## Where a value comes from

The first of these that names a key decides its value:

1. a flag `--set KEY=VALUE`, which may be repeated;
2. an environment variable: `LAYERCUT__CALIBRATION__SEQ_LEN=512` sets `calibration.seq_len`;
3. the recipe;
4. the default.

Values are YAML in all of them: `--set calibration.data='[a.txt, b.txt]'`, `--set heal=null`. A
flag for one of `selection.drop_layers`, `drop_fraction`, `drop` and `max_perplexity_ratio`
replaces whichever of them the recipe gives.

The reader is strict. Unknown keys, keys given twice and values of the wrong type are errors. All
problems are reported at once. `1e-4` is a number; `no` and `012` are text. Tags are refused, so a
recipe runs no code.

## Recipes in this repository

| file | what it does |
|---|---|
"""

RECIPES = {
    "demo.yaml": "the defaults on the embedded model: 6 of 30 layers go, without any training; "
    "`make demo` runs it",
    "gradmap.yaml": "GradMAP as published: gradient scores in rounds, then one projection",
    "gradpruner.yaml": "GradPruner as published, on film reviews: early LoRA gradients, merging, "
    "fine-tuning",
    "task.yaml": "for a model that judges texts: drop the last 12 layers, refit, fine-tune",
}
"""File of ``recipes/`` → what it does."""

SOURCES = """
Comments in `gradmap.yaml` and `gradpruner.yaml` mark which values are published and which are a
reading.

## Data sources

Text, for `calibration.data`, `heal.data` and `evaluation.text`:

| source | what it is |
|---|---|
| `file.txt`, `file.raw` | one document; in a `.raw` file, WikiText's markers are undone |
| `file.jsonl`, `file.csv`, `file.parquet` | one document per row, in the column `text` or \
`text_column` |
| `hub:owner/name[:config][@split]` | a data set of the Hub, by default its split `train` |
| `wikitext2`, `ptb`, `c4` | the texts that papers report perplexity on, from the Hub; `@train` \
for another split |
| `rows:SOURCE` | task rows, read as prompts with their right answers, chat rows in the model's \
template; not for `evaluation.text` |
| `embedded:docs` | Python's own documentation |
| `embedded:speeches` | speeches of two party conventions |
| `embedded:reviews@train`, `embedded:reviews@test` | film reviews |

Files may be compressed as `.gz`. Calibration refuses the test split of a named text; give
`wikitext2@train`.

Task rows, for `finetune.data`, `evaluation.tasks` and `rows:`: a table file, `hub:…` or
`embedded:reviews@…`. `file.jsonl@test` takes the rows whose column `split` says `test`. The
columns say what a row is; the first format that fits every row is taken:

| columns | trained on | judged by |
|---|---|---|
| `messages`, perhaps `tools`, `documents`, `chat_template_kwargs`, `system` | the last reply, in \
the model's chat template | greedy decoding gives the reply |
| `prompt`, `completion`, both lists of messages | the same | the same |
| `prompt`, `completion` | the completion and an end-of-text token | greedy decoding gives the \
completion |
| `prompt`, `choices`, `answer` | the right choice | the likeliest choice, also per character |
| `question`, `choices`, `answer`, one `_` in every question | the text with the right choice in \
the gap | the likelihood of what follows the gap |
| `question`, `choices`, `answer`, perhaps `context` | the right choice after `Question: … \
Answer:` | the likeliest choice, also per character |

`answer` is an index from 0 or the text of a choice. Other columns: \
[finetune.md](finetune.md#other-columns).

## Top level
"""

NOTES = {
    "scoring": "`options` are those of the method. Methods: {scoring}.",
    "selection": "Give at most one of `drop_layers`, `drop_fraction`, `drop` and "
    f"`max_perplexity_ratio`. With none of them, {DEFAULT_DROP_LAYERS} layers go. Strategies: "
    "{selection}.",
    "recovery": "`options` are those of the method. Methods: {recovery}.",
    "heal": "Absent by default. With the section, give either `minutes` or `steps`. What it "
    "does: [methods.md](methods.md#heal).",
    "finetune": "Absent by default; `finetune: {{}}` takes every default. What it does: "
    "[methods.md](methods.md#fine-tuning).",
    "finetune.distill": "Absent by default; `distill: {{}}` takes every default.",
}
"""Section → what is said below its description."""


def render() -> str:
    """Return the whole page."""
    recipes = "".join(
        f"| [`{name}`](../recipes/{name}) | {what} |\n" for name, what in RECIPES.items()
    )
    sections = "".join(f"{line}\n" for line in _render_section(Recipe, ""))
    return HEAD + recipes + SOURCES + sections


def _render_section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A table of the section's own keys, and then each section within it."""
    properties = model.model_json_schema()["properties"]
    inner = {key: section_type(field.annotation) for key, field in model.model_fields.items()}
    yield from ("", "| key | type | default | meaning |", "|---|---|---|---|")
    for key, field in model.model_fields.items():
        if inner[key] is None:
            cells = (
                f"`{prefix}{key}`",
                _describe_type(properties[key]),
                _format_default(field),
                field.description or "",
            )
            yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for key, section in inner.items():
        if section is not None:
            path = f"{prefix}{key}"
            text = model.model_fields[key].description or ""
            yield from ("", f"{'#' * (2 + path.count('.'))} {path}", "")
            yield f"{text[:1].upper()}{text[1:]}."
            if path in NOTES:
                note = NOTES[path].format(**_link_methods())
                yield from ("", *textwrap.wrap(note, width=108, break_on_hyphens=False))
            yield from _render_section(section, f"{path}.")


def _link_methods() -> dict[str, str]:
    """Stage → its methods, each linked to its section in methods.md."""
    stages = {
        "scoring": available("scoring"),
        "selection": available("selection"),
        "recovery": available("recovery"),
    }
    return {
        stage: ", ".join(f"[`{name}`](methods.md#{name})" for name in names)
        for stage, names in stages.items()
    }


def _describe_type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_describe_type(branch) for branch in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        *others, last = [f"`{value}`" for value in values]
        return f"{', '.join(others)} or {last}" if others else last
    if schema["type"] == "array":
        items = _describe_type(schema["items"])
        return f"list of {items.replace('number', 'numbers').replace('text', 'texts')}"
    if schema["type"] == "object":
        values = schema.get("additionalProperties")
        inner = f" of names to {_describe_type(values)}" if isinstance(values, dict) else ""
        return f"mapping{inner}"
    names = {"string": "text", "integer": "whole number", "number": "number"}
    names |= {"boolean": "`true` or `false`", "null": "`null`"}
    return " ".join([names[schema["type"]], *_describe_limits(schema)])


def _describe_limits(schema: dict[str, Any]) -> list[str]:
    phrases = {
        "minimum": "from",
        "exclusiveMinimum": "above",
        "maximum": "up to",
        "exclusiveMaximum": "and below",
    }
    return [
        f"{words} {_format_number(schema[key])}" for key, words in phrases.items() if key in schema
    ]


def _format_number(value: float) -> str:
    """``2^63`` for a large power of two, else the number."""
    return f"2^{int(value).bit_length() - 1}" if value > 2**16 else f"{value:g}"


def _format_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
