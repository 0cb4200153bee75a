"""Names of a user's files as they are: no markup or control character in them takes effect."""

from __future__ import annotations

import re

CONTROL = re.compile(
    "(?!\n  )[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]",
)
"""Control characters and those that turn the direction; a list in a message is indented by two."""


def escape_controls(text: str) -> str:
    """Text with its control characters spelled out, such as ``\\x1b``."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def plain_words(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"[\\`*\[\]<>&]", r"\\\g<0>", escape_controls(text))


def code_span(text: str) -> str:
    """Text as code within a line of Markdown."""
    text = escape_controls(text)
    if "`" not in text:
        return f"`{text}`"
    ticks = "`" * (max(len(run) for run in re.findall("`+", text)) + 1)
    return f"{ticks} {text} {ticks}"
