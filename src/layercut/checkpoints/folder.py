"""The files of a checkpoint's folder: which hold weights, and their JSON."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

from layercut.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_plain_file(path: Path) -> None:
    """Refuse what is not a regular file (links to one are fine), before opening could block.

    Raises:
        ModelError: missing, a folder, a pipe, a socket, a device, or a git-lfs pointer.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}). Download the checkpoint again."
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ModelError(f"{path} is {kind} where a file is meant. Download the checkpoint again.")
    with open_file(path) as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelError(
                f"{path} is a git-lfs pointer, not the file itself. Run `git lfs pull` there."
            )


def list_weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, sorted by name.

    Raises:
        ModelError: there are none, only pickles, two layouts at once, or the index names files
            that are missing or outside of the folder.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.exists():
        names = _list_indexed_files(index)
        # Some programs write an index for a single file, too.
        if single.exists() and names != [SINGLE_FILE]:
            raise ModelError(
                f"{folder} holds both {SINGLE_FILE} and {INDEX_FILE}, and one of them is stale. "
                "Delete the one that does not belong to this checkpoint."
            )
        return tuple(_find_existing(index, name) for name in names)
    if single.exists():
        return (single,)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder} holds only pickle weights ({pickles[0]}), which can run code when opened. "
            "Use a checkpoint with .safetensors files."
        )
    raise ModelError(
        f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}. "
        "Download the checkpoint again."
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """Content of a JSON file that must hold an object.

    Raises:
        ModelError: it cannot be read, is not JSON, or is something else than an object.
    """
    check_plain_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON ({error}). Download the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object. Download the checkpoint again.")
    return content


def _list_indexed_files(index: Path) -> list[str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map. Download the checkpoint again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if name in {"", ".", ".."} or any(c in name for c in "/\\\0"):
            raise ModelError(
                f"security: {index} names the file {name!r}, which is not a plain name inside the "
                "checkpoint's folder. Do not use this checkpoint."
            )
    return names


def _find_existing(index: Path, name: str) -> Path:
    path = index.parent / name
    if not path.exists():
        raise ModelError(
            f"{index.name} names {name}, which is missing from {index.parent}. "
            "Download the checkpoint again."
        )
    return path


def open_file(path: Path) -> BinaryIO:
    """The file, opened for reading bytes.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}). Check the permissions of the file."
        ) from error
