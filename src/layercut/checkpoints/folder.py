"""The files of a checkpoint's folder: which hold weights, and their JSON."""

from __future__ import annotations

import codecs
import json
import stat
from pathlib import Path
from typing import Any, BinaryIO

from layercut.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MAX_CONFIG_BYTES, MAX_INDEX_BYTES = 16_000_000, 256_000_000
MAX_DEPTH = 100
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "UTF-8",
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
"""In this order: the mark of UTF-32 begins with that of UTF-16."""


def check_plain_file(path: Path) -> None:
    """Refuse what is not a regular file (links to one are fine), before opening could block.

    Raises:
        ModelError: missing, a folder, a pipe, a socket, a device, or a git-lfs pointer.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read ({error.strerror}). Name the folder that holds the whole "
            "checkpoint."
        ) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ModelError(f"{path} is {kind} where a file is meant. Put the file itself there.")
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
        "Name the folder that holds the whole checkpoint."
    )


def read_model_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint's folder.

    Raises:
        ModelError: there is none, as in the folder of an adapter alone, or it is damaged.
    """
    adapter = folder / "adapter_config.json"
    if adapter.exists() and not (folder / "config.json").exists():
        base = read_json_object(adapter).get("base_model_name_or_path") or "its base model"
        raise ModelError(
            f"{folder} holds an adapter without its model (adapter_config.json). Merge it into "
            f'{base} first, like this: python -c "from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained('merged')\", "
            "and copy the tokenizer files into merged."
        )
    return read_json_object(folder / "config.json")


def read_json_object(path: Path, *, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Content of a JSON file that must hold an object.

    Args:
        path: the file.
        max_bytes: no file of its kind is larger.

    Raises:
        ModelError: it cannot be read, is not JSON, or is something else than an object.
    """
    check_plain_file(path)
    size = path.stat().st_size
    if size > max_bytes:
        raise ModelError(
            f"{path} holds {size / 1e6:,.0f} MB, and no such file has more than "
            f"{max_bytes / 1e6:,.0f} MB. Restore the original file."
        )
    with open_file(path) as file:
        raw = file.read()
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if raw.startswith(mark):
            raise ModelError(
                f"{path} starts with the byte order mark of {encoding}, which transformers cannot "
                "read. Save it as UTF-8 without one."
            )
    try:
        content = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 at byte {error.start}. Save it as UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"{path} is not valid JSON ({error}). Correct it, or download it again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} does not hold a JSON object. Restore the original file.")
    if _is_deep(content):
        raise ModelError(
            f"{path} nests values more than {MAX_DEPTH} deep, which no configuration does. "
            "Restore the original file."
        )
    return content


def _is_deep(content: dict[str, Any]) -> bool:
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for part in level
            for child in (part.values() if isinstance(part, dict) else part)
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


def _list_indexed_files(index: Path) -> list[str]:
    weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map. Restore the original file.")
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
            f"{index.name} names {name}, which is missing from {index.parent}. Download that file."
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
