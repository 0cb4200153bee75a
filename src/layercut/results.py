"""What a run measured: estimates, the stages they belong to, and where they came from."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from layercut import progress
from layercut.types import Median, PruningPlan

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def warnings_into(sentences: list[str]) -> Iterator[None]:
    """Add what the block warns about to ``sentences`` at once, each once; show nothing."""

    def add(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in sentences:
            sentences.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = add
        yield


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured mean with its standard error and the number of items behind it.

    For paired comparisons, ``outcomes`` says of each row of a task whether it is right, and
    ``losses`` tells a perplexity's mean loss in each window, in nats per token.
    """

    value: float
    stderr: float
    n: int
    outcomes: tuple[bool, ...] = field(default=(), repr=False)
    losses: tuple[float, ...] = field(default=(), repr=False)

    def to_json(self, unit: str) -> dict[str, Any]:
        """``{"value", "stderr", unit: n}``; ``unit`` is ``n_tokens``, ``n_rows``, ``n_prompts``."""
        return {"value": self.value, "stderr": self.stderr, unit: self.n}


def estimate_mean(values: Tensor, n: int | None = None) -> Estimate:
    """The mean of independent values and its standard error s / √n; 0 for a single value.

    Args:
        values: float64, (n,), e.g. the mean of each window.
        n: items behind the values where these are means, e.g. tokens.
    """
    error = float(values.std()) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return Estimate(float(values.mean()), error, len(values) if n is None else n)


@dataclass(frozen=True, slots=True)
class TextWindows:
    """How a text was cut, without which its perplexity means little.

    Attributes:
        source: where the text came from.
        n_windows: windows that were used; they do not overlap.
        seq_len: tokens per window.
        detokenized: whether WikiText's or PTB's markers were undone.
        leading_token: what starts every window, as the tokenizer starts every text; ``None`` if it
            adds nothing. It is part of ``seq_len`` and never predicted.
        document_separator: what stands between two documents; ``None``: nothing.
    """

    source: str
    n_windows: int
    seq_len: int
    detokenized: bool
    leading_token: str | None = None
    document_separator: str | None = None


def describe_windows(cut: TextWindows) -> str:
    """How a text was cut, in words."""
    parts = [f"{cut.n_windows} windows of {cut.seq_len:,} tokens"]
    if cut.leading_token:
        parts.append(f"each behind {cut.leading_token}")
    if cut.document_separator:
        parts.append(f"{cut.document_separator} between documents")
    if cut.detokenized:
        parts.append("detokenized")
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One model's predictions beside the dense model's, with standard errors over windows.

    Attributes:
        agreement: share of positions at which both find the same token likeliest.
        kl: KL(dense ‖ this model), in nats per token.
    """

    agreement: Estimate
    kl: Estimate

    def to_json(self) -> dict[str, Any]:
        """``{"agreement": …, "kl": …}``, each with ``value``, ``stderr`` and ``n_tokens``."""
        return {
            "agreement": self.agreement.to_json("n_tokens"),
            "kl": self.kl.to_json("n_tokens"),
        }


@dataclass(frozen=True, slots=True)
class Generation:
    """Greedy continuations and what they look like; errors are over prompts.

    Attributes:
        tokens: the continuations, (n_prompts, new_tokens); ``None`` when read from a file.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens of each continuation.
        distinct: for n = 1, 2, 3: the share of n-grams that are different.
        loop: the share of a continuation that its longest loop takes up.
        common_prefix: tokens before the first that differs from the reference's.
        agreement: share of places with the reference's token; both are ``None`` without one.
        reference: the other model's continuations of the same prompts, where they are at hand.
    """

    tokens: Tensor | None
    prompt_tokens: int
    new_tokens: int
    distinct: tuple[Estimate, Estimate, Estimate]
    loop: Estimate
    common_prefix: Estimate | None = None
    agreement: Estimate | None = None
    reference: Generation | None = None

    def to_json(self) -> dict[str, Any]:
        """Estimates by name, each with ``n_prompts``; those without a reference are absent."""
        estimates = {f"distinct_{n}": share for n, share in enumerate(self.distinct, start=1)}
        estimates["loop"] = self.loop
        if self.common_prefix is not None and self.agreement is not None:
            estimates |= {"common_prefix": self.common_prefix, "agreement": self.agreement}
        content: dict[str, Any] = {k: e.to_json("n_prompts") for k, e in estimates.items()}
        content |= {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens}
        return content | ({"reference": self.reference.to_json()} if self.reference else {})


def harness_name(task: str, metric: str) -> str:
    """What a metric of lm-evaluation-harness is called beside other measures."""
    return f"{task} ({metric})"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One model, measured: the object ``E`` of ``result.json``.

    Attributes:
        n_layers: decoder layers.
        n_parameters: parameters, tied ones counted once.
        perplexity: text name → exp(mean token loss).
        accuracy: task name → fraction right.
        prefill_tokens_per_second: prompt tokens processed per second, median of the rounds.
        decode_tokens_per_second: new tokens generated per second, batch of one, likewise.
        prefill_spread: lowest and highest round without the extreme ones; likewise the next.
        speed_change: ``prefill``, ``decode`` → speed over the dense model's, paired by round.
        weight_bytes: memory of the parameters.
        peak_rss_bytes: peak memory of this process so far, or since this stage's training began.
        train_seconds: wall-clock time of the fine-tuning or heal.
        accuracy_change: task name → change from the dense model, tuned where this one is and it
            was, with the standard error of the paired rows; the harness's by `harness_name`.
        windows: text name → how the text of ``perplexity`` was cut.
        leading_token: what starts every window, every task's prompt and every request of the
            harness, as the tokenizer starts every text; ``None`` if it adds nothing.
        harness: lm-evaluation-harness task → its metrics by the harness's names.
        compared_to: the model that the next two compare with.
        fidelity: text name → agreement with that model's predictions.
        generation: text name → continuations of its first tokens.
        flops_per_token: operations for one token of a forward pass over ``flops_context`` tokens.
        flops_context: tokens of that context.
    """

    n_layers: int
    n_parameters: int
    perplexity: Mapping[str, Estimate] = field(default_factory=dict)
    accuracy: Mapping[str, Estimate] = field(default_factory=dict)
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    peak_rss_bytes: int | None = None
    train_seconds: float | None = None
    accuracy_change: Mapping[str, Estimate] = field(default_factory=dict)
    windows: Mapping[str, TextWindows] = field(default_factory=dict)
    harness: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)
    compared_to: str | None = None
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)
    generation: Mapping[str, Generation] = field(default_factory=dict)
    flops_per_token: int | None = None
    flops_context: int | None = None
    leading_token: str | None = None
    prefill_spread: tuple[float, float] | None = None
    decode_spread: tuple[float, float] | None = None
    speed_change: Mapping[str, Median] = field(default_factory=dict)
    weight_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        """The object ``E`` of ``result.json``; what was not measured is absent."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        content["perplexity"] = {k: f.to_json("n_tokens") for k, f in self.perplexity.items()}
        content["accuracy"] = {k: f.to_json("n_rows") for k, f in self.accuracy.items()}
        later: dict[str, Any] = {
            "accuracy_change": {k: f.to_json("n_rows") for k, f in self.accuracy_change.items()},
            "windows": {k: asdict(cut) for k, cut in self.windows.items()},
            "harness": {
                task: {name: estimate.to_json("n_rows") for name, estimate in metrics.items()}
                for task, metrics in self.harness.items()
            },
            "fidelity": {k: f.to_json() for k, f in self.fidelity.items()},
            "generation": {k: g.to_json() for k, g in self.generation.items()},
            "speed_change": {k: change.to_json() for k, change in self.speed_change.items()},
            **{k: list(content[k] or ()) for k in ("prefill_spread", "decode_spread")},
        }
        content |= {key: value or None for key, value in later.items()}
        known = {key: value for key, value in content.items() if value is not None}
        return known | {"leading_token": self.leading_token}


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result came from: versions, machine, exact command."""

    layercut: str
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]
    command: str


@dataclass(slots=True)
class RunResult:
    """All that a run found out; becomes ``result.json`` and the report.

    Attributes:
        recipe: the resolved recipe.
        stages: ``dense`` and ``pruned``, later also ``healed``, ``dense_tuned`` and
            ``pruned_tuned``.
        seconds: stage → wall-clock seconds.
        recovery: the notes of the weight patch; ``steps`` are lengths of gradient steps,
            ``recorded_steps`` counts those of an early run (schema 1: ``gradient_steps``, both).
        warnings: what the user should know, in full sentences.
        lineage: the plans that made the input model, if layercut pruned it before.
        checks: what the written checkpoint was compared by, where that is less than a reload.
        healing: what the heal took and brought, if there was one.
        estimate: what the run was to take, before it began.
        n_ranks: processes that shared the run.
    """

    model: str
    recipe: Mapping[str, Any]
    provenance: Provenance
    plan: PruningPlan | None = None
    recovery: Mapping[str, Any] = field(default_factory=dict)
    stages: dict[str, Evaluation] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    warnings: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    lineage: list[dict[str, Any]] = field(default_factory=list)
    healing: Mapping[str, Any] = field(default_factory=dict)
    estimate: Mapping[str, Any] = field(default_factory=dict)
    n_ranks: int = 1

    @contextmanager
    def timed(self, key: str, stage: str | None = None) -> Iterator[None]:
        """Announce a stage and add the block's wall-clock seconds to ``seconds[key]``."""
        progress.stage(stage or key)
        start = time.perf_counter()
        yield
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start

    @contextmanager
    def collecting_warnings(self) -> Iterator[None]:
        """Turn what the stages of the block warn about into sentences of the result."""
        with warnings_into(self.warnings):
            yield

    def to_json(self) -> dict[str, Any]:
        """Content of ``result.json``."""
        return {
            "schema": 2,
            "layercut": self.provenance.layercut,
            "model": self.model,
            "recipe": dict(self.recipe),
            "command": self.provenance.command,
            "versions": dict(self.provenance.versions),
            "hardware": dict(self.provenance.hardware),
            "plan": self.plan.to_json() if self.plan else None,
            "recovery": dict(self.recovery),
            **({"heal": dict(self.healing)} if self.healing else {}),
            "stages": {name: stage.to_json() for name, stage in self.stages.items()},
            "seconds": dict(self.seconds),
            **({"estimate": dict(self.estimate)} if self.estimate else {}),
            "peak_rss_bytes": self.peak_rss_bytes,
            **({"ranks": self.n_ranks} if self.n_ranks > 1 else {}),
            "warnings": list(self.warnings),
            **({"checks": list(self.checks)} if self.checks else {}),
            **({"lineage": list(self.lineage)} if self.lineage else {}),
        }
