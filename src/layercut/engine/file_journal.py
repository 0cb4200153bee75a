"""A journal in a folder: what a killed run has decided is there when it starts again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layercut.checkpoints.claimed_folder import (
    RUN_FILE,
    check_claimed,
    encode_mark,
    find_differences,
    folder_beside,
    remove_claimed,
)
from layercut.checkpoints.output_dir import DISK_FULL
from layercut.engine.journal import Entry, Item, Journal
from layercut.engine.record_file import (
    PARTIAL,
    RECORD,
    Record,
    read_record,
    read_record_tensors,
    remove_record,
    write_record,
    write_whole_text,
)
from layercut.errors import OutputError, ResourceError
from layercut.results import warnings_into

PURPOSE = "the record of the run"


class FileJournal(Journal):
    """The decisions of one run, in a folder that only this process uses.

    Attributes:
        folder: where they are.
        machine: what this process computes with.
        reserve_bytes: space that the disk must have left behind a record with tensors.
        scope: what the decisions belong to.
        records: key → record; the part of a scope shares it.
    """

    def __init__(
        self,
        folder: Path,
        machine: Mapping[str, Any],
        *,
        reserve_bytes: float = 0,
        scope: str = "",
        records: dict[tuple[str, str, Item], Record] | None = None,
    ) -> None:
        self.folder = folder
        self.machine = machine
        self.reserve_bytes = reserve_bytes
        self.scope = scope
        self.records = read_records(folder) if records is None else records

    def find(self, kind: str, item: Item) -> Entry | None:
        """The recorded decision, if there is one and it is whole; repeats what it warned of."""
        record = self.records.get((self.scope, kind, item))
        if record is None:
            return None
        tensors = read_record_tensors(self._stem(kind, item), record)
        if tensors is None:
            _warn_of_damage(kind, item)
            self.discard(kind, item)
            return None
        for sentence in record.warnings:
            warnings.warn(sentence, stacklevel=2)
        return Entry(record.values, tensors)

    def record(self, kind: str, item: Item, entry: Entry) -> bool:
        """Keep a decision on the disk, unless its tensors would take the output's place there.

        Raises:
            ResourceError: the disk is full; what was recorded before is kept.
            OutputError: the folder cannot be written to.
        """
        return self._record(kind, item, entry, [])

    def discard(self, kind: str, item: Item) -> None:
        """Forget a decision that a later one has made useless."""
        if self.records.pop((self.scope, kind, item), None) is not None:
            remove_record(self._stem(kind, item))

    def conclude(self, kind: str, item: Item) -> None:
        """Forget all others of this scope, which have led to this decision, if it is recorded."""
        if (self.scope, kind, item) in self.records:
            for scope, other, its_item in list(self.records):
                if scope == self.scope and (other, its_item) != (kind, item):
                    self.discard(other, its_item)

    def within(self, scope: str) -> FileJournal:
        """The part of the journal whose decisions belong to ``scope``."""
        return FileJournal(
            self.folder,
            self.machine,
            reserve_bytes=self.reserve_bytes,
            scope=f"{self.scope}{scope}/",
            records=self.records,
        )

    def recall(self, kind: str, item: Item, compute: Callable[[], Entry]) -> Entry:
        """The recorded decision, or that of ``compute``, recorded with what it warns of."""
        known = self.find(kind, item)
        if known is not None:
            return known
        sentences: list[str] = []
        with warnings_into(sentences):
            entry = compute()
        for sentence in sentences:
            warnings.warn(sentence, stacklevel=2)
        self._record(kind, item, entry, sentences)
        return entry

    def _record(self, kind: str, item: Item, entry: Entry, sentences: list[str]) -> bool:
        key = self.scope, kind, item
        n_bytes = sum(tensor.nbytes for tensor in entry.tensors.values())
        with _told(self.folder):
            if n_bytes and shutil.disk_usage(self.folder).free - n_bytes < self.reserve_bytes:
                warnings.warn(
                    f"the disk of {self.folder} has too little room beside the output for the "
                    "whole record of this run. After an interruption, more is computed again.",
                    stacklevel=3,
                )
                return False
            self.records[key] = write_record(
                self._stem(kind, item), key, self.machine, entry.values, entry.tensors, sentences
            )
        return True

    def _stem(self, kind: str, item: Item) -> Path:
        return self.folder / name_record((self.scope, kind, item))


def name_record(key: tuple[str, str, Item]) -> str:
    """A file name without ending: readable, and of its own."""
    readable = re.sub(r"[^a-z0-9]+", "-", f"{key[1]} {key[2]}".lower())[:60]
    return f"{readable}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}"


def record_folder(output_dir: Path) -> Path:
    """Where a run's record is until the run is complete: beside its output."""
    return folder_beside(output_dir, "progress")


def read_records(folder: Path) -> dict[tuple[str, str, Item], Record]:
    """All records of a folder by key; what a kill tore is removed, and so is what is damaged."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink()
    records = {}
    for path in sorted(folder.glob(f"*{RECORD}")):
        stem = path.with_suffix("")
        record = read_record(stem)
        if record is None or name_record(record.key) != stem.name:
            _warn_of_damage(*stem.name.rsplit("-", 2)[:2])
            remove_record(stem)
        else:
            records[record.key] = record
    return records


def _warn_of_damage(kind: str, item: Item) -> None:
    warnings.warn(f"the record of {kind} {item} was damaged; it is computed again.", stacklevel=3)


@contextmanager
def open_journal(
    folder: Path,
    identity: Mapping[str, Any],
    machine: Mapping[str, Any],
    *,
    overwrite: bool = False,
    reserve_bytes: float = 0,
) -> Iterator[FileJournal]:
    """The journal of the run that ``identity`` describes, for this process alone.

    The folder is made, and removed at the end if nothing was recorded.

    Args:
        folder: where it is.
        identity: what the run depends on, nested mappings of JSON values.
        machine: what this process computes with; other values do not make another run.
        overwrite: replace the journal of another run.
        reserve_bytes: space that the disk must have left behind a record with tensors.

    Raises:
        OutputError: the folder is not ours, belongs to another run or is in use.
    """
    check_claimed(folder, PURPOSE)
    with _locked(folder):
        _claim(folder, identity, overwrite=overwrite)
        journal = FileJournal(folder, machine, reserve_bytes=reserve_bytes)
        try:
            yield journal
        finally:
            if not any(folder.glob(f"*{RECORD}")):
                remove_claimed(folder)


def _claim(folder: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the folder that of ``identity``, or go on in it.

    Raises:
        OutputError: it belongs to another run; names the differing keys.
    """
    mark = folder / RUN_FILE
    known = read_mark(mark)
    different = find_differences(known, identity, strict=True) if known else []
    if different and not overwrite and any(folder.glob(f"*{RECORD}")):
        raise OutputError(
            f"{folder} holds the record of another run: {'; '.join(different)}. Choose another "
            "--output-dir, remove that folder, or pass --overwrite."
        )
    if different or not known:
        # The folder itself stays: it is locked.
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with _told(folder):
            write_whole_text(mark, encode_mark(identity))


def read_mark(mark: Path) -> dict[str, Any]:
    """Whose folder it is; empty where a kill tore that, before anything was recorded."""
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What the system says of a folder that cannot be written to, in our words."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"the disk became full while {folder} was written ({error.strerror}). "
                "Free some space and give the same command: it goes on from what is there."
            ) from error
        raise OutputError(
            f"{folder} cannot be written to ({error}). Make it writable, or choose "
            "another --output-dir."
        ) from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be used: {error.strerror}. Choose another --output-dir."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another run records what it does in {folder}. Wait for it, or choose another "
                "--output-dir."
            ) from None
        yield
    finally:
        os.close(descriptor)
