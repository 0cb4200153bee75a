"""The output folder: refused early, built beside its place, renamed into it when complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from layercut.checkpoints.folder import list_weight_files
from layercut.errors import OutputError, ResourceError

SPARE_SPACE = 1.05
LONGEST_SUFFIX = ".replaced-0000000"
"""Of the folders beside the output while it is written."""
DISK_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def check_output_dir(output_dir: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a destination that cannot be written to, before anything is computed.

    Raises:
        OutputError: a file, not empty, not writable, without a parent, or touching the source.
    """
    check_path(output_dir, "--output-dir")
    target = output_dir.resolve()
    try:
        origin = source.resolve()
    except (OSError, RuntimeError, ValueError):  # no such folder, which loading will say
        origin = source.absolute()
    if target.exists() and not target.is_dir():
        raise OutputError(f"{output_dir} is a file. Choose another --output-dir.")
    if target == origin or origin in target.parents or target in origin.parents:
        raise OutputError(
            f"{output_dir} is, holds or lies in the source model's folder {source}. "
            "Choose an --output-dir apart from it."
        )
    if not target.parent.is_dir():
        raise OutputError(
            f"the folder {target.parent} does not exist. Create it, or choose another --output-dir."
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"the folder {target.parent} is not writable. Choose another --output-dir."
        )
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(
            f"{output_dir} is not empty. Choose another --output-dir, or pass --overwrite."
        )
    if not (target / "layercut").is_dir():
        raise OutputError(
            f"{output_dir} is not an earlier output of layercut, so it is not overwritten. "
            "Choose another --output-dir."
        )


def check_path(path: Path, flag: str) -> None:
    """Refuse what can be no path: a loop of links, or a name that the file system does not take.

    Args:
        path: a file or folder to write; it need not exist.
        flag: what the user names it by.

    Raises:
        OutputError: nothing can be there.
    """
    try:
        for name in (f"{path}{LONGEST_SUFFIX}", path):
            with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                Path(name).resolve().stat()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise OutputError(
            f"{path} cannot be written to ({reason}). Choose another {flag}."
        ) from error


def check_disk_space(view_path: Path, output_dir: Path) -> None:
    """Refuse a disk that could not hold a copy of the source's weights.

    Raises:
        ResourceError: fewer free bytes than 1.05 × the weights of the source.
    """
    needed = SPARE_SPACE * sum(path.stat().st_size for path in list_weight_files(view_path))
    free = shutil.disk_usage(output_dir.resolve().parent).free
    if free < needed:
        raise ResourceError(
            f"{output_dir} needs up to {needed / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB "
            "free. Free some space, or choose an --output-dir on another disk."
        )


@contextmanager
def staged_folder(output_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder beside ``output_dir`` that takes its place when the block ends well.

    Whatever ends the block otherwise, Ctrl-C included, removes the new folder and leaves the
    destination as it was.

    Args:
        output_dir: the destination; its parent exists.
        overwrite: replace what is there.

    Raises:
        OutputError: the destination cannot be made, or has filled meanwhile.
        ResourceError: the disk became full inside the block.
    """
    target = output_dir.resolve()
    partial = _sibling(target, "partial")
    try:
        _remove_leftovers(target)
        try:
            partial.mkdir()
            yield partial
            _sync(partial)
            _put_in_place(partial, target, overwrite=overwrite)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise ResourceError(
                f"the disk became full while {output_dir} was written ({error.strerror}); nothing "
                "of it was left behind. Free some space, or choose an --output-dir on another disk."
            ) from error
        raise OutputError(
            f"{output_dir} cannot be written ({error}); nothing of it was left behind. "
            "Choose another --output-dir."
        ) from error


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{kind}-{os.getpid()}")


def _remove_leftovers(target: Path) -> None:
    """Clear away what killed runs left beside ``target``."""
    pattern = re.compile(rf"{re.escape(target.name)}\.(partial|replaced)-(\d+)")
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match is None or is_running(int(match.group(2))):
            continue
        if match.group(1) == "replaced" and not target.exists():
            path.rename(target)  # killed between the two renames: the old output is the output
        else:
            shutil.rmtree(path, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether another process has that number."""
    if pid == os.getpid():
        return False  # a leftover of a process that had our number
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    old = _sibling(target, "replaced")
    try:
        if overwrite and target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
