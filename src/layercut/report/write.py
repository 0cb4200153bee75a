"""A finished run as files: recipe.yaml, JSON, report.html and the model card."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from layercut.checkpoints.plan_file import plan_content
from layercut.errors import NumericsError, OutputError, ResourceError
from layercut.report import plots, table
from layercut.report.literal import code_span, escape_controls, plain_words
from layercut.results import RunResult
from layercut.types import LayerScores

EMBEDDED_LICENSE = "apache-2.0"
HEADLINES = {
    "Prefill": "prompt speed",
    "Fine-tuning": "fine-tuning time",
    "Weights": "bytes of weights",
    "GFLOPs per token": "FLOPs per token",
}
NO_HEADLINE = ("Layers", "Decoding", "Peak memory", "Zero-shot")
WITHOUT_SPEED = ("Weights", "GFLOPs per token")
"""What the headline shows of size and cost where the timing is too noisy to show the speed."""
MAX_FRONT_MATTER = 100_000
"""Bytes of a model card that are looked at."""
MAX_BRACKETS = 1000
"""In them: the reading takes time with the square of the depth."""
LICENSE_KEYS = ("license", "license_name", "license_link")


def write_report(
    result: RunResult,
    folder: Path,
    *,
    scores: tuple[LayerScores, ...] = (),
    recipe_yaml: str,
) -> None:
    """Write everything that belongs into ``OUT/layercut``.

    Args:
        result: what the run found out; stages that did not run may be missing.
        folder: ``OUT/layercut``; created if need be.
        scores: of every round; the last one becomes ``scores.json``.
        recipe_yaml: the resolved recipe.

    Raises:
        NumericsError: a figure is NaN or infinite, which JSON cannot hold.
        OutputError: the folder cannot be written to.
        ResourceError: the disk is full.
    """
    content: dict[str, Any] = {"result.json": result.to_json()}
    if result.plan is not None:
        recovery = {key: result.recovery.get(key) for key in ("method", "tensors_changed")}
        content["plan.json"] = plan_content(result.plan, recovery, result.lineage)
    if scores:
        content["scores.json"] = scores[-1].to_json(result.model)
    # Everything is rendered before the first byte is written: no half of a report is left behind.
    texts = {name: json_text(name, value) for name, value in content.items()}
    texts["recipe.yaml"] = recipe_yaml
    texts["report.html"] = render_html(result, recipe_yaml=recipe_yaml)
    for name, text in texts.items():
        write_text(folder / name, text)


def write_model_card(result: RunResult, path: Path, *, source: Path | None = None) -> None:
    """Write the model card, ``OUT/README.md``.

    Args:
        result: what the run found out.
        path: the card's path.
        source: folder of the input model; the licence is read from its own card if it has one.

    Raises:
        OutputError: the card cannot be written.
        ResourceError: the disk is full.
    """
    recipe_yaml = yaml.safe_dump(dict(result.recipe), sort_keys=False, allow_unicode=True)
    front_matter = yaml.safe_dump(_metadata(result, source), sort_keys=False, allow_unicode=True)
    template = environment().get_template("model_card.md.jinja")
    write_text(
        path,
        template.render(
            **_context(result, recipe_yaml),
            front_matter=front_matter.strip(),
            fence=_fence(recipe_yaml, result.provenance.command),
        ),
    )


def render_html(result: RunResult, *, recipe_yaml: str) -> str:
    """The report as one HTML page that needs no other file, no network and no script."""
    drawn = {}
    if result.plan is not None:
        layer = result.recovery.get("layer")
        drawn["layers"] = plots.layers(result.plan, layer if isinstance(layer, int) else None)
    perplexity = {
        title: result.stages[name].perplexity for name, title in table.titles(result).items()
    }
    if any(perplexity.values()):
        drawn["perplexities"] = plots.perplexities(perplexity)
    if spent := _stage_seconds(result):
        drawn["seconds"] = plots.seconds(spent)
    template = environment().get_template("report.html.jinja")
    return template.render(
        **_context(result, recipe_yaml),
        plots={name: Markup(svg) for name, svg in drawn.items()},  # our own SVG, already escaped
    )


def environment() -> Environment:
    """Templates of this folder; what a page shows is escaped, what Markdown shows is not."""
    environment = Environment(
        loader=PackageLoader("layercut", "report"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: plain_words(text).replace("|", "\\|")
    environment.filters["words"] = plain_words
    environment.filters["code"] = code_span
    environment.filters["line"] = escape_controls
    return environment


def _context(result: RunResult, recipe_yaml: str) -> dict[str, Any]:
    """What both templates show."""
    return {
        "result": result,
        "plan": result.plan,
        "columns": table.columns(result),
        "rows": table.rows(result),
        "sizes": table.sizes(result),
        "compared": table.change_compares(result),
        "windows": table.windows(result),
        "compared_title": "Dense and pruned" if "pruned" in result.stages else "Figures",
        "headline": write_headline(result),
        "noise": table.describe_noise(result),
        "recovery": format_labels(result.recovery),
        "heal": format_labels({k: v for k, v in result.healing.items() if k != "losses"}),
        "seconds": {name: f"{spent:,.1f}" for name, spent in _stage_seconds(result).items()},
        "total": f"{result.seconds['total']:,.1f}" if "total" in result.seconds else None,
        "memory": _shown("peak_rss_bytes", result.peak_rss_bytes),
        "versions": dict(result.provenance.versions),
        "hardware": format_labels(result.provenance.hardware),
        "recipe_yaml": recipe_yaml.strip(),
    }


def write_headline(result: RunResult) -> tuple[tuple[str, str], ...]:
    """The few figures to read first, as (figure, what it is); only those that exist."""
    parts = []
    if result.plan is not None:
        parts.append((f"{len(result.plan.dropped)} of {result.plan.n_layers}", "layers dropped"))
    left_out = ("Prefill",) if "prefill" in table.noisy_speeds(result) else WITHOUT_SPEED
    for row in table.rows(result):
        quantity, _, name = row.label.partition(", ")
        if not row.change or quantity in (*NO_HEADLINE, *left_out):
            continue
        label = HEADLINES.get(quantity, quantity.lower())
        on = f" on {name}" if quantity in ("Perplexity", "Accuracy") else ""
        parts.append((row.change, label + on))
    return tuple(parts)


def _stage_seconds(result: RunResult) -> dict[str, float]:
    return {name: spent for name, spent in result.seconds.items() if name != "total"}


def format_labels(values: Mapping[str, Any]) -> dict[str, str]:
    """Keys as words, values as text."""
    return {
        key.removesuffix("_bytes").replace("_", " "): _shown(key, value)
        for key, value in values.items()
    }


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, int):
        return f"{value / 2**30:.2f} GiB"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str):
        return value
    if value is None or value == []:
        return "none"
    return json.dumps(value, ensure_ascii=False).strip("[]").replace('"', "")


def _metadata(result: RunResult, source: Path | None) -> dict[str, Any]:
    """The card's front matter."""
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if result.model.startswith("embedded:"):
        metadata["license"] = EMBEDDED_LICENSE
    elif source is not None:
        metadata |= _license_of(source)
    if _is_hub_name(result.model):
        metadata["base_model"] = result.model
    tags = [] if result.plan is None else ["depth-pruning", "layer-pruning"]
    return metadata | {"tags": [*tags, "layercut"]}


def _is_hub_name(model: str) -> bool:
    """Whether ``model`` names a Hub repository rather than a folder or the embedded model."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model)) and not Path(model).exists()


def _license_of(source: Path) -> dict[str, Any]:
    """The licence keys of the source's own model card; empty if it has none that can be read."""
    card = source / "README.md"
    try:
        if not card.is_file():
            return {}
        with card.open("rb") as file:
            text = file.read(MAX_FRONT_MATTER).decode(errors="replace")
        match = re.match(r"---\r?\n(.*?)\r?\n---", text, flags=re.DOTALL)
        front = match.group(1) if match else ""
        if sum(map(front.count, "[{")) > MAX_BRACKETS:
            return {}
        front_matter = yaml.safe_load(front)
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(front_matter, dict):
        return {}
    return {key: front_matter[key] for key in LICENSE_KEYS if key in front_matter}


def _fence(*blocks: str) -> str:
    """A Markdown code fence longer than any run of backticks in ``blocks``."""
    longest = max((len(run) for block in blocks for run in re.findall("`+", block)), default=0)
    return "`" * max(3, longest + 1)


def json_text(name: str, value: Any) -> str:
    """``value`` as the content of the file ``name``.

    Raises:
        NumericsError: a figure is NaN or infinite, which JSON cannot hold.
    """
    try:
        return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except ValueError as error:
        raise NumericsError(
            f"{name} cannot be written: a figure is NaN or infinite ({error}). "
            "Look for the stage that produced it in the output above."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file and the folders above it.

    Raises:
        OutputError: it cannot be written.
        ResourceError: the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that is not UTF-8 is spelled out; in JSON that is an escape.
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"{path}: {error.strerror}. Free some space and run again."
            ) from error
        raise OutputError(
            f"{path} cannot be written: {error.strerror}. Choose another --output-dir."
        ) from error
