"""Text in a terminal as it is: neither markup nor control characters of a name take effect."""

from __future__ import annotations

from rich.text import Text

from layercut.report.literal import escape_controls


def literal(text: str, style: str = "") -> Text:
    """Text for a console, control characters as escapes such as ``\\x1b``.

    Args:
        text: may hold the names of a user's files.
        style: how rich shows it.
    """
    return Text(escape_controls(text), style=style)
