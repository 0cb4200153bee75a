"""The texts that papers on pruning report perplexity on, by name.

A name stands for a data set on the Hub, its split for testing, and the way its rows become
documents; without a network, a local copy takes the name's place.
"""

from __future__ import annotations

from dataclasses import dataclass

from layercut.errors import DataError, suggestion


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One text with a name.

    Attributes:
        hub: ``owner/name``.
        config: its configuration on the Hub.
        split: the one that perplexity is reported on.
        column: the column that holds the text.
        joint: what rows are joined by to make the one document they are parts of; ``None`` where
            each row is a document.
        local: an example of a local copy, for the error without a network.
        revision: the branch that holds plain files, where the main one holds a script.
    """

    hub: str
    config: str | None
    split: str
    column: str
    joint: str | None
    local: str
    revision: str | None = None

    def source(self, split: str) -> str:
        """The data as a source."""
        config = f":{self.config}" if self.config else ""
        return f"hub:{self.hub}{config}@{split}"


BENCHMARKS = {
    # Rows are the lines of the articles, blank ones between paragraphs.
    "wikitext2": Benchmark(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "\n", "wiki.test.raw"
    ),
    # Rows are sentences in the order of the newspaper's text.
    "ptb": Benchmark(
        "ptb-text-only/ptb_text_only",
        None,
        "test",
        "sentence",
        " ",
        "ptb.test.txt",
        revision="refs/convert/parquet",
    ),
    "c4": Benchmark("allenai/c4", "en", "validation", "text", None, "c4.jsonl"),
}


def find_benchmark(source: str) -> tuple[Benchmark, str] | None:
    """The text that ``NAME`` or ``NAME@SPLIT`` stands for, and the split; ``None`` for others."""
    name, at, split = source.partition("@")
    benchmark = BENCHMARKS.get(name)
    if benchmark is None:
        return None
    if at and not split:
        raise DataError(f"'{source}' should read {name} or {name}@train")
    return benchmark, split or benchmark.split


def refuse_test_split(source: str) -> None:
    """Refuse to calibrate on what results are reported on.

    Raises:
        DataError: ``source`` names a benchmark without ``@train`` or another split.
    """
    benchmark = find_benchmark(source)
    if benchmark is not None and benchmark[1] == benchmark[0].split:
        name = source.partition("@")[0]
        raise DataError(
            f"{source} is the {benchmark[1]} split, which results are reported on. "
            f"Calibrate on {name}@train."
        )


def name_hint(path: str) -> str:
    """``"; did you mean 'wikitext2'?"`` for what may be a misspelt name, else nothing."""
    return "" if "/" in path or "." in path else suggestion(path, BENCHMARKS)
