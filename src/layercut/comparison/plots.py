"""The plots of a comparison's page.

Lines never differ by colour alone: every entry has its own pair of colour and marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator

from layercut.comparison.rank_correlation import ranks
from layercut.comparison.result import LAYER_LOSS, Comparison
from layercut.report.plots import WIDTH
from layercut.report.svg import GRID, LINES, MUTED, SHADES, SURFACE, inline_svg, style

MARKERS = "os^DvPX*"
DASHES = ("-", "--", ":", "-.")
MOST_LINES = 20
"""More cannot be told apart; the best at any size are shown, and every preset's table row is."""

HIGHEST = 30
"""Larger ratios are drawn at this one: they leave room for those of usable models."""

TICKS = (0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3, 4, 5, 7, 10, 15, 20, HIGHEST)
MOST_TICKS = 12

LEAST_SECONDS = 0.1
"""Where a method takes no time at all stands on an axis of powers of ten."""


@dataclass(frozen=True, slots=True)
class Line:
    """One entry's points.

    Attributes:
        name: of the entry.
        points: (layers dropped, ratio to dense, seconds), by size.
        mark: how they are drawn.
    """

    name: str
    points: tuple[tuple[int, float, float], ...]
    mark: Mapping[str, Any]


def collect_lines(result: Comparison, text: str) -> tuple[Line, ...]:
    """The entries that ran, at most MOST_LINES, in the order of their best place."""
    points: dict[str, list[tuple[int, float, float]]] = {}
    for row in sorted(result.rows, key=lambda row: -row.layers):
        ratio = row.ratios(result.dense).get(text)
        if row.layers and ratio is not None:
            point = (row.layers, ratio, row.total_seconds or 0.0)
            points.setdefault(row.method, []).insert(0, point)
    lines = []
    for index, name in enumerate(list(points)[:MOST_LINES]):
        colour = LINES[index % len(LINES)]
        turn = index // len(LINES)
        mark = {
            "color": colour,
            "marker": MARKERS[(index + turn) % len(MARKERS)],
            "linestyle": DASHES[turn % len(DASHES)],
            "linewidth": 2.4 if name == "ours" else 1.2,
            "markersize": 7,
            "markeredgecolor": SURFACE,
            "markeredgewidth": 0.6,
        }
        lines.append(Line(name, tuple(points[name]), mark))
    return tuple(lines)


def plot_by_layers(result: Comparison, text: str) -> str:
    """Perplexity as a multiple of the dense model's, against the number of dropped layers."""
    lines = collect_lines(result, text)
    with style():
        plot = Plot(figsize=(WIDTH, 3.4 + 0.12 * len(lines)), layout="constrained")
        axis = plot.subplots()
        for line in reversed(lines):  # the best is drawn over the others
            sizes, ratios, _ = zip(*line.points, strict=True)
            axis.plot(sizes, [min(ratio, HIGHEST) for ratio in ratios], **line.mark)
        axis.set_xticks(_sizes(lines))
        axis.set_xlabel("layers dropped")
        axis.set_ylabel(f"perplexity over dense, {text}")
        _set_ratio_axis(axis, lines)
        handles = list(reversed(axis.get_lines()))
        names = [line.name for line in lines]
        plot.legend(handles, names, loc="outside right upper", fontsize=9)
        description = "; ".join(
            f"{line.name} " + ", ".join(f"{size}: {ratio:.2f}" for size, ratio, _ in line.points)
            for line in lines
        )
        title = f"Perplexity over dense by layers dropped. {description}."
        return inline_svg(plot, "by-layers", title)


def plot_by_seconds(result: Comparison, text: str) -> str:
    """The same perplexity against what a method takes alone, one panel per size."""
    lines = collect_lines(result, text)
    sizes = _sizes(lines)
    columns = min(len(sizes), 3)
    n_rows = -(-len(sizes) // columns)
    legend_rows = -(-len(lines) // 4)
    with style():
        size = (WIDTH, 2.6 * n_rows + 0.25 * legend_rows + 0.4)
        plot = Plot(figsize=size, layout="constrained")
        panels = plot.subplots(n_rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axis, n_dropped in zip(panels, sizes, strict=False):
            for line in reversed(lines):
                for _, ratio, seconds in (p for p in line.points if p[0] == n_dropped):
                    x, y = max(seconds, LEAST_SECONDS), min(ratio, HIGHEST)
                    axis.plot(x, y, **{**line.mark, "linestyle": ""})
            axis.set_xscale("log")
            axis.margins(0.12)
            axis.set_title(f"{n_dropped} layers", fontsize=10, loc="left")
            axis.grid(which="major")
            axis.xaxis.set_major_locator(LogLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_xlabel("seconds")
            _set_ratio_axis(axis, lines)
        for axis in panels[len(sizes) :]:
            axis.set_visible(False)
        for axis in panels[::columns]:
            axis.set_ylabel(f"perplexity over dense, {text}")
        handles = [Line2D([], [], **{**line.mark, "linestyle": ""}) for line in lines]
        names = [line.name for line in lines]
        plot.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
        contents = f"{len(lines)} methods at {', '.join(map(str, sizes))} layers"
        title = f"Perplexity over dense against seconds. {contents}; the table has them."
        return inline_svg(plot, "by-seconds", title)


def plot_scores(result: Comparison) -> str:
    """Rank of every layer under every score, the true loss on top."""
    correlations = result.correlations()
    names = sorted(
        (name for name in result.scores if name != LAYER_LOSS),
        key=lambda name: -correlations.get(name, -2.0),
    )
    names = [LAYER_LOSS, *names] if LAYER_LOSS in result.scores else names
    n_layers = len(result.scores[names[0]])
    with style():
        plot = Plot(figsize=(WIDTH, 0.32 * len(names) + 1.0), layout="constrained")
        axis = plot.subplots()
        for row, name in enumerate(names):
            _draw_ranks(axis, row, result.scores[name])
            if name in correlations:
                axis.text(n_layers - 0.2, row, f"{correlations[name]:+.2f}", va="center")
        if correlations:
            axis.text(n_layers - 0.2, -0.9, "ρ", va="center", color=MUTED)
        axis.set_xlim(-0.6, n_layers + (1.6 if correlations else -0.4))
        axis.set_ylim(len(names) - 0.45, -0.55 - 0.7 * bool(correlations))
        axis.set_yticks(range(len(names)), names)
        step = max(1, -(-n_layers // 30))
        axis.set_xticks(range(0, n_layers, step))
        axis.tick_params(length=0)
        axis.set_xlabel("layer of the input model; dark: the layer counts least")
        for spine in axis.spines.values():
            spine.set_visible(False)
        values = "; ".join(f"{name} {value:+.2f}" for name, value in correlations.items())
        return inline_svg(plot, "scores", f"Ranks of the layers. Spearman's correlation: {values}.")


def _draw_ranks(axis: Axes, row: int, values: Sequence[float]) -> None:
    for layer, rank in enumerate(ranks(values)):
        shade = SHADES[min(int(rank * len(SHADES) / len(values)), len(SHADES) - 1)]
        cell = (layer - 0.47, row - 0.44)
        axis.add_patch(Rectangle(cell, 0.94, 0.88, facecolor=shade, linewidth=0))


def _sizes(lines: Sequence[Line]) -> list[int]:
    return sorted({size for line in lines for size, *_ in line.points})


def _set_ratio_axis(axis: Axes, lines: Sequence[Line]) -> None:
    """A logarithmic axis from a little below the best to a little above the worst shown."""
    heights = [min(ratio, HIGHEST) for line in lines for _, ratio, _ in line.points]
    lowest, highest = min(heights) / 1.06, max(heights) * 1.1
    axis.set_yscale("log")
    axis.set_ylim(lowest, highest)
    factor = (highest / lowest) ** (1 / MOST_TICKS)
    ticks: list[float] = []
    for tick in TICKS:
        if lowest <= tick <= highest and (not ticks or tick >= ticks[-1] * factor):
            ticks.append(tick)
    names = [f"≥ {tick:g}" if tick == HIGHEST else f"× {tick:g}" for tick in ticks]
    axis.set_yticks(ticks, names)
    axis.minorticks_off()
    axis.grid(axis="y", color=GRID)
