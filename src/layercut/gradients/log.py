"""The gradient factors of early LoRA steps, recorded inside any transformers or TRL trainer.

    log = GradientLog(steps=40)
    trainer.add_callback(log)
    trainer.train()
    scores = log.layer_scores()

Source   arXiv:2601.19503 §3.1; docs/methods.md#early-lora-run
Formula  G_i = ∇B_i · ∇A_i / s², s = alpha/rank (rsLoRA: alpha/√rank)
         F_W = (1/t) Σ_i G_i ⊙ G_i;  s_l = Σ_{W in l} Σ_jk (F_W)_jk
         ∇A (rank, in), ∇B (out, rank): raw gradients at optimiser step i, after clipping
Cost     rank·(in + out) float32 per weight and step, in memory or past a limit in a file
Limits   the first step contributes nothing (B = 0, hence ∇A = 0), and with a warm-up from 0 neither
         does the second; no fp16 loss scaling, no sharded gradients
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from layercut.errors import NumericsError, RecipeError, suggestion
from layercut.gradients.lora_weights import LoraWeight, lora_weights
from layercut.gradients.low_rank import mean_square, squared_norms
from layercut.spool import Spool
from layercut.types import LayerScores

Reduction = Literal["squared", "norm"]


@dataclass(frozen=True, slots=True)
class LoggedWeight:
    """Where one weight's factors stand in a recorded row: ∇A, then ∇B.

    Attributes:
        layer: the layer it belongs to; ``None`` outside of all layers.
        scaling: s; the raw product ∇B·∇A carries s².
        shape_a: (rank, in).
        shape_b: (out, rank).
        start: the first number of ∇A.
    """

    layer: int | None
    scaling: float
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]
    start: int

    @property
    def span_a(self) -> slice:
        """∇A's numbers."""
        return slice(self.start, self.start + math.prod(self.shape_a))

    @property
    def span_b(self) -> slice:
        """∇B's numbers."""
        return slice(self.span_a.stop, self.span_a.stop + math.prod(self.shape_b))


class GradientLog(TrainerCallback):  # type: ignore[misc]
    """Records ∇A and ∇B of every LoRA-wrapped linear weight in the first steps of a run.

    A step is an optimiser step, whatever the gradient accumulation and the number of processes;
    with several, every process records the same, averaged gradients. A further ``train()`` of the
    same trainer starts the record anew.

    Attributes:
        weights: what is recorded, by its name in the base model; empty before training.
        n_steps: steps recorded so far.
        n_layers: layers of the model.
        rows: one per step, ∇A and ∇B of every weight; ``None`` before training.
    """

    def __init__(
        self,
        *,
        steps: int | None = None,
        fraction: float | None = None,
        stop: bool = False,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Set what is recorded.

        Args:
            steps: how many optimiser steps.
            fraction: or which share of the run's steps, rounded up.
            stop: end the training after them; its schedule stays that of the whole run.
            memory_limit_bytes: a larger record goes to a temporary file (default: 1 GiB).

        Raises:
            RecipeError: not exactly one of ``steps`` and ``fraction``, or an impossible value.
        """
        if (steps is None) == (fraction is None):
            raise RecipeError("GradientLog takes either steps or fraction. Give exactly one.")
        if steps is not None and steps < 1:
            raise RecipeError(f"GradientLog: steps is {steps}. Record at least one.")
        if fraction is not None and not 0 < fraction <= 1:
            raise RecipeError(
                f"GradientLog: fraction is {fraction}. Give a number above 0 and at most 1."
            )
        self.steps = steps
        self.fraction = fraction
        self.stop = stop
        self.memory_limit_bytes = memory_limit_bytes
        self.weights: dict[str, LoggedWeight] = {}
        self.n_steps = 0
        self.n_layers = 0
        self.rows: Spool | None = None
        self._trained_state: list[LoraWeight] = []
        self._hooks: list[RemovableHandle] = []
        self._broken: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the LoRA weights and reserve room for the record.

        Raises:
            ModelError: the model has no trainable LoRA weight.
            RecipeError: the run is shorter than the record, has already begun, or its gradients
                cannot be read.
        """
        n_wanted = self._count_wanted(args, state)
        model = kwargs["model"]
        self.n_layers = int(model.config.get_text_config().num_hidden_layers)
        self.n_steps = 0
        self.weights = {}
        self._trained_state = lora_weights(model)
        width = 0
        for weight in self._trained_state:
            shapes = tuple(weight.a.shape), tuple(weight.b.shape)
            logged = LoggedWeight(weight.layer, weight.scaling, *shapes, start=width)
            self.weights[weight.name] = logged
            width = logged.span_b.stop
        self.rows = Spool(n_wanted, width, limit_bytes=self.memory_limit_bytes)
        self._add_hooks()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record one step: gradients are accumulated, averaged and clipped, weights not changed.

        Raises:
            NumericsError: a gradient is missing or not finite.
        """
        assert self.rows is not None
        if self.n_steps == len(self.rows):
            return
        row = self.rows.rows[self.n_steps]
        for weight in self._trained_state:
            logged = self.weights[weight.name]
            row[logged.span_a] = self._gradient(weight, "A", weight.a)
            row[logged.span_b] = self._gradient(weight, "B", weight.b)
        if not bool(row.isfinite().all()):
            self._remove_hooks()
            raise NumericsError(self._not_finite(row))
        self.n_steps += 1
        if self.n_steps == len(self.rows):
            self._remove_hooks()
            control.should_training_stop |= self.stop

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the adapters; the record stays."""
        self._remove_hooks()
        self._trained_state = []

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """The recorded ∇A (steps, rank, in) and ∇B (steps, out, rank) of one weight, float32.

        They are raw: their product carries s².

        Raises:
            RecipeError: nothing is recorded yet, or not for this weight.
        """
        rows = self._read_record()
        if name not in self.weights:
            hint = suggestion(name, self.weights)
            raise RecipeError(
                f"GradientLog has no gradients of '{name}'{hint}. Name a LoRA-wrapped weight."
            )
        logged = self.weights[name]
        a = rows[:, logged.span_a].view(-1, *logged.shape_a)
        b = rows[:, logged.span_b].view(-1, *logged.shape_b)
        return a, b

    def layer_scores(self, reduction: Reduction = "squared") -> LayerScores:
        """One score per layer, higher = keep; ``None`` for a layer without LoRA weights.

        Args:
            reduction: ``squared``: Σ_W (1/t) Σ_i ‖G_i‖²_F, the paper's; ``norm``: Σ_W Σ_i ‖G_i‖_F,
                that of its released code.

        Raises:
            RecipeError: nothing is recorded yet.
            NumericsError: every product is 0, so that no layer can be told from another.
        """
        self._read_record()
        totals: dict[int, float] = {}
        for name, logged in self.weights.items():
            if logged.layer is None:
                continue
            squares = squared_norms(*self.factors(name)) / logged.scaling**4
            value = squares.mean() if reduction == "squared" else squares.sqrt().sum()
            totals[logged.layer] = totals.get(logged.layer, 0.0) + value.item()
        if not any(totals.values()):
            raise NumericsError(
                f"all gradient products of the first {self.n_steps} steps are 0: LoRA's B starts "
                "at 0, and moves only once the learning rate does. Record more steps."
            )
        return LayerScores(
            values=tuple(totals.get(layer) for layer in range(self.n_layers)),
            method="igia",
            options={"steps": self.n_steps, "reduction": reduction},
        )

    def elementwise(self, name: str) -> Tensor:
        """F_W of one weight, (out, in) float32.

        Raises:
            RecipeError: nothing is recorded yet, or not for this weight.
        """
        return mean_square(*self.factors(name)).div_(self.weights[name].scaling ** 4)

    def _count_wanted(self, args: Any, state: Any) -> int:
        if state.global_step:
            raise RecipeError(
                "GradientLog records the first steps of a run, but this run resumes after step "
                f"{state.global_step}. Start the run anew, or leave the callback out."
            )
        if args.fp16:
            raise RecipeError(
                "GradientLog cannot read gradients under fp16 loss scaling, whose first steps "
                "overflow on purpose. Train in bf16 or float32."
            )
        if args.deepspeed or args.fsdp:
            raise RecipeError(
                "GradientLog cannot read gradients that DeepSpeed or FSDP shard. Train with DDP or "
                "in one process."
            )
        n_run: int = state.max_steps
        if self.fraction is not None:
            # 0.07 · 100 is 7.000000000000001 in binary, and would be rounded up to 8.
            return math.ceil(Fraction(str(self.fraction)) * n_run)
        assert self.steps is not None
        if self.steps > n_run:
            raise RecipeError(
                f"GradientLog is to record {self.steps} steps, but the run has only {n_run} "
                "optimiser steps. Lower steps, or train for longer."
            )
        return self.steps

    def _read_record(self) -> Tensor:
        if self.rows is None or self.n_steps == 0:
            raise RecipeError(
                "GradientLog has recorded no step yet. Add it to a trainer and train first."
            )
        return self.rows.rows[: self.n_steps]

    def _add_hooks(self) -> None:
        """Note whose gradient is the first that is not finite: clipping spoils all the others."""
        self._remove_hooks()
        self._broken = None
        for weight in self._trained_state:
            for parameter in (weight.a, weight.b):
                if parameter.requires_grad:
                    note = partial(self._note, weight.name)
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(note))

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _note(self, name: str, parameter: Tensor) -> None:
        gradient = parameter.grad
        if self._broken is None and gradient is not None and not gradient.isfinite().all():
            self._broken = name

    def _gradient(self, weight: LoraWeight, factor: str, parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            raise NumericsError(
                f"LoRA's {factor} of {weight.name} has no gradient at step {self.n_steps + 1}. "
                "Leave weights that the loss does not reach out of target_modules."
            )
        return parameter.grad.flatten()

    def _not_finite(self, row: Tensor) -> str:
        broken = [
            name
            for name, logged in self.weights.items()
            if not row[logged.start : logged.span_b.stop].isfinite().all()
        ]
        one = self._broken or (broken[0] if len(broken) < len(self.weights) else None)
        what = f"the LoRA gradient of {one} is" if one else "the LoRA gradients of all weights are"
        return (
            f"{what} not finite at step {self.n_steps + 1}. Look for broken training text, or "
            "lower the learning rate."
        )
