"""A comparison as files: compare.csv, compare.json and report.html."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from layercut.comparison import plots
from layercut.comparison.result import LAYERS, Comparison, cells, titles, to_csv
from layercut.comparison.row import Row
from layercut.report.write import environment, format_labels, json_text, write_text


def write_files(result: Comparison, folder: Path) -> None:
    """Write everything that is made from the rows; all of it is rendered first.

    Raises:
        NumericsError: a number is NaN or infinite.
        OutputError: the folder cannot be written to.
        ResourceError: the disk is full.
    """
    texts = {
        "compare.json": json_text("compare.json", result.to_json()),
        "compare.csv": to_csv(result),
        "report.html": render_html(result),
    }
    for name, text in texts.items():
        write_text(folder / name, text)


def render_html(result: Comparison) -> str:
    """The page: one file that needs no other, no network and no script."""
    svgs = {}
    text = next(iter(result.texts), None)
    if text is not None and plots.collect_lines(result, text):
        svgs["layers"] = plots.plot_by_layers(result, text)
        svgs["seconds"] = plots.plot_by_seconds(result, text)
    if result.scores:
        svgs["scores"] = plots.plot_scores(result)
    template = environment().get_template("compare.html.jinja")
    return template.render(
        result=result,
        titles=[title for title in titles(result) if title != LAYERS],
        dense=_cells_below_size(result, result.dense),
        sizes=_group_by_size(result),
        failed=[row for row in result.rows if row.reason is not None],
        entries=list({row.method: row for row in result.rows}.values()),
        plots={name: Markup(svg) for name, svg in svgs.items()},  # our own SVG, already escaped
        n_shown=plots.MOST_LINES,
        highest=plots.HIGHEST,
        versions=dict(result.provenance.versions),
        hardware=format_labels(result.provenance.hardware),
        settings=format_labels(result.settings),
    )


def _group_by_size(result: Comparison) -> dict[int, list[tuple[list[str], str]]]:
    """Layers dropped → the rows that ran, as cells and which layers went."""
    groups: dict[int, list[tuple[list[str], str]]] = {}
    for row in result.rows:
        if row.reason is None:
            layers = ", ".join(map(str, row.dropped))
            groups.setdefault(row.layers, []).append((_cells_below_size(result, row), layers))
    return groups


def _cells_below_size(result: Comparison, row: Row) -> list[str]:
    """The cells of a row below a heading that tells its size."""
    pairs = zip(titles(result), cells(result, row), strict=True)
    return [cell for title, cell in pairs if title != LAYERS]
