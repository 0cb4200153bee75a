"""Apply a plan to a GGUF file: blocks go, quantised tensors stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from layercut import progress
from layercut.checkpoints.gguf.file import MAGIC
from layercut.checkpoints.gguf.layers import GgufLayers, find_layers
from layercut.checkpoints.gguf.model import find_parts, read_language_model
from layercut.checkpoints.gguf.plan import find_warnings, new_names, new_records
from layercut.checkpoints.gguf.writer import GgufContent, verify_gguf, write_gguf
from layercut.checkpoints.output_file import check_file_space, check_output_file, staged_file
from layercut.checkpoints.plan_file import read_plan
from layercut.errors import ModelError, PlanError
from layercut.pipeline.prune_files import fit_plan
from layercut.types import PruningPlan

SUFFIX = ".gguf"


@dataclass(frozen=True, slots=True)
class PrunedGguf:
    """What was written.

    Attributes:
        output: the new file.
        plan: which layers went.
        edited: key → its value before and after, where the value changed.
        n_tensors: tensors that were compared with the source's by sha256.
        n_bytes: size of the new file.
        source_bytes: size of the source's files.
        warnings: what the user should know, in full sentences.
    """

    output: Path
    plan: PruningPlan
    edited: dict[str, tuple[str, str]]
    n_tensors: int
    n_bytes: int
    source_bytes: int
    warnings: tuple[str, ...]


def is_gguf_to_gguf(model: str, output: Path) -> bool:
    """Whether a GGUF file is given and another one is wanted."""
    path = Path(model).expanduser()
    return (
        path.suffix.lower() == output.suffix.lower() == SUFFIX
        and path.exists()
        and not path.is_dir()
    )


def prune_gguf(
    model: str | Path,
    output: str | Path,
    *,
    plan: str | Path | None = None,
    drop: Sequence[int] | None = None,
    overwrite: bool = False,
) -> PrunedGguf:
    """Drop layers of a GGUF file by copying the others; nothing is dequantised.

    Args:
        model: the file, or the first of several parts.
        output: the new file; it appears complete and verified, or not at all.
        plan: a ``plan.json``, perhaps of the original checkpoint of the same model; or
        drop: the layers that go.
        overwrite: replace an earlier output.

    Raises:
        PlanError: the plan is of another model, or its layers cannot be dropped.
        ModelError: the file is damaged, or llama.cpp would run what is left as another model.
        OutputError: the destination cannot be written to.
        ResourceError: the disk is too small.
        VerificationError: the written file differs from what it should be.
    """
    path, output = Path(model).expanduser(), Path(output)
    if (plan is None) == (drop is None):
        raise PlanError("give either a plan or the layers to drop, and not both.")
    file_plan = None if plan is None else read_plan(Path(plan))
    progress.stage("check the file")
    parts = find_parts(read_language_model(path))
    check_output_file(output, [part.path for part in parts], MAGIC, overwrite=overwrite)
    layers = find_layers(parts)
    chosen = fit_plan(str(model), layers.n_layers, file_plan, drop or ())
    for part in parts[1:]:
        if odd := [key for key in part.fields if key not in layers.header and key[:6] != "split."]:
            raise ModelError(
                f"{part.path} holds the key {odd[0]!a}, which the first part lacks. "
                "Use parts that llama-gguf-split wrote."
            )
    names = new_names(layers, chosen)
    content = GgufContent(
        layers.header.version,
        layers.header.alignment,
        new_records(layers, chosen),
        {new: layers.tensors[old] for old, new in names.items()},
    )
    n_bytes = content.nbytes
    check_file_space(output, n_bytes)
    with staged_file(output) as partial:
        progress.stage("write the file")
        write_gguf(partial, content)
        progress.stage("compare it with the source")
        n_tensors = verify_gguf(partial, content)
        written = find_layers([read_language_model(partial)])
        assert written.n_layers == len(chosen.kept)
    return PrunedGguf(
        output=output,
        plan=chosen,
        edited=_edited(layers, written, content),
        n_tensors=n_tensors,
        n_bytes=n_bytes,
        source_bytes=sum(part.path.stat().st_size for part in parts),
        warnings=tuple(find_warnings(layers, chosen)),
    )


def _edited(
    layers: GgufLayers, written: GgufLayers, content: GgufContent
) -> dict[str, tuple[str, str]]:
    """The keys whose values changed, shown briefly."""
    before, after = layers.header.fields, written.header.fields
    return {
        key: (_shown(before[key].decode()), _shown(after[key].decode()))
        for key, record in content.records.items()
        if record != before[key].record
    }


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    return str(value)
