"""The report's plots.

Marks never differ by colour alone: dropped layers are hatched, patched ones dotted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Plot
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from layercut.report.literal import escape_controls
from layercut.report.svg import (
    DROPPED,
    INK,
    KEPT,
    MUTED,
    PATCHED,
    SHADES,
    SURFACE,
    inline_svg,
    style,
)
from layercut.results import Estimate
from layercut.types import PruningPlan

WIDTH = 9.6
"""Inches; the page scales the figure to its column."""

DROPPED_MARK: dict[str, Any] = {"facecolor": DROPPED, "hatch": "////", "edgecolor": SURFACE}
PATCHED_MARK: dict[str, Any] = {"facecolor": PATCHED, "hatch": "...", "edgecolor": SURFACE}
KEPT_MARK: dict[str, Any] = {"facecolor": KEPT, "edgecolor": SURFACE}


def layers(plan: PruningPlan, patched: int | None = None) -> str:
    """Scores of the intact model as bars, the stack as a strip and, below, every round.

    Args:
        plan: its first round gives the bars; a plan without rounds shows the strip alone.
        patched: the layer whose weights recovery changed.
    """
    heights = {"bars": 2.4} if plan.rounds else {}
    heights["strip"] = 0.34
    if len(plan.rounds) > 1:
        heights["rounds"] = min(0.24 * len(plan.rounds), 4.0)
    with style():
        plot = Plot(figsize=(WIDTH, sum(heights.values()) + 1.1), layout="constrained")
        axes = plot.subplot_mosaic(
            [[name] for name in heights], height_ratios=list(heights.values()), sharex=True
        )
        _strip(axes["strip"], plan, patched)
        if "bars" in axes:
            _bars(axes["bars"], plan, patched)
        if "rounds" in axes:
            _rounds(axes["rounds"], plan)
        for axis in axes.values():
            axis.tick_params(axis="x", length=0, labelbottom=False)
        last = list(axes.values())[-1]
        last.tick_params(axis="x", labelbottom=True)
        last.set_xlim(-0.7, plan.n_layers - 0.3)
        last.xaxis.set_major_locator(MaxNLocator(30, integer=True, steps=[1, 2, 5, 10]))
        last.set_xlabel("layer of the input model")
        plot.legend(handles=_legend(plan, patched), loc="outside upper left", ncols=5)
        return inline_svg(plot, "layers", _told(plan, patched))


def perplexities(stages: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Horizontal bars: texts in order, one bar per stage.

    Args:
        stages: stage title → text name → perplexity.
    """
    texts = dict.fromkeys(name for estimates in stages.values() for name in estimates)
    bars = [
        (f"{escape_controls(text)}: {title.lower()}", estimates[text], title.startswith("Dense"))
        for text in texts
        for title, estimates in stages.items()
        if text in estimates
    ]
    with style():
        plot = Plot(figsize=(WIDTH, 0.36 * len(bars) + 0.65), layout="constrained")
        axis = plot.subplots()
        for row, (_, estimate, dense) in enumerate(bars):
            mark = KEPT_MARK if dense else DROPPED_MARK
            axis.barh(row, estimate.value, xerr=estimate.stderr, height=0.7, ecolor=INK, **mark)
            end = estimate.value + estimate.stderr
            axis.annotate(
                f"{estimate.value:,.2f}",
                (end, row),
                xytext=(6, 0),
                textcoords="offset points",
                va="center_baseline",
            )
        axis.set_yticks(range(len(bars)), [label for label, _, _ in bars])
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.set_xlim(left=0)
        axis.set_xlabel("perplexity: lower is better; whiskers show one standard error")
        axis.tick_params(axis="y", length=0)
        values = "; ".join(f"{label} {estimate.value:.2f}" for label, estimate, _ in bars)
        return inline_svg(plot, "perplexities", f"Bars of perplexity. {values}.")


def seconds(stages: Mapping[str, float]) -> str:
    """One stacked horizontal bar.

    Args:
        stages: stage → seconds, without the total.
    """
    whole = sum(stages.values())
    with style():
        plot = Plot(figsize=(WIDTH, 1.3), layout="constrained")
        axis = plot.subplots()
        start = 0.0
        for index, (name, length) in enumerate(stages.items()):
            shade = SHADES[(5, 2)[index % 2]]
            axis.barh(0, length, left=start, height=0.5, facecolor=shade, edgecolor=SURFACE)
            # A label needs room; the figure's caption lists every stage.
            if length > 0.08 * whole:
                axis.text(start, 0.36, f"{name}\n{length:,.1f} s", va="bottom")
            start += length
        axis.set_ylim(-0.3, 1.2)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.set_xlim(0, start or 1)
        axis.set_xlabel("seconds")
        values = ", ".join(f"{name} {length:.1f}" for name, length in stages.items())
        return inline_svg(plot, "seconds", f"Seconds per stage: {values}.")


def _mark(plan: PruningPlan, patched: int | None, layer: int) -> dict[str, Any]:
    if layer in plan.dropped:
        return DROPPED_MARK
    return PATCHED_MARK if layer == patched else KEPT_MARK


def _bars(axis: Axes, plan: PruningPlan, patched: int | None) -> None:
    scores = plan.rounds[0].scores
    for layer, score in enumerate(scores):
        if score is not None:
            axis.bar(layer, score, width=0.8, **_mark(plan, patched, layer))
    if len(plan.rounds) > 1:
        for number, step in enumerate(plan.rounds, start=1):
            for layer in step.dropped:
                axis.annotate(
                    str(number),
                    (layer, max(scores[layer] or 0.0, 0.0)),
                    xytext=(0, 3),
                    textcoords="offset points",
                    ha="center",
                    weight="bold",
                    fontsize=10 if plan.n_layers <= 40 else 7,
                )
    axis.margins(y=0.12)
    axis.axhline(0, color=MUTED, linewidth=0.8)
    axis.set_ylabel("score\n(higher = keep)")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    axis.grid(axis="y")
    axis.spines["bottom"].set_visible(False)


def _strip(axis: Axes, plan: PruningPlan, patched: int | None) -> None:
    for layer in range(plan.n_layers):
        mark = _mark(plan, patched, layer)
        axis.add_patch(Rectangle((layer - 0.44, 0), 0.88, 1, linewidth=0, **mark))
    axis.set_ylim(-0.05, 1.05)
    axis.set_yticks([0.5], ["stack"])
    _frameless(axis)


def _rounds(axis: Axes, plan: PruningPlan) -> None:
    """Rank of every candidate within its round: scores of two rounds share no scale."""
    for row, step in enumerate(plan.rounds):
        known = sorted((s, layer) for layer, s in enumerate(step.scores) if s is not None)
        for rank, (_, layer) in enumerate(known):
            shade = SHADES[rank * len(SHADES) // len(known)]
            cell = (layer - 0.46, row - 0.44)
            axis.add_patch(Rectangle(cell, 0.92, 0.88, facecolor=shade, linewidth=0))
        for layer in step.dropped:
            axis.plot(layer, row, "X", markersize=8, color=DROPPED, markeredgecolor=SURFACE)
    axis.set_ylim(len(plan.rounds) - 0.5, -0.5)
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda row, _: f"{row + 1:.0f}"))
    axis.set_ylabel("round")
    _frameless(axis)


def _frameless(axis: Axes) -> None:
    axis.tick_params(axis="y", length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _legend(plan: PruningPlan, patched: int | None) -> list[Patch | Line2D]:
    handles: list[Patch | Line2D] = [
        Patch(label="kept", **KEPT_MARK),
        Patch(
            label="dropped (number: round)" if len(plan.rounds) > 1 else "dropped", **DROPPED_MARK
        ),
    ]
    if patched is not None:
        handles.append(Patch(label="kept, weights changed", **PATCHED_MARK))
    if len(plan.rounds) > 1:
        handles.append(Patch(label="low rank in its round", facecolor=SHADES[0]))
        handles.append(Patch(label="high rank", facecolor=SHADES[-1]))
    return handles


def _told(plan: PruningPlan, patched: int | None) -> str:
    dropped = ", ".join(map(str, plan.dropped)) or "none"
    sentence = f"The {plan.n_layers} layers with their scores; dropped: {dropped}."
    return sentence if patched is None else f"{sentence} Weights of layer {patched} were changed."
