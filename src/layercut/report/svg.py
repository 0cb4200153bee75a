"""A matplotlib figure as inline SVG whose fonts and colours the page decides."""

from __future__ import annotations

import html
import io
import re
import warnings
from contextlib import AbstractContextManager

from matplotlib import rc_context
from matplotlib.figure import Figure

# Stand-ins that matplotlib can parse; in the SVG each becomes the CSS variable of its name.
INK, MUTED, GRID, KEPT, DROPPED, PATCHED, SURFACE = (f"#01020{i}" for i in range(7))
SHADES = tuple(f"#01021{i}" for i in range(7))
LINES = tuple(f"#01022{i}" for i in range(8))
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    KEPT: "kept",
    DROPPED: "dropped",
    PATCHED: "patched",
    SURFACE: "surface",
}
_VARIABLES |= {shade: f"shade-{i}" for i, shade in enumerate(SHADES)}
_VARIABLES |= {line: f"line-{i}" for i, line in enumerate(LINES)}


def style() -> AbstractContextManager[None]:
    """Settings that must hold both while a figure is built and while it is written."""
    return rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "layercut",
            "font.size": 10,
            "text.parse_math": False,  # a text's name may hold a dollar sign
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": MUTED,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.color": MUTED,
            "ytick.labelcolor": INK,
            "grid.color": GRID,
            "hatch.linewidth": 1.4,
            "legend.frameon": False,
        }
    )


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as one ``<svg>`` element, the same bytes every time.

    Args:
        figure: built inside ``style()``; still inside it.
        name: prefix of every id, so that several figures can share a page.
        description: what a reader who does not see the figure is told.
    """
    figure.patch.set_visible(False)
    for axis in figure.axes:
        axis.patch.set_visible(False)
    buffer = io.StringIO()
    unwanted = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The page draws the text, in a font that has what matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata=unwanted)
    whole = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', whole)
    assert box is not None
    content = whole[whole.index(">", whole.index("<svg")) + 1 :]
    content = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", content)
    for colour, variable in _VARIABLES.items():
        content = content.replace(colour, f"var(--{variable})")
    label = html.escape(description, quote=True)
    return f'<svg {box.group()} role="img" aria-label="{label}">{content}'
