"""Seconds of every stage of a run, from the model's sizes, the recipe and the machine's rates.

What has no formula here is named as such in an estimate; nothing is guessed for it. Which layers go
is not known yet: without ``selection.drop`` they are taken to lie from the middle on.
"""

from __future__ import annotations

import math
import os

from layercut import registry
from layercut.data.calibration import MICRO_BATCH_TOKENS, POOL
from layercut.evaluation.speed import N_ROUNDS, NEW_TOKENS, PROMPT_TOKENS
from layercut.machine import Rates
from layercut.models.load import HASHED_AT_ONCE
from layercut.pipeline.model_shape import ModelShape
from layercut.pipeline.pass_costs import CALL_SECONDS, PassCosts
from layercut.recipe.recipe import Recipe
from layercut.recipe.selection import DEFAULT_DROP_LAYERS, SelectionConfig
from layercut.selection.bounds import most_droppable
from layercut.selection.cut_prices import HELD_OUT_EVERY
from layercut.selection.methods.priced_cuts import (
    LONGEST_CUT,
    PLANS_TRIED,
    SAMPLE_SHARE,
    SAMPLE_TOKENS,
)

FIXED_SECONDS = 1.5
"""Of a load: classes, tokenizer and checks of the configuration; of a save, its checks."""
TOKENS_PER_SECOND = 4e5
"""That a tokenizer makes of text."""
STATES_BACKWARD = 1.4
"""A backward pass through activations alone, against the forward pass."""
WEIGHTS_BACKWARD = 2.4
"""One that makes weight gradients as well."""
SHRINKAGES = 5
"""Passes that choose a refit's shrinkage, the one without it among them."""
LENGTHS = 5
"""Passes that find the length of a gradient step."""
LAYERS_PER_CUT = 3
"""On average: a tried plan refits one layer for each cut."""
SCORING = {
    # name: forward passes, of these with a head, backward passes by activations, and by weights
    "random": (0, 0, 0, 0),
    "reverse-order": (0, 0, 0, 0),
    "block-influence": (1, 0, 0, 0),
    "residual-sensitivity": (1, 1, 1, 0),
    "gradmap": (1, 1, 0, 1),
    "taylor": (1, 1, 0, 1),
}
"""What the scores take whose cost is that of passes over the calibration text."""
RECOVERY = {"none": 0, "projection": 2, "linear-map": 2, "magnitude-rescale": 1}
"""Forward passes without a head of the recoveries that take little else; `refit` has a formula."""


class StageTimes:
    """Seconds of the stages of one run.

    Args:
        shape: the model's sizes.
        recipe: what is asked for.
        rates: the machine's.
        ranks: processes that share the tokens.
    """

    def __init__(self, shape: ModelShape, recipe: Recipe, rates: Rates, ranks: int) -> None:
        self.shape, self.recipe, self.rates = shape, recipe, rates
        self.seq_len, self.n_sequences = recipe.calibration.seq_len, recipe.calibration.n_sequences
        self.n_tokens = self.n_sequences * self.seq_len
        self.micro_batch = resolve_micro_batch(recipe)
        self.passes = PassCosts(shape, rates, ranks, self.micro_batch * self.seq_len)
        n_layers = len(shape.layers)
        self.n_drop = count_dropped(recipe.selection, n_layers)
        self.kept = 1 - self.n_drop / n_layers
        self.first = find_first_refitted(recipe.selection, n_layers)

    def load(self) -> float:
        """Hash, read, check, and draw the calibration text."""
        shape, rates = self.shape, self.rates
        at_once = min(HASHED_AT_ONCE, shape.n_files, os.cpu_count() or 1)
        n_text = POOL * self.n_tokens + (self.recipe.heal.max_tokens if self.recipe.heal else 0)
        seconds = FIXED_SECONDS + shape.stored_bytes * (1 / rates.hash / at_once + 1 / rates.read)
        return seconds + 2 * shape.weight_bytes / rates.memory + n_text / TOKENS_PER_SECOND

    def evaluate(self, kept: float = 1.0) -> float:
        """Every text, then the speed; ``kept`` is the share of layers that are there."""
        section = self.recipe.evaluation
        text = self.passes.run_model(section.max_tokens, section.seq_len, kept=kept)
        return len(section.text) * text + self.measure_speed(kept)

    def measure_speed(self, kept: float = 1.0) -> float:
        """Prompts and tokens one by one; these read all weights each time."""
        passes = self.passes
        prompt = kept * passes.run_layers(PROMPT_TOKENS, PROMPT_TOKENS)
        outside = self.shape.n_outside * self.shape.item_bytes
        read = kept * (self.shape.weight_bytes - outside) + outside
        step = read / self.rates.memory + kept * len(self.shape.layers) * CALL_SECONDS
        seconds: float = (1 + N_ROUNDS) * (prompt + NEW_TOKENS * step)
        return seconds

    def count_selection_passes(self) -> float:
        """How often a selection goes through all layers."""
        section = self.recipe.selection
        if section.drop is not None:
            return 0
        if section.strategy == "priced-cuts":
            return 4 + PLANS_TRIED * (1 - self.first / len(self.shape.layers))
        return 2 * (self.n_drop if section.rounds == "each" else 1)

    def select(self) -> float:
        """Scores and plan; with a perplexity limit, the recovery of every size tried as well."""
        section = self.recipe.selection
        if section.drop is not None:
            return 0.0
        if section.strategy == "priced-cuts":
            once, each = self._price(), self._try_plans()
        elif section.strategy == "block":
            once, each = self.passes.run_layers(self.n_tokens, self.seq_len), 0.0
        elif section.rounds == "each":
            # A round passes over what the earlier ones dropped.
            once, each = 0.0, self.n_drop * (1 + self.kept) / 2 * self._score()
        else:
            once, each = self._score(), 0.0
        if section.max_perplexity_ratio is None:
            return once + each
        n_sizes = math.ceil(math.log2(1 + most_droppable(len(self.shape.layers), 1)))
        return once + n_sizes * (each + self.recover() + self.take_steps())

    def _score(self) -> float:
        n, passes, name = self.n_tokens, self.passes, self.recipe.scoring.method
        layers, head = passes.run_layers(n, self.seq_len), passes.run_head(n)
        if name == "magnitude":
            return self.shape.weight_bytes / self.rates.memory
        if name == "perplexity":
            return len(self.shape.layers) * ((1 + self.kept) / 2 * layers / 2 + head)
        forward, with_head, states, weights = SCORING[name]
        # Several micro-batches of one gradient group run forward once more.
        again = weights and self.recipe.calibration.gradient_batch > self.micro_batch
        through = forward + again + STATES_BACKWARD * states + WEIGHTS_BACKWARD * weights
        return through * layers + with_head * (1 + STATES_BACKWARD) * head

    def sample_tokens(self) -> tuple[float, float]:
        """Tokens that cuts are priced on: those fitted, and those held out."""
        least, most = SAMPLE_TOKENS
        wanted = min(max(least, SAMPLE_SHARE * self.n_tokens), most) / self.seq_len
        n = min(self.n_sequences, max(HELD_OUT_EVERY, round(wanted)))
        n_held_out = max(1, n // HELD_OUT_EVERY)
        return (n - n_held_out) * self.seq_len, n_held_out * self.seq_len

    def _price(self) -> float:
        fitted, held_out = self.sample_tokens()
        n, passes, n_layers = fitted + held_out, self.passes, len(self.shape.layers)
        layers, head = passes.run_layers(n, self.seq_len), passes.run_head(n)
        starts = sum(
            passes.price_start(
                fitted,
                held_out,
                self.shape.layers[start - 1].down,
                min(LONGEST_CUT, n_layers - start),
            )
            for start in range(1, n_layers)
        )
        # Forward, backward, forward for the history, and once more for the recorded inputs.
        return (3 + STATES_BACKWARD) * layers + (1 + STATES_BACKWARD) * head + starts

    def _try_plans(self) -> float:
        """Refit at the cuts, all tokens up to the last one, the held-out ones to the end."""
        fitted, held_out = self.sample_tokens()
        passes, n_layers = self.passes, len(self.shape.layers)
        layers = passes.run_layers(fitted + held_out, self.seq_len)
        share = held_out / (fitted + held_out)
        n_cuts = max(1, round(self.n_drop / LAYERS_PER_CUT))
        middle = self.shape.layers[n_layers // 2].down
        fits = n_cuts * passes.fit_ridge(fitted, held_out, middle)
        walk = (1 - self.first / n_layers) * self.kept * layers
        return PLANS_TRIED * (fits + walk * (1 + share) / 2 + passes.run_head(held_out))

    def recover(self) -> float:
        """The repair of the kept layers, gradient steps excepted."""
        name = self.recipe.recovery.method
        n_tokens = self.refit_sequences() * self.seq_len
        layers = self.passes.run_layers(n_tokens, self.seq_len)
        if name != "refit":
            return RECOVERY[name] * layers
        options = registry.resolve("recovery", name, self.recipe.recovery.options).options
        held_out = self.count_held_out(options.held_out_every) * self.seq_len
        fitted = n_tokens - held_out
        behind = self.shape.layers[self.first :]
        share = self.n_refitted(options) / len(behind)
        widths = [e.down for e in behind]
        if options.modules == "both":
            widths += [e.output for e in behind]
        fits = share * sum(self.passes.fit_ridge(fitted, held_out, w) for w in widths if w)
        pruned = self.passes.run_layers(n_tokens, self.seq_len, first=self.first)
        walks = layers + self.kept * pruned * (2 if options.modules == "both" else 1)
        losses = SHRINKAGES * self.passes.run_model(held_out, self.seq_len, kept=self.kept)
        return fits + walks + losses

    def n_refitted(self, options: object) -> int:
        """Kept layers that a refit changes."""
        if getattr(options, "layers", "following") == "cuts":
            return max(1, round(self.n_drop / LAYERS_PER_CUT))
        return max(1, len(self.shape.layers) - self.first - self.n_drop)

    def count_held_out(self, every: int) -> int:
        """Sequences that a refit does not fit to."""
        n = self.refit_sequences()
        return max(1, n // min(every, n))

    def refit_sequences(self) -> int:
        """Sequences that the closed form of a recovery uses: all but those of the steps alone."""
        return max(1, self.n_sequences - self.step_sequences())

    def step_sequences(self) -> int:
        """Sequences that gradient steps alone learn from."""
        if self.recipe.recovery.method != "refit":
            return 0
        options = registry.resolve("recovery", "refit", self.recipe.recovery.options).options
        return int(self.n_sequences * options.step_share) if options.gradient_steps else 0

    def n_steps(self) -> int:
        """Gradient steps of the recovery."""
        if self.recipe.recovery.method != "refit":
            return 0
        options = registry.resolve("recovery", "refit", self.recipe.recovery.options).options
        return 0 if self.count_held_out_by_refit() < 2 else int(options.gradient_steps)

    def count_held_out_by_refit(self) -> int:
        """Sequences that gradient steps take; each half of them teaches every second step."""
        options = registry.resolve("recovery", "refit", self.recipe.recovery.options).options
        return self.count_held_out(options.held_out_every)

    def take_steps(self) -> float:
        """The gradient steps of a refit."""
        n_steps = self.n_steps()
        if not n_steps:
            return 0.0
        passes, shape, seq_len = self.passes, self.shape, self.seq_len
        held_out = self.count_held_out_by_refit() * seq_len
        half = held_out / 2
        learned = self.step_sequences() * seq_len / n_steps or half
        layers, head = passes.run_layers(learned, seq_len), passes.run_head(learned)
        gradients = (1 + self.kept * (1 + WEIGHTS_BACKWARD)) * layers
        gradients += (2 + STATES_BACKWARD) * head
        directions = self.kept * sum(
            passes.orthogonalize(matrix) for e in shape.layers for matrix in e.matrices
        )
        moved = self.kept * sum(a * b for e in shape.layers for a, b in e.matrices)
        losses = passes.run_model(half, seq_len, kept=self.kept) + 4 * moved / self.rates.elements
        last = passes.run_model(held_out, seq_len, kept=self.kept)
        return n_steps * (gradients + directions + LENGTHS * losses) + last

    def write(self) -> float:
        """Copy what is kept, load it again, and compare; float32 decoding included."""
        shape, rates = self.shape, self.rates
        stored = self.kept * shape.stored_bytes
        loaded = self.kept * shape.weight_bytes
        copies = stored * (3 / rates.read) + 3 * (loaded + 4 * shape.n_parameters) / rates.memory
        checks = 20 * self.kept * len(shape.layers) * CALL_SECONDS
        return FIXED_SECONDS + copies + checks + 12 * 4 * shape.n_parameters / rates.memory

    def heal(self) -> float | None:
        """Its budget, where the recipe gives one in minutes."""
        section = self.recipe.heal
        return None if section is None or section.minutes is None else 60 * section.minutes


def resolve_micro_batch(recipe: Recipe) -> int:
    """Sequences in memory at once, as `calibration_batches` chooses them."""
    section = recipe.calibration
    fitting = max(1, min(section.gradient_batch, MICRO_BATCH_TOKENS // section.seq_len))
    return fitting if section.micro_batch == "auto" else section.micro_batch


def count_dropped(section: SelectionConfig, n_layers: int) -> int:
    """Layers that go; of a limit on perplexity or memory, the default's."""
    if section.drop is not None:
        wanted = len(section.drop)
    elif section.drop_fraction is not None:
        wanted = round(section.drop_fraction * n_layers)
    elif section.drop_parameters is not None:
        wanted = math.ceil(section.drop_parameters * n_layers)
    else:
        wanted = section.drop_layers or DEFAULT_DROP_LAYERS
    return max(0, min(wanted, most_droppable(n_layers, 1)))


def find_first_refitted(section: SelectionConfig, n_layers: int) -> int:
    """The layer before the first cut; the middle where the cuts are not known yet."""
    return max(0, (min(section.drop) if section.drop else n_layers // 2) - 1)
