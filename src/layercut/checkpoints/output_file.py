"""A single output file: refused early, built beside its place, renamed into it when complete."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from layercut.checkpoints.output_dir import DISK_FULL, SPARE_SPACE, is_running
from layercut.errors import OutputError, ResourceError


def check_output_file(
    output: Path, sources: Sequence[Path], magic: bytes, *, overwrite: bool
) -> None:
    """Refuse a destination that cannot be written to, before anything is read.

    Args:
        output: the new file.
        sources: files that are read for it.
        magic: how an earlier output begins; nothing else is overwritten.
        overwrite: replace an earlier output.

    Raises:
        OutputError: a folder, a source, there already, not writable, or without a parent.
    """
    if output.is_dir():
        raise OutputError(f"{output} is a folder. Name a file for the pruned model.")
    if output.exists() and any(source.samefile(output) for source in sources):
        raise OutputError(f"{output} is the model itself. Name another file for the pruned one.")
    parent = output.resolve().parent
    if not parent.is_dir():
        raise OutputError(f"the folder {parent} does not exist. Create it, or name another file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"the folder {parent} is not writable. Name a file in another folder.")
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise OutputError(f"{output} exists. Name another file, or pass --overwrite.")
    if not output.is_file() or not _begins_with(output, magic):
        raise OutputError(
            f"{output} is not an earlier output of this kind, so it is not overwritten. "
            "Name another file."
        )


def check_file_space(output: Path, n_bytes: int) -> None:
    """Refuse a disk that could not hold ``n_bytes`` more.

    Raises:
        ResourceError: fewer free bytes than 1.05 times that.
    """
    free = shutil.disk_usage(output.resolve().parent).free
    if free < SPARE_SPACE * n_bytes:
        raise ResourceError(
            f"{output} needs {n_bytes / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB free. "
            "Free some space, or name a file on another disk."
        )


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """The path of a new file that takes the place of ``output`` when the block ends well.

    Whatever ends the block otherwise, Ctrl-C included, removes the new file and leaves the
    destination as it was.

    Raises:
        OutputError: the destination cannot be written.
        ResourceError: the disk became full inside the block.
    """
    target = output.parent.resolve() / output.name
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        _remove_leftovers(target)
        try:
            yield partial
            _sync(partial)
            partial.replace(target)
            _sync(target.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"the disk became full while {output} was written ({error.strerror}); nothing "
                "was left behind. Free some space, or name a file on another disk."
            ) from error
        raise OutputError(
            f"{output} cannot be written ({error}); nothing was left behind. Name another file."
        ) from error


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _remove_leftovers(target: Path) -> None:
    """Clear away what killed runs left beside ``target``."""
    pattern = re.compile(rf"{re.escape(target.name)}\.partial-(\d+)")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is not None and path.is_file() and not is_running(int(match[1])):
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
