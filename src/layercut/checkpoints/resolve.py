"""A model's name → the local folder that holds it; downloaded from the Hub if need be."""

from __future__ import annotations

import errno
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HFValidationError,
    HTTPError,  # the transport's base class, which the Hub's errors do not re-export
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from layercut.checkpoints import embedded_model
from layercut.checkpoints.gguf.checkpoint import checkpoint_folder as convert_gguf
from layercut.checkpoints.hf_calls import guard
from layercut.checkpoints.preflight import COPIED
from layercut.errors import ModelError, NetworkError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


HUB_FILES = ["*.json", "*.safetensors", "*.txt", *COPIED]


def find_folder(model: str, revision: str | None) -> Path:
    """The folder of a model that is packaged, local or on the Hub; downloads it if need be.

    Raises:
        ModelError: it is none of these.
        NetworkError: the Hub is needed and does not give the model.
    """
    if model.startswith("embedded:"):
        if model != embedded_model.NAME:
            raise ModelError(
                f"there is no '{model}': the embedded model is '{embedded_model.NAME}'."
            )
        return embedded_model.checkpoint_folder()
    path = _check_path(model)
    if path is not None and path.is_dir():
        return path.resolve()
    if path is not None:
        if path.suffix.lower() == ".gguf":
            return convert_gguf(path.resolve())
        raise ModelError(
            f"{model} is neither a folder nor a .gguf file. Name the folder that holds config.json."
        )
    if not HUB_NAME.fullmatch(model) or ".." in model:
        raise ModelError(
            f"'{model}' is neither an existing folder nor a Hub name like owner/name. "
            f"Give one of these, or {embedded_model.NAME}."
        )
    return _download(model, revision)


def _check_path(model: str) -> Path | None:
    """The file or folder that a model's name is a path of; ``None`` if there is none.

    Raises:
        ModelError: it cannot be looked at, or libraries could not open what is in it.
    """
    try:
        path = Path(model).expanduser()
        path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise ModelError(
            f"{model} cannot be read ({error.strerror}). Name the folder that holds config.json."
        ) from error
    except (ValueError, RuntimeError):  # a null character, or ~ of a user that is not known
        return None
    try:
        str(path.resolve()).encode()
    except UnicodeEncodeError as error:
        raise ModelError(
            f"{model} has a name that is not UTF-8, by which transformers cannot open its files. "
            "Rename it."
        ) from error
    return path if model else None


def _download(model: str, revision: str | None) -> Path:
    """The model's files at one commit, whose hash is the folder's name."""
    where = f"{model} at revision {revision}" if revision else model
    with guard(f"{where} cannot be fetched from the Hub", NetworkError, "Name a local folder."):
        return _fetch(model, revision, where)


def _fetch(model: str, revision: str | None, where: str) -> Path:
    """As `_download`, with a message of its own for each way in which the Hub refuses."""
    try:
        # The Hub resolves the revision to a commit once, before the first file.
        folder = snapshot_download(
            model,
            revision=revision,
            allow_patterns=HUB_FILES,
            ignore_patterns="*/*.safetensors",
        )
    except HFValidationError as error:
        raise ModelError(f"'{model}' is not a valid Hub name. Write it as owner/name.") from error
    except GatedRepoError as error:
        raise NetworkError(
            f"{model} is gated. Accept its terms on the Hub and run `hf auth login`."
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise NetworkError(
            f"the Hub has no {where}, or your login may not see it, and there is no such local "
            "folder. Check the name, or run `hf auth login`."
        ) from error
    except (OSError, HTTPError, RevisionResolutionError) as error:
        raise NetworkError(
            f"{where} is neither a local folder nor completely in the cache, and the Hub cannot "
            f"be reached ({type(error).__name__}). Connect to the network or name a local folder."
        ) from error
    return Path(folder)
