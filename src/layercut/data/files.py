"""Local files, read row by row: plain text, JSON lines, CSV and Parquet, each also gzipped."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from layercut.checkpoints.hf_calls import fetch_each
from layercut.data.named_texts import name_hint
from layercut.errors import DataError, suggestion

Value = tuple[str, Any]
"""Where a value stands (``line 3``, ``row 3``) and the value itself."""

Row = tuple[str, dict[str, Any]]
"""Where a row stands and its values by column."""

MAX_CSV_FIELD = 2**31 - 1
"""Characters in one CSV field: Python's own limit of 131,072 is less than one long document."""


def local_path(source: str) -> Path:
    """A source as a path, ``~`` as the user's home; of a user that is not known it stays."""
    try:
        return Path(source).expanduser()
    except RuntimeError:
        return Path(source)


def exists(path: Path) -> bool:
    """Whether something is there; nothing is under a name that no file can have."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def check_file(path: Path) -> None:
    """Refuse what is not a readable regular file; symlinks are followed.

    Raises:
        DataError: the path does not exist, or is a folder, a FIFO, a device or a socket.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        hint = f". For a Hub dataset write hub:{path}" if str(path).count("/") == 1 else ""
        hint = hint or name_hint(str(path))
        raise DataError(f"data file {path} does not exist{hint}") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null character, which no path has
        raise DataError(f"data file {path} cannot be read: {error}") from None
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if kind := kinds.get(stat.S_IFMT(mode)):
        raise DataError(f"{path} is {kind}; data must be a regular file")


def read_text(path: Path) -> Iterator[Value]:
    """The whole file as one value; nothing for an empty file."""
    if text := "".join(_lines(path)):
        yield "line 1", text


def read_column(rows: Iterable[Row], name: str, column: str) -> Iterator[Value]:
    """One column of ``rows``; a row that lacks it counts as null.

    Args:
        rows: of the source called ``name``.
        name: what to call the source in errors.
        column: must be in the first row.

    Raises:
        DataError: the first row lacks the column.
    """
    for number, (where, row) in enumerate(rows):
        if number == 0:
            check_column(name, column, list(row))
        yield where, row.get(column)


def jsonl_rows(path: Path) -> Iterator[Row]:
    """One row per line that is not blank."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(
                f'{path}, line {number} should be an object such as {{"text": "…"}}, '
                f"got {type(row).__name__}"
            )
        yield f"line {number}", row


def csv_rows(path: Path) -> Iterator[Row]:
    """One row per record below the header."""
    previous_limit = csv.field_size_limit(MAX_CSV_FIELD)
    # strict: an unclosed quote must not swallow the rest of the file.
    rows = csv.DictReader(_lines(path), strict=True)
    try:
        for row in rows:
            if None in row:
                raise DataError(
                    f"{path}, line {rows.line_num} has more fields than the header; "
                    "put text that holds commas in quotes"
                )
            yield f"line {rows.line_num}", row
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(previous_limit)


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """One row per record, read in groups of 1,024; with ``column``, only that one is read."""
    number, what = 0, f"{path} cannot be read"
    for batch in fetch_each(_parquet_batches(path, column), what, DataError, "Write it again."):
        for row in batch:
            number += 1
            yield f"row {number}", row


def _parquet_batches(path: Path, column: str | None) -> Iterator[list[dict[str, Any]]]:
    from pyarrow import parquet

    with _open(path) as file:
        table = parquet.ParquetFile(file)
        if column is not None:
            check_column(str(path), column, table.schema_arrow.names)
        columns = None if column is None else [column]
        try:
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                yield batch.to_pylist()
        except UnicodeDecodeError as error:
            where = f" in column '{column}'" if column else ""
            raise DataError(f"{path} is not UTF-8{where}: {error.reason}") from None


def check_column(name: str, column: str, columns: list[str]) -> None:
    """Refuse a text column that is not there.

    Raises:
        DataError: lists the columns that are.
    """
    if column not in columns:
        raise DataError(
            f"{name} has no column '{column}'{suggestion(column, columns)} "
            f"(columns: {', '.join(columns)}). Set text_column."
        )


_DAMAGED = (OSError, EOFError, zlib.error)


def _open(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    return path.open("rb")


def _lines(path: Path) -> Iterator[str]:
    """Lines with their ends; a leading byte order mark is dropped."""
    offset = 0
    try:
        with _open(path) as file:
            for line in file:
                mark = (
                    len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
                )
                offset += mark
                text = line[mark:].decode()
                offset += len(line) - mark
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {offset + error.start}; convert it to UTF-8"
        ) from None
    except _DAMAGED as error:
        raise DataError(f"{path} cannot be read: {error}") from None
