"""How long a run may take → how much text and how many gradient steps it gets, before any work.

The largest rung of `RUNGS` whose estimate fits is taken. What the recipe sets itself stays. The
recipe that comes out holds counts alone, so that it gives the same result on any machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from layercut import progress
from layercut.checkpoints.claimed_folder import RUN_FILE
from layercut.engine.file_journal import read_mark, record_folder
from layercut.errors import RecipeError
from layercut.machine import Rates, available_memory_bytes
from layercut.models.ranks import ALONE, Ranks
from layercut.pipeline.estimate import RunEstimate, estimate_run
from layercut.pipeline.model_shape import ModelShape
from layercut.recipe.recipe import EFFORT_MINUTES, Recipe

STEPS, SHARE = "gradient_steps", "step_share"
SEQUENCES_PER_STEP = 4


class Rung(NamedTuple):
    """Tokens that the closed form uses; gradient steps; tokens that these alone learn from."""

    fitted: int
    steps: int
    learned: int

    def __str__(self) -> str:
        text = f"{self.fitted + self.learned:,} tokens, {self.steps} gradient steps"
        return f"{text} on {self.learned:,} of them" if self.learned else text


RUNGS = (
    Rung(4096, 0, 0),
    Rung(8192, 2, 0),
    Rung(16384, 2, 0),
    Rung(32768, 2, 0),
    Rung(49152, 2, 0),
    Rung(65536, 4, 16384),
    Rung(98304, 4, 32768),
    Rung(131072, 4, 65536),
    Rung(131072, 8, 131072),
    Rung(196608, 12, 196608),
    Rung(262144, 16, 262144),
)
"""Rising cost: docs/results/2026-11-28-effort.md."""


def settle_effort(
    recipe: Recipe, shape: ModelShape, rates: Rates, output_dir: Path, ranks: Ranks
) -> Recipe:
    """The recipe with counts in the place of ``effort`` and ``minutes``; itself if it has neither.

    A run that goes on has the counts that it began with.

    Args:
        recipe: what is asked for.
        shape: the model's sizes.
        rates: the machine's.
        output_dir: beside it lies the record of an interrupted run.
        ranks: the processes that share the run; rank 0 chooses.

    Raises:
        RecipeError: the least that can be done takes longer than the minutes that were named.
    """
    minutes = recipe.minutes
    if minutes is None and recipe.effort is not None:
        minutes = EFFORT_MINUTES[recipe.effort]
    if minutes is None:
        return recipe
    candidates = [(rung, apply_rung(recipe, rung)) for rung in RUNGS]
    begun = read_mark(record_folder(output_dir) / RUN_FILE).get("recipe") or {}
    place = torch.zeros(1, dtype=torch.int64)
    for i, (_, candidate) in enumerate(candidates):
        if candidate.model_dump(mode="json", include=set(begun)) == begun and begun:
            place[0] = i
            break
    else:
        place[0] = _find_largest(candidates, shape, rates, minutes, ranks)
    ranks.broadcast_(place)
    _, chosen = candidates[max(0, int(place))]
    if place < 0:
        least = _minutes(_estimate(chosen, shape, rates, ranks))
        if recipe.minutes is not None:
            raise RecipeError(
                f"{minutes:g} minutes are too few: the least run of this model takes about "
                f"{least:.1f} minutes here. Allow at least {least * 1.1:.1f}."
            )
        progress.line(
            f"effort: {_tell(chosen)}, the least there is: about {least:.1f} minutes here"
        )
    else:
        progress.line(f"effort: {_tell(chosen)}, for at most {minutes:g} minutes")
    return chosen


def _tell(recipe: Recipe) -> str:
    """The amounts of a settled recipe."""
    n_tokens = recipe.calibration.n_sequences * recipe.calibration.seq_len
    text, options = f"{n_tokens:,} tokens", recipe.recovery.options
    if STEPS in options:
        text += f", {options[STEPS]} gradient steps"
    if share := options.get(SHARE):
        text += f" on {share:.0%} of them"
    return text


def describe_efforts(shape: ModelShape, rates: Rates) -> dict[str, str]:
    """What each effort stands for on this machine, with the default recipe: name → a sentence.

    Args:
        shape: the model's sizes.
        rates: the machine's.
    """
    recipe = Recipe(model="default")
    candidates = [(rung, apply_rung(recipe, rung)) for rung in RUNGS]
    told = {}
    for name, minutes in EFFORT_MINUTES.items():
        place = max(0, _find_largest(candidates, shape, rates, minutes, ALONE))
        rung, chosen = candidates[place]
        needed = _minutes(_estimate(chosen, shape, rates, ALONE))
        told[name] = f"{rung}: about {needed:.1f} minutes of {minutes:g}"
    return told


def apply_rung(recipe: Recipe, rung: Rung) -> Recipe:
    """The recipe with a rung's counts where it sets none itself, and no effort."""
    section, recovery = recipe.calibration, recipe.recovery
    refits = recovery.method == "refit"
    n_steps = recovery.options.get(STEPS, rung.steps)
    if "n_sequences" in section.model_fields_set and STEPS not in recovery.options:
        # Of text that is not the rung's, every step has its four sequences, or held-out ones.
        spare = section.n_sequences * rung.learned // (rung.fitted + rung.learned)
        n_steps = min(n_steps, max(2, spare // SEQUENCES_PER_STEP))
        rung = rung if n_steps > 2 else rung._replace(learned=0)
    learned = rung.learned if refits and n_steps and SHARE not in recovery.options else 0
    total = rung.fitted + learned
    update: dict[str, Any] = {"effort": None, "minutes": None}
    if "n_sequences" not in section.model_fields_set:
        n_sequences = max(2, round(total / section.seq_len))
        update["calibration"] = section.model_copy(update={"n_sequences": n_sequences})
    if refits:
        share = {SHARE: round(learned / total, 4)} if learned else {}
        options = {STEPS: n_steps, **share, **recovery.options}
        update["recovery"] = recovery.model_copy(update={"options": options})
    return recipe.model_copy(update=update)


def _find_largest(
    candidates: list[tuple[Rung, Recipe]],
    shape: ModelShape,
    rates: Rates,
    minutes: float,
    ranks: Ranks,
) -> int:
    """The last candidate that fits; −1 if none does."""
    fitting = (
        i
        for i, (_, candidate) in enumerate(candidates)
        if _minutes(_estimate(candidate, shape, rates, ranks)) <= minutes
    )
    return max(fitting, default=-1)


def _estimate(recipe: Recipe, shape: ModelShape, rates: Rates, ranks: Ranks) -> RunEstimate:
    return estimate_run(shape, recipe, rates, available_memory_bytes(), ranks=ranks.world)


def _minutes(estimate: RunEstimate) -> float:
    return estimate.total_seconds("resident") / 60
