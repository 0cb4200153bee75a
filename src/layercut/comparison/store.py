"""What a comparison has finished, kept in its folder so that a killed run goes on from there.

Every record is one line, written at once and synced: it is there whole or not at all. The folder's
settings are its identity: models and texts are recognised by their content, and a call with others
is refused. Methods, sizes and further evaluations can be added.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layercut.checkpoints.claimed_folder import find_differences, remove_claimed
from layercut.checkpoints.output_dir import check_path
from layercut.comparison.row import Row
from layercut.errors import OutputError

IDENTITY_FILE = "settings.json"
RECORDS = ("rows", "plans", "scores")
HEALING = "healing"
"""Checkpoints of the heal that is running; removed when its row is there."""

WRITTEN = (
    IDENTITY_FILE,
    f"{IDENTITY_FILE}.partial",
    *(f"{name}.jsonl" for name in RECORDS),
    "compare.csv",
    "compare.json",
    "report.html",
)
"""Every file that a comparison puts into its folder, and may replace there."""


def digest(*parts: Any) -> str:
    """Short hash of what JSON can hold."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Records:
    """Lines of JSON by their ``key``; of several with one key, the last counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, dict[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            # A kill tore the last line; the next one must not be glued to its remains.
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                self.known[record["key"]] = record
            except (ValueError, KeyError, TypeError) as error:
                raise OutputError(
                    f"{path}, line {number} is no record of a comparison ({error}). Remove that "
                    "line, or choose another --output-dir."
                ) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The record of this key, if it is finished."""
        return self.known.get(key)

    def add(self, key: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Write a finished record, to the disk and through its caches."""
        record = {**content, "key": key}
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())
            os.fsync(file.fileno())
        self.known[key] = record
        return record


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise OutputError(
            f"{path} is damaged ({error}). Choose another --output-dir, or empty this one."
        ) from error
    return identity


class Store:
    """The records of one folder.

    Attributes:
        folder: the comparison's output folder.
        rows: one per entry and size.
        plans: layers per choice and size, with what choosing took.
        scores: every scoring of the model, with the layers that were skipped.
        identity: what the records belong to, nested mappings of JSON values.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows, self.plans, self.scores = (Records(folder / f"{n}.jsonl") for n in RECORDS)
        self.identity: dict[str, Any] = {}
        if (folder / IDENTITY_FILE).is_file():
            self.identity = _read_identity(folder / IDENTITY_FILE)

    def find_row(self, key: str) -> Row | None:
        """The finished row of this key, if there is one."""
        record = self.rows.get(key)
        return None if record is None else Row.from_json(record)

    def add_row(self, row: Row) -> Row:
        """Write a finished row; as it will be read."""
        return Row.from_json(self.rows.add(row.key, row.to_json()))

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder that of ``identity``, or go on in it.

        Names that only one of both has, such as a further text, are added.

        Raises:
            OutputError: the folder's records belong to other settings; names the differing keys.
        """
        different = find_differences(self.identity, identity)
        if different:
            raise OutputError(
                f"{self.folder} holds a comparison with other settings: {'; '.join(different)}. "
                "Choose another --output-dir, or replace it with --overwrite."
            )
        self.identity = _merge(self.identity, identity)
        text = json.dumps(self.identity, indent=2, ensure_ascii=False) + "\n"
        partial = self.folder / f"{IDENTITY_FILE}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.folder / IDENTITY_FILE)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else, before anything is loaded.

    Raises:
        OutputError: it is a file, or has content that no comparison wrote.
    """
    check_path(folder, "--output-dir")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file. Choose another --output-dir.")
    if not folder.is_dir() or (folder / IDENTITY_FILE).is_file():
        return
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in (*WRITTEN, HEALING))
    if foreign:
        remedy = "" if overwrite else " --overwrite replaces a comparison only."
        raise OutputError(
            f"{folder} holds {foreign[0]}, which no comparison wrote. Choose another "
            f"--output-dir.{remedy}"
        )


@contextmanager
def open_store(folder: Path, *, overwrite: bool) -> Iterator[Store]:
    """The folder's records, for this process alone.

    Raises:
        OutputError: the folder cannot be written to, or another process compares into it.
    """
    check_folder(folder, overwrite=overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be used: {error.strerror}. Choose another --output-dir."
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if overwrite:
            remove_claimed(folder / HEALING)
            for name in WRITTEN:
                (folder / name).unlink(missing_ok=True)
        yield Store(folder)
    except BlockingIOError:
        raise OutputError(
            f"another comparison is being written to {folder}. Wait for it, or choose another "
            "--output-dir."
        ) from None
    finally:
        os.close(descriptor)


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    both = {**old, **new}
    for key in old.keys() & new.keys():
        if isinstance(old[key], Mapping):
            both[key] = _merge(old[key], new[key])
    return both
