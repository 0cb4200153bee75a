"""Bytes that every stage of a run needs at its peak, from the model's sizes and the recipe.

Resident, all weights are in memory; streamed, two layers and what is outside of them. Rows of one
set past the spool's limit lie in a temporary file. The constants are measured:
docs/results/2026-11-28-estimates.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from layercut import registry
from layercut.models.attention import LONGEST
from layercut.models.view import GPU_LOSS_CHUNK, LOSS_CHUNK
from layercut.pipeline.stage_times import StageTimes
from layercut.spool import MEMORY_LIMIT_BYTES, SLICE

FIXED_BYTES = 62_000_000
"""Of classes, tokenizer and text, whatever the model."""
LOGIT_COPIES = 2.5
"""Float32 copies of a chunk's logits that a loss holds."""
KEPT_WRITES = 2.3
"""Numbers that autograd keeps of a layer, for each that its matrices write."""
NORM_COPIES = 6
"""Float32 copies of the stream that autograd keeps of a layer in a narrower dtype."""
LEFT_BY_STEPS = 2.7
"""Parts of a chunk's logits that gradient steps free and the allocator keeps."""
EAGER_COPIES = 6
"""Attention matrices that autograd keeps of a layer, in the weights' dtype."""


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of one stage.

    Attributes:
        memory: rows, sums and activations in memory.
        spooled: rows in a temporary file.
        tensors: one number or more for every weight that changes: new weights, gradients.
        kept: share of the layers that are there.
    """

    memory: float
    spooled: float = 0.0
    tensors: float = 0.0
    kept: float = 1.0


class StageMemory:
    """Peaks of the stages of one run, resident.

    Args:
        times: the stages, with their sizes.
    """

    def __init__(self, times: StageTimes) -> None:
        self.times, self.shape, self.recipe = times, times.shape, times.recipe
        on_gpu = self.shape.device.type == "cuda"
        n_chunk = GPU_LOSS_CHUNK if on_gpu else LOSS_CHUNK
        narrow = self.shape.item_bytes if self.shape.item_bytes < 4 else 0
        self.logits = (4 * LOGIT_COPIES + narrow) * n_chunk * self.shape.vocabulary
        self.written = sum(e.written for e in self.shape.layers)
        self.widest = max(e.written for e in self.shape.layers)

    def load(self) -> Need:
        """Weights, and the files where these are converted."""
        converted = self.shape.stored_bytes != self.shape.weight_bytes
        return Need(FIXED_BYTES + (self.shape.stored_bytes if converted else 0))

    def evaluate(self, kept: float = 1.0) -> Need:
        """One micro-batch, a chunk of logits, and after a repair its tensors."""
        n_tokens = 2 * self.recipe.evaluation.seq_len
        changed = self.changed_bytes() if kept < 1 else 0.0
        left = self._left_by_steps() if kept < 1 else 0.0
        memory = FIXED_BYTES + self.logits + self._activations(n_tokens) + left
        return Need(memory, tensors=changed, kept=kept)

    def select(self) -> Need:
        """A micro-batch's graph, then the history of all boundaries with one layer's sums."""
        times, width = self.times, self.shape.width
        graph = self._graph(self._pass_tokens()) + self.logits
        if self.recipe.selection.drop is not None:
            return Need(FIXED_BYTES)
        if self.recipe.selection.strategy != "priced-cuts":
            gradient = 4.0 * max(e.n_parameters for e in self.shape.layers)
            whole = 4.0 * self._moved() if self.recipe.scoring.method == "taylor" else 0.0
            return Need(FIXED_BYTES + graph + gradient, tensors=whole)
        fitted, held_out = times.sample_tokens()
        n = fitted + held_out
        boundaries = len(self.shape.layers) + 1
        rows = self._rows(n, width)
        history = Need(boundaries * (rows.memory + 4 * n), boundaries * rows.spooled)
        inner = max(e.down for e in self.shape.layers)
        inputs = self._rows(n, inner)
        sums = self._sums(fitted, held_out, inner) + 4 * n * (inner + 3 * width)
        second = history.memory + rows.memory + inputs.memory + sums
        spooled = history.spooled + rows.spooled + inputs.spooled
        return Need(FIXED_BYTES + max(graph + rows.memory, second), spooled)

    def recover(self) -> Need:
        """Both streams and their fork, one layer's inputs and sums, and the changed tensors."""
        method, times, width = self.recipe.recovery.method, self.times, self.shape.width
        n = times.refit_sequences() * times.seq_len
        rows = self._rows(n, width)
        if method == "none":
            return Need(FIXED_BYTES)
        if method != "refit":
            both = Need(4 * rows.memory, 4 * rows.spooled)
            return Need(FIXED_BYTES + both.memory + 48.0 * width**2, both.spooled)
        options = registry.resolve("recovery", method, self.recipe.recovery.options).options
        held_out = times.count_held_out(options.held_out_every) * times.seq_len
        inner = self.shape.inner
        inputs = self._rows(n, inner)
        fit = self._sums(n - held_out, held_out, inner) + 4 * SLICE * (2 * inner + 4 * width)
        fit += 3 * rows.memory + inputs.memory
        changed = self.refitted_bytes()
        losses = self.logits + self._activations(self._pass_tokens()) + changed
        spooled = 3 * rows.spooled + inputs.spooled
        return Need(FIXED_BYTES + max(fit, losses), spooled, changed)

    def take_steps(self) -> Need:
        """The graph of a micro-batch, gradients, directions, and the weights behind a step."""
        moved = self.times.kept * self._moved()
        item = self.shape.item_bytes
        seq_len = self.times.seq_len
        half = max(1, self.times.count_held_out_by_refit() // 2)
        n_tokens = seq_len * min(self.times.micro_batch, half)
        eager = self.shape.device.type == "cpu" and seq_len <= LONGEST
        scores = EAGER_COPIES * n_tokens * seq_len * self.shape.heads * item if eager else 0
        graph = self._graph(n_tokens) + scores * len(self.shape.layers)
        learning = self.times.kept * graph + 2 * self.logits
        searching = 2 * moved + self.logits + self._activations(n_tokens)
        # The weights reached so far; gradients, or the directions and the weights behind a step.
        return Need(FIXED_BYTES + max(learning, searching), tensors=2 * item * moved)

    def write(self) -> Need:
        """The changed tensors, and where there is room the written model, in float32."""
        memory = FIXED_BYTES + self._left_by_steps()
        return Need(memory, tensors=self.changed_bytes(), kept=self.times.kept)

    def refitted_bytes(self) -> float:
        """Tensors that the closed form changes."""
        method = self.recipe.recovery.method
        options = registry.resolve("recovery", method, self.recipe.recovery.options).options
        middle = self.shape.layers[len(self.shape.layers) // 2]
        inner = middle.down + (middle.output if options.modules == "both" else 0)
        n = self.times.n_refitted(options)
        return float(n * inner * self.shape.width * self.shape.item_bytes)

    def changed_bytes(self) -> float:
        """Tensors that the run changes, held until they are written."""
        if self.recipe.recovery.method != "refit":
            return 0.0
        if self.times.n_steps():
            return self.times.kept * self._moved() * self.shape.item_bytes
        return self.refitted_bytes()

    def _left_by_steps(self) -> float:
        return LEFT_BY_STEPS * self.logits if self.times.n_steps() else 0.0

    def _moved(self) -> float:
        return float(sum(a * b for e in self.shape.layers for a, b in e.matrices))

    def _pass_tokens(self) -> int:
        return self.times.seq_len * min(self.times.micro_batch, self.times.n_sequences)

    def _activations(self, n_tokens: float) -> float:
        """Of a pass without gradients: one layer's."""
        return n_tokens * (1.2 * self.widest + 4 * self.shape.width) * self.shape.item_bytes

    def _graph(self, n_tokens: float) -> float:
        """Of a pass through all layers that a backward pass follows."""
        # Norms of narrower streams keep copies in float32.
        norms = NORM_COPIES * self.shape.width * len(self.shape.layers)
        copies = 4 * norms if self.shape.item_bytes < 4 else 0
        return n_tokens * (KEPT_WRITES * self.written * self.shape.item_bytes + copies)

    def _sums(self, fitted: float, held_out: float, inner: int) -> float:
        """Gram matrix, ridged, factored; right side and solutions; rows of the tokens' side."""
        out, side = self.shape.width, min(fitted, inner)
        rows = (side + min(held_out, inner)) * (inner + out)
        return 8 * side * (6 * side + 6 * out) + 4 * rows

    def _rows(self, n_tokens: float, width: int) -> Need:
        n_bytes = 4.0 * n_tokens * width
        return Need(0.0, n_bytes) if n_bytes > MEMORY_LIMIT_BYTES else Need(n_bytes)
