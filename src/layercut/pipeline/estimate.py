"""What a run will take, before any work: mode, seconds, memory and disk of every stage.

From the sizes in the files' headers, the recipe, and two measurements of about a second together.
Seconds are those of a machine that does nothing else; a text that is shorter than the recipe asks
for takes less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from layercut.checkpoints.layout import Layout
from layercut.checkpoints.output_dir import SPARE_SPACE
from layercut.checkpoints.safetensors_file import StoredTensor
from layercut.machine import Rates, measure_rates
from layercut.pipeline.model_shape import ModelShape, read_shape
from layercut.pipeline.stage_memory import FIXED_BYTES, Need, StageMemory
from layercut.pipeline.stage_times import LENGTHS, RECOVERY, SCORING, SHRINKAGES, StageTimes
from layercut.recipe.recipe import Recipe

Residency = Literal["resident", "streamed"]
WRITE = "write and verify"


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage; ``None``: not estimated.

    Attributes:
        name: of the stage.
        seconds: wall-clock time.
        device_bytes: peak on the GPU; 0 on a CPU.
        host_bytes: peak of this process above its libraries.
        disk_bytes: in temporary files, and of the last stage in the output.
        missing: what has no formula, by name, or an empty string.
    """

    name: str
    seconds: float | None
    device_bytes: int | None
    host_bytes: int | None
    disk_bytes: int | None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """Every stage of a run, for both places that weights can be in.

    Attributes:
        resident: all weights in memory.
        streamed: two layers and what is outside of them; the speed is not measured.
        ranks: processes that share the tokens.
        device: ``cpu`` or ``cuda``.
        rates: what the seconds follow from.
    """

    resident: tuple[StageEstimate, ...]
    streamed: tuple[StageEstimate, ...]
    ranks: int
    device: str
    rates: Rates

    def stages(self, mode: Residency) -> tuple[StageEstimate, ...]:
        """The stages of one mode."""
        return self.resident if mode == "resident" else self.streamed

    def total_seconds(self, mode: Residency) -> float:
        """Of all stages that are estimated."""
        return sum(stage.seconds or 0.0 for stage in self.stages(mode))

    def peak(self, mode: Residency, what: Literal["device", "host", "disk"]) -> int:
        """The largest need of any stage, in bytes."""
        return max(getattr(stage, f"{what}_bytes") or 0 for stage in self.stages(mode))

    def missing(self, mode: Residency) -> tuple[str, ...]:
        """What is not estimated, by name."""
        return tuple(dict.fromkeys(e.missing for e in self.stages(mode) if e.missing))

    def to_json(self, mode: Residency, reason: str) -> dict[str, Any]:
        """The key ``estimate`` of ``result.json`` and of ``inspect --json``."""
        return {
            "residency": mode,
            "reason": reason,
            "ranks": self.ranks,
            "device": self.device,
            "seconds": self.total_seconds(mode),
            "device_bytes": self.peak(mode, "device"),
            "host_bytes": self.peak(mode, "host"),
            "disk_bytes": self.peak(mode, "disk"),
            "stages": [asdict(stage) for stage in self.stages(mode)],
            "rates": asdict(self.rates),
        }


def measure_checkpoint(
    folder: Path,
    layout: Layout,
    stored: Mapping[str, StoredTensor],
    recipe: Recipe,
    device: torch.device,
) -> tuple[ModelShape, Rates]:
    """What an estimate follows from: sizes of a checkpoint, and a second's measurement.

    Args:
        folder: the checkpoint.
        layout: where its layers are.
        stored: its tensors, by name; of their content, the start of one file is read.
        recipe: for its ``dtype``.
        device: where the model will compute.
    """
    shape = read_shape(folder, layout, stored, dtype=recipe.dtype, device=device)
    rates = measure_rates(shape.largest_file, shape.width, shape.inner, shape.product_dtype, device)
    return shape, rates


def estimate_run(
    shape: ModelShape, recipe: Recipe, rates: Rates, host_bytes: int, *, ranks: int = 1
) -> RunEstimate:
    """What every stage of a recipe takes, resident and streamed; reads and measures nothing.

    Args:
        shape: the model's sizes.
        recipe: what is asked for.
        rates: the machine's.
        host_bytes: memory that is free: the written model is loaded beside the other if it fits.
        ranks: processes that share the tokens.
    """
    times = StageTimes(shape, recipe, rates, ranks)
    rows = tuple(_list_rows(times, find_unestimated(shape, recipe)))
    return RunEstimate(
        resident=tuple(_place_resident(shape, row, host_bytes) for row in rows),
        streamed=tuple(_place_streamed(shape, row, rates.read) for row in rows),
        ranks=ranks,
        device=shape.device.type,
        rates=rates,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """A stage, before its weights have a place; ``passes`` times each layer is read, streamed."""

    name: str
    seconds: float | None
    need: Need | None
    passes: float = 0
    speed_seconds: float = 0.0
    missing: str = ""


def _list_rows(times: StageTimes, missing: Mapping[str, str]) -> Iterator[_Row]:
    memory, recipe = StageMemory(times), times.recipe
    n_texts, n_steps = len(recipe.evaluation.text), times.n_steps()

    def row(
        name: str, seconds: Callable[[], float], need: Callable[[], Need], passes: float
    ) -> _Row:
        if name in missing:
            return _Row(name, None, None, missing=missing[name])
        return _Row(name, seconds(), need(), passes)

    yield row("load", times.load, memory.load, 0)
    dense = row("evaluate dense", times.evaluate, memory.evaluate, n_texts)
    yield replace(dense, speed_seconds=times.measure_speed())
    yield row("select", times.select, memory.select, times.count_selection_passes())
    yield row("recover", times.recover, memory.recover, 3 + SHRINKAGES)
    if n_steps:
        passes = n_steps * (3 + LENGTHS)
        yield row("gradient steps", times.take_steps, memory.take_steps, passes)
    kept = times.kept
    pruned = row(
        "evaluate pruned", lambda: times.evaluate(kept), lambda: memory.evaluate(kept), n_texts
    )
    yield replace(pruned, speed_seconds=times.measure_speed(kept))
    yield row("write and verify", times.write, memory.write, 0)
    for name, section in (("heal", recipe.heal), ("fine-tune", recipe.finetune)):
        if section is not None:
            seconds = times.heal() if name == "heal" else None
            yield _Row(name, seconds, None, missing=missing.get(name, ""))


def _place_resident(shape: ModelShape, row: _Row, free: int) -> StageEstimate:
    """With all weights in memory."""
    need = row.need
    if need is None:
        return StageEstimate(row.name, row.seconds, None, None, None, row.missing)
    outside = shape.n_outside * shape.item_bytes
    weights = outside + need.kept * (shape.weight_bytes - outside)
    used = weights + need.memory + need.tensors
    disk = need.spooled
    if row.name == WRITE:
        # Verification loads the written model beside the other, in float32, where it fits.
        whole, few = 4 * shape.n_parameters * need.kept, 8 * shape.largest_layer
        used += whole if whole <= free - used else few + 4 * shape.n_outside
        disk = SPARE_SPACE * shape.stored_bytes
    if shape.device.type == "cpu":
        return StageEstimate(row.name, row.seconds, 0, round(used), round(disk))
    host = FIXED_BYTES + need.tensors + (weights if row.name == "load" else 0)
    return StageEstimate(row.name, row.seconds, round(used - FIXED_BYTES), round(host), round(disk))


def _place_streamed(shape: ModelShape, row: _Row, read: float) -> StageEstimate:
    """With two layers in memory; what each changed weight needs is in temporary files."""
    need = row.need
    if need is None or row.seconds is None:
        return StageEstimate(row.name, row.seconds, None, None, None, row.missing)
    item = 4 if row.name == WRITE else shape.item_bytes
    used = (shape.n_outside + 2 * shape.largest_layer) * item + need.memory
    disk = need.spooled + need.tensors
    if row.name == WRITE:
        disk = SPARE_SPACE * shape.stored_bytes
    seconds = row.seconds - row.speed_seconds + row.passes * shape.stored_bytes / read
    device, host = 0, round(used)
    if shape.device.type != "cpu":
        device, host = round(used - FIXED_BYTES), FIXED_BYTES + 2 * shape.largest_layer * item
    return StageEstimate(row.name, seconds, device, host, round(disk))


def find_unestimated(shape: ModelShape, recipe: Recipe) -> dict[str, str]:
    """Stage → what has no formula, by its name."""
    unknown: dict[str, str] = {}
    section, scoring = recipe.selection, recipe.scoring.method
    known = {*SCORING, "magnitude", "perplexity"}
    if any(layer.active is None for layer in shape.layers):
        why = "how many experts a token passes through is not said"
        return dict.fromkeys(
            ("evaluate dense", "select", "recover", "gradient steps", "evaluate pruned"), why
        )
    if recipe.evaluation.tasks or recipe.evaluation.harness:
        names = ", ".join([*recipe.evaluation.tasks, *recipe.evaluation.harness])
        unknown |= dict.fromkeys(("evaluate dense", "evaluate pruned"), f"tasks: {names}")
    if section.drop is None:
        if section.strategy == "lowest" and scoring not in known:
            unknown["select"] = f"scoring {scoring}"
        elif section.strategy not in ("lowest", "block", "priced-cuts"):
            unknown["select"] = f"strategy {section.strategy}"
    if recipe.recovery.method not in {*RECOVERY, "refit"}:
        unknown["recover"] = f"recovery {recipe.recovery.method}"
        if section.max_perplexity_ratio is not None:
            unknown["select"] = unknown["recover"]
    if recipe.heal is not None and recipe.heal.minutes is None:
        unknown["heal"] = "a heal by steps"
    if recipe.finetune is not None:
        unknown["fine-tune"] = f"fine-tuning by {recipe.finetune.mode}"
    return unknown
