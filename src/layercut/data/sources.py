"""A source named in the recipe → the texts in it, one document per row."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from layercut.checkpoints.hf_calls import fetch_each, guard
from layercut.data import files
from layercut.data.detokenize import detokenize as undo_markers
from layercut.data.embedded_texts import read_embedded
from layercut.data.named_texts import Benchmark, find_benchmark
from layercut.errors import DataError, NetworkError, suggestion

TABLES = (".jsonl", ".csv", ".parquet")
EXTENSIONS = (".txt", ".raw", *TABLES)
CORRECT = "Correct the name, or use a local file."
CONNECT = "Connect, or use a local file or embedded:docs."


def read_texts(
    source: str, *, text_column: str = "text", detokenize: bool | Literal["auto"] = "auto"
) -> Iterator[str]:
    """The documents of ``source``, read lazily; null and blank ones are skipped.

    Args:
        source: ``wikitext2``, ``ptb`` or ``c4`` (each also with ``@split``), ``embedded:…``,
            ``hub:owner/name[:config][@split]`` or a path. A ``.txt`` or ``.raw`` file is one
            document, and so are WikiText-2 and PTB; any other has one per row.
        text_column: the column of a table that holds the text.
        detokenize: undo WikiText's and PTB's markers; ``auto``: see `is_detokenized`.

    Raises:
        DataError: the source is unknown, not there, not readable, or holds no text; what only
            reading shows is raised while iterating.
        NetworkError: the Hub is needed and cannot be reached.
    """
    benchmark = find_benchmark(source)
    if benchmark is not None:
        texts = _benchmark_texts(source, *benchmark)
    elif source.startswith("embedded:"):
        texts = read_embedded(source.removeprefix("embedded:"))
    elif source.startswith("hub:"):
        texts = _checked(files.read_column(_hub_rows(source), source, text_column), source)
    else:
        path = files.local_path(source)
        texts = _checked(_read_file(path, text_column), str(path))
    return map(undo_markers, texts) if is_detokenized(source, detokenize) else texts


def is_detokenized(source: str, detokenize: bool | Literal["auto"]) -> bool:
    """Whether `read_texts` undoes markers; ``auto``: in .raw files, WikiText on the Hub and PTB."""
    if detokenize != "auto":
        return detokenize
    if find_benchmark(source) is not None:
        return not source.startswith("c4")
    if source.startswith(("embedded:", "hub:")):
        return source.startswith("hub:") and "wikitext" in source.lower()
    return _extension(Path(source)) == ".raw"


def read_table(source: str) -> Iterator[files.Row]:
    """The rows of a table with all of their columns, read lazily.

    Args:
        source: ``hub:owner/name[:config][@split]`` or the path of a .jsonl, .csv or .parquet file,
            each also .gz.

    Raises:
        DataError: the source is not there or not a readable table; what only reading shows is
            raised while iterating.
        NetworkError: the Hub is needed and cannot be reached.
    """
    if source.startswith("hub:"):
        return _hub_rows(source)
    path = files.local_path(source)
    files.check_file(path)
    return _table_rows(path, TABLES)


def _extension(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _read_file(path: Path, text_column: str) -> Iterator[files.Value]:
    files.check_file(path)
    if _extension(path) in (".txt", ".raw"):
        return files.read_text(path)
    return files.read_column(_table_rows(path, EXTENSIONS, text_column), str(path), text_column)


def _table_rows(
    path: Path, known: tuple[str, ...], column: str | None = None
) -> Iterator[files.Row]:
    extension = _extension(path)
    if extension == ".jsonl":
        return files.jsonl_rows(path)
    if extension == ".csv":
        return files.csv_rows(path)
    if extension == ".parquet":
        return files.parquet_rows(path, column)
    raise DataError(
        f"{path} has an unknown file type '{extension}'{suggestion(extension, known)} "
        f"(known: {', '.join(known)}, each also with .gz)"
    )


def _checked(values: Iterator[files.Value], name: str) -> Iterator[str]:
    """The values that are text; refuses other types and sources without any text."""
    n_rows = n_texts = 0
    for where, value in values:
        n_rows += 1
        if value is None:
            continue
        if not isinstance(value, str):
            raise DataError(f"{name}, {where} should be text, got {type(value).__name__}")
        if not value.strip():
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{name}, {where} holds half of a surrogate pair") from None
        n_texts += 1
        yield value
    if n_rows == 0:
        raise DataError(f"{name} is empty: 0 rows")
    if n_texts == 0:
        raise DataError(f"{name} holds no text: each of its {n_rows} rows is null or blank")


def _parse_hub(source: str) -> tuple[str, str | None, str]:
    """Dataset name, configuration and split."""
    pattern = r"hub:([\w.-]+/[\w.-]+)(?::([^@:]+))?(?:@([^@]+))?"
    match = re.fullmatch(pattern, source)
    if match is None or ".." in source:
        raise DataError(f"'{source}' should read hub:owner/name[:config][@split]")
    name, config, split = match.groups()
    return name, config, split or "train"


def _hub_rows(source: str) -> Iterator[files.Row]:
    name, config, split = _parse_hub(source)
    return _stream_hub(source, name, config, split)


def _benchmark_texts(source: str, benchmark: Benchmark, split: str) -> Iterator[str]:
    """The documents of a text with a name."""
    where = benchmark.source(split)
    try:
        rows = _stream_hub(where, benchmark.hub, benchmark.config, split, benchmark.revision)
        values = files.read_column(rows, where, benchmark.column)
        if benchmark.joint is not None:
            # Blank rows count here: they are the document's blank lines.
            whole = benchmark.joint.join((text or "").rstrip("\n") for _, text in values)
            values = iter([("row 1", whole)])
        yield from _checked(values, where)
    except NetworkError as error:
        raise NetworkError(
            f"{source}: {error} A local copy serves as well: give its path, such as "
            f"{benchmark.local}, in the name's place."
        ) from None


def _stream_hub(
    source: str, name: str, config: str | None, split: str, revision: str | None = None
) -> Iterator[files.Row]:
    from datasets import load_dataset
    from huggingface_hub import constants

    # Streaming fetches only what is read; without a network only a whole cached copy can serve.
    streaming = not constants.is_offline_mode()
    what = f"{source} cannot be read"
    with guard(what, DataError, CORRECT, offline=CONNECT):
        data = load_dataset(name, config, split=split, streaming=streaming, revision=revision)
    rows = fetch_each(data, what, DataError, CORRECT, offline=CONNECT)
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", row
