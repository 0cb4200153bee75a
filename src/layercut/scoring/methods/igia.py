"""Layer importance from early LoRA gradients (GradPruner's IGIA).

Source   arXiv:2601.19503 §3.1; rank, alpha, rate, decay and warm-up from the released code
Formula  s_l = Σ_W Σ_jk (1/t) Σ_i (G_i ⊙ G_i)_jk = Σ_W (1/t) Σ_i tr((∇B_iᵀ∇B_i)(∇A_i∇A_iᵀ)) / s⁴
         reduction norm, the released code's: s_l = Σ_W Σ_i ‖G_i‖_F
         G_i = ∇B_i·∇A_i / s² (out, in); ∇A (rank, in), ∇B (out, rank): raw gradients at optimiser
         step i, after clipping; s = alpha/rank
Meaning  higher = keep; comparable only within one run
Cost     t optimiser steps of LoRA; rank·(in + out) floats kept per weight and step
Limits   the first two steps contribute nothing (B = 0, then a learning rate of 0); without task
         data the calibration text is learnt instead
"""

from __future__ import annotations

from dataclasses import replace

from pydantic import Field

from layercut.gradients.log import Reduction
from layercut.models.view import DecoderView
from layercut.registry import Method
from layercut.training.early_steps import EarlyRunOptions, check_early_run, record
from layercut.types import CalibrationBatches, LayerScores


class Options(EarlyRunOptions):
    """The early run, and how its gradients become one number per layer."""

    reduction: Reduction = Field(
        default="squared", description="squared: Σ‖G‖²_F / t, the paper's; norm: Σ‖G‖_F"
    )


METHOD = Method(
    needs_tasks=True,
    streams=False,
    several_ranks=False,
    check=lambda view, batches, options, n_drop: check_early_run(view, batches, options),
)


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """Begin a LoRA run, take its gradients and undo it."""
    log = record(view, batches, options)
    return replace(log.layer_scores(options.reduction), gradient_log=log)
