"""TRL's trainer with a loss on completions alone, and what layercut adds around it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Sampler
from trl import SFTTrainer

from layercut.data.encoding import IGNORED
from layercut.models.view import DecoderView
from layercut.recipe.finetune import DistillConfig
from layercut.training.distillation_loss import attach_gradient, chunk_loss


class CompletionTrainer(SFTTrainer):  # type: ignore[misc]
    """An `SFTTrainer` that projects to the vocabulary only where a label is.

    TRL's own loss scores every position on a CPU. With one label behind a prompt that is a fifth of
    the products of a model of 135M parameters, 28M of which are its head.

    Attributes:
        distill: the weight and temperature of the distillation term, if there is one.
        teacher: the model to distil from.
        choices: tokens that the distributions are restricted to, (n,); ``None``: all.
    """

    distill: DistillConfig | None = None
    teacher: DecoderView | None = None
    choices: Tensor | None = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean loss over the labels of the whole optimiser step, in nats.

        Args:
            model: as prepared by the trainer.
            inputs: ``input_ids``, ``attention_mask`` and ``labels``, (batch, seq) each.
            return_outputs: also return the model's output, whose logits stand at labels only.
            num_items_in_batch: labels in all batches of the step.
        """
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        positions = (labels != IGNORED).any(dim=0).nonzero().squeeze(1)
        labels = labels[:, positions]
        kept = labels != IGNORED
        # Padding stands on the right, where causal attention never looks, and no label is there.
        # Without a mask, attention takes its faster causal path: a tenth of a step on a CPU.
        inputs.pop("attention_mask", None)
        output = model(**inputs, use_cache=False, logits_to_keep=positions)
        logits = output.logits[kept].float()
        loss = functional.cross_entropy(logits, labels[kept], reduction="sum")
        if self.distill is not None and self.teacher is not None:
            with torch.no_grad(), self.teacher.precision():
                dense = self.teacher.model(**inputs, use_cache=False, logits_to_keep=positions)
            pair = logits, dense.logits[kept].float()
            if self.choices is not None:
                pair = pair[0][:, self.choices], pair[1][:, self.choices]
            term = divergence(*pair, self.distill.temperature)
            loss = (1 - self.distill.weight) * loss + self.distill.weight * term
        if num_items_in_batch is None:
            loss = loss / kept.sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:  # the count is over all processes
                loss = loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The argument has lost the column of lengths, which the model does not take.
        lengths = self.train_dataset["length"][:]
        rows = self._train_batch_size * self.args.gradient_accumulation_steps
        rows *= self.accelerator.num_processes
        return SortedSteps(lengths, rows, self.args.seed)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # transformers would take a further step of a run that had ended within an epoch.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)

    def _send_telemetry(self) -> None:
        """Nothing is sent: TRL would tell the Hub about every trainer."""


def divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Summed KL divergence of softened distributions, scaled by the squared temperature.

    Source   arXiv:1503.02531 §2
    Formula  T² Σ_n Σ_v q_nv (log q_nv − log p_nv), q and p the softmax of logits / T

    Args:
        logits: the student's, (n, vocabulary).
        teacher: the teacher's, (n, vocabulary).
        temperature: T.
    """
    no_labels = torch.full((len(logits),), -1, device=logits.device)
    loss, gradient = chunk_loss(logits, teacher, no_labels, temperature, (1.0, 0.0))
    return attach_gradient(logits, loss, gradient)


class SortedSteps(Sampler[int]):
    """A random order of rows, sorted by length within each optimiser step.

    A step's rows are an ordinary random draw; only their batches are of similar length.
    """

    def __init__(self, lengths: Sequence[int], rows_per_step: int, seed: int) -> None:
        """Set what is ordered.

        Args:
            lengths: tokens of every row.
            rows_per_step: rows of one optimiser step, over all processes.
            seed: of the order.
        """
        self.lengths = lengths
        self.rows_per_step = rows_per_step
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # Seeded by the epoch, so that a resumed run sees the rows that were left.
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for step in order.split(self.rows_per_step):
            yield from sorted(step.tolist(), key=lambda row: -self.lengths[row])

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of ``epoch`` next; the trainer calls this."""
        self.epoch = epoch
