"""WikiText and the Penn Treebank back to ordinary text.

Both are stored as tokens separated by spaces, WikiText with markers inside numbers and compounds,
the treebank (PTB) with contractions in two. The language model benchmark convention is to undo that
before tokenising; perplexities of raw and restored text are not comparable. What PTB lost for good
(case, numbers, rare words) stays lost.
"""

from __future__ import annotations

import re

_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # 1 @,@ 250   0 @.@ 7   red @-@ tipped
        (r" @([-,.])@ ", r"\1"),
        # = = Life cycle = =  →  == Life cycle ==
        (r"(?<==) (?==)", ""),
        # Europe 's, don 't, they 're
        (r" '(?=(?:s|t|d|m|ll|re|ve)\b)", "'"),
        # PTB: do n't, $ N
        (r"(?<=\w) (?=n't\b)", ""),
        (r"([$#]) (?=N\b)", r"\1"),
        # ( 24 in )   [ sic ]
        (r"([(\[{]) ", r"\1"),
        (r" ([)\]}])", r"\1"),
        # " lobster red "
        (r'" ([^"]*?) "', r'"\1"'),
        # the ' 40s
        (r"(?<!\S)' (?=\d0s\b)", "'"),
        # from ' B ' Squadron, but: the ships ' guns … the ships ' crews
        (
            r"(?:(?<!s )|(?<=\bwas )|(?<=\bis )|(?<=\bas ))(?<!\S)' ((?:[^']|'(?=\w))*?) '(?!\w)",
            r"'\1'",
        ),
        (r"(?<=s) '(?!\S)", "'"),
        (r" ([,.;:?!])(?!\S)", r"\1"),
        (r" ° ?", "°"),
    )
)


def detokenize(text: str) -> str:
    """``text`` with markers undone, line by line; blank lines stay blank."""
    return "\n".join(_detokenize_line(line.strip()) for line in text.split("\n"))


def _detokenize_line(line: str) -> str:
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line
