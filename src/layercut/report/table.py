"""Dense against pruned as a table of text cells, for the report and the model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layercut.results import Estimate, Evaluation, RunResult, describe_windows, harness_name

if TYPE_CHECKING:
    from layercut.results import Generation
    from layercut.types import Median

STAGE_TITLES = {
    "dense": "Dense",
    "pruned": "Pruned",
    "healed": "Healed",
    "dense_tuned": "Dense, tuned",
    "pruned_tuned": "Pruned, tuned",
}
TUNED_TITLES = {"dense": "Before", "dense_tuned": "Tuned"}
"""Of a model that was tuned and not pruned."""
MISSING = "–"
ACCURACY = "Accuracy, "
ZERO_SHOT = "Zero-shot, "
SPEEDS = {"prefill": "Prefill, tokens per second", "decode": "Decoding, tokens per second"}
NOISY = (
    "The timing was too noisy to tell how the speed changed ({which}): compare the weights and the "
    "FLOPs instead."
)


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity.

    Attributes:
        label: what was measured.
        cells: one per stage that ran, in the order of ``columns``; ``MISSING`` where it was not
            measured.
        change: the last stage relative to the dense model, tuned alike if it was; empty if one of
            them did not measure it.
    """

    label: str
    cells: tuple[str, ...]
    change: str


@dataclass(frozen=True, slots=True)
class _Measure:
    """A value, how it is shown, and how the pruned one is compared with the dense one."""

    value: float
    text: str
    compare: Callable[[float, float], str]


def columns(result: RunResult) -> tuple[str, ...]:
    """Titles of the stages that ran, dense first."""
    return tuple(titles(result).values())


def titles(result: RunResult) -> dict[str, str]:
    """Stage → title of its column, for the stages that ran, dense first."""
    known = TUNED_TITLES if set(result.stages) == set(TUNED_TITLES) else STAGE_TITLES
    return {name: title for name, title in known.items() if name in result.stages}


def change_compares(result: RunResult) -> str:
    """Which columns "Change" compares: ``“Pruned” with “Dense”``."""
    known = titles(result)
    before, after = (known.get(name, STAGE_TITLES[name]) for name in compared_stages(result))
    return f"“{after}” with “{before}”"


def rows(result: RunResult) -> tuple[Row, ...]:
    """Every quantity that at least one stage measured."""
    stages = {
        name: _measures(result.stages[name], "Heal" if name == "healed" else "Fine-tuning")
        for name in STAGE_TITLES
        if name in result.stages
    }
    labels = dict.fromkeys(label for measures in stages.values() for label in measures)
    before, after = compared_stages(result)
    old, new = stages.get(before, {}), stages.get(after, {})
    changes = result.stages[after].accuracy_change if after in result.stages else {}
    table = []
    for label in labels:
        cells = (measures.get(label) for measures in stages.values())
        change = ""
        if label in old and label in new:
            change = old[label].compare(old[label].value, new[label].value)
        if (
            paired := changes.get(label.removeprefix(ACCURACY).removeprefix(ZERO_SHOT))
        ) is not None:
            change = _paired_points(paired)
        if label in SPEEDS.values() and (timed := _speed_change(result, label)) is not None:
            change = timed
        table.append(Row(label, tuple(m.text if m else MISSING for m in cells), change))
    return tuple(table)


def compared_stages(result: RunResult) -> tuple[str, str]:
    """Names of the two stages that the column "Change" compares."""
    if "pruned_tuned" not in result.stages:
        pruned = "healed" if "healed" in result.stages else "pruned"
        return "dense", pruned if pruned in result.stages else "dense_tuned"
    return "dense_tuned" if "dense_tuned" in result.stages else "dense", "pruned_tuned"


def noisy_speeds(result: RunResult) -> tuple[str, ...]:
    """``prefill``, ``decode``: those whose change is not clear of the timing's spread."""
    stage = result.stages.get(compared_stages(result)[1])
    changes = stage.speed_change if stage else {}
    return tuple(name for name, change in changes.items() if not change.is_clear_change())


def describe_noise(result: RunResult) -> tuple[str, ...]:
    """The sentence that says so, if it is so."""
    named = [SPEEDS[name].partition(",")[0].lower() for name in noisy_speeds(result)]
    return (NOISY.format(which=", ".join(named)),) if named else ()


def measured(stage: Evaluation) -> list[tuple[str, str]]:
    """What one model was measured to be, as (what was measured, its value)."""
    rows = [(label, measure.text) for label, measure in _measures(stage).items()]
    if stage.leading_token and not stage.windows:
        rows.append(("Prompts start with", stage.leading_token))
    for name, cut in stage.windows.items():
        rows.append((f"Windows, {name}", describe_windows(cut)))
    return rows


def windows(result: RunResult) -> dict[str, str]:
    """Text → how it was cut, of all stages: they read the same windows."""
    return {
        name: describe_windows(cut)
        for stage in result.stages.values()
        for name, cut in stage.windows.items()
    }


def _measures(stage: Evaluation, training: str = "Fine-tuning") -> dict[str, _Measure]:
    """Label → measure; ``training`` is what changed the weights.

    Peak memory is shown of trained stages only: without a training's reset it never falls within
    one process.
    """
    measures = {
        "Layers": _Measure(stage.n_layers, str(stage.n_layers), _difference),
        "Parameters": _Measure(stage.n_parameters, f"{stage.n_parameters:,}", _percent),
    }
    if stage.weight_bytes is not None:
        size = stage.weight_bytes / 2**20
        measures["Weights, MiB"] = _Measure(size, f"{size:,.1f}", _factor)
    for name, estimate in stage.perplexity.items():
        measures[f"Perplexity, {name}"] = _Measure(
            estimate.value, _with_error(estimate, 2), _factor
        )
    for name, estimate in stage.accuracy.items():
        measures[f"{ACCURACY}{name}"] = _Measure(estimate.value, _with_error(estimate, 3), _points)
    measures |= _zero_shot(stage) | _likeness(stage)
    if stage.flops_per_token is not None:
        label = f"GFLOPs per token, context {stage.flops_context:,}"
        count = stage.flops_per_token / 1e9
        measures[label] = _Measure(count, f"{count:,.3f}", _factor)
    for label, speed, spread in (
        (SPEEDS["prefill"], stage.prefill_tokens_per_second, stage.prefill_spread),
        (SPEEDS["decode"], stage.decode_tokens_per_second, stage.decode_spread),
    ):
        if speed is not None:
            measures[label] = _Measure(speed, f"{speed:,.1f}{_half(spread, 1)}", _factor)
    if (seconds := stage.train_seconds) is not None:
        measures[f"{training}, seconds"] = _Measure(seconds, f"{seconds:,.1f}", _factor)
        if (peak := stage.peak_rss_bytes) is not None:
            measures["Peak memory, GiB"] = _Measure(peak, f"{peak / 2**30:.2f}", _factor)
    return measures


def _zero_shot(stage: Evaluation) -> dict[str, _Measure]:
    """The metrics of lm-evaluation-harness, and the mean accuracy over its tasks."""
    measures = {}
    for task, metrics in stage.harness.items():
        for metric, estimate in metrics.items():
            how = _points if metric.startswith("acc") else _gap
            label = ZERO_SHOT + harness_name(task, metric)
            measures[label] = _Measure(estimate.value, _with_error(estimate, 3), how)
    accuracies = [metrics["acc"] for metrics in stage.harness.values() if "acc" in metrics]
    if len(accuracies) > 1:
        mean = _mean(accuracies)
        label = f"{ZERO_SHOT}mean acc of {len(accuracies)}"
        measures[label] = _Measure(mean.value, _with_error(mean, 3), _points)
    return measures


def _likeness(stage: Evaluation) -> dict[str, _Measure]:
    """Agreement with the model that this one was compared with, and how both go on alone."""
    measures = {}
    for name, fidelity in stage.fidelity.items():
        for label, estimate in (
            ("Next-token agreement", fidelity.agreement),
            ("KL, nats per token", fidelity.kl),
        ):
            measures[f"{label}, {name}"] = _Measure(estimate.value, _with_error(estimate, 3), _gap)
    for name, generation in stage.generation.items():
        for label, estimate, theirs in _generated(generation):
            other = "" if theirs is None else f" (the other: {_with_error(theirs, 3)})"
            text = _with_error(estimate, 3) + other
            measures[f"{label}, {name}"] = _Measure(estimate.value, text, _gap)
    return measures


def _generated(generation: Generation) -> list[tuple[str, Estimate, Estimate | None]]:
    """Label, estimate, and the other model's."""
    other = generation.reference
    measures = [
        (f"Generated, distinct {n}-grams", estimate, other.distinct[n - 1] if other else None)
        for n, estimate in enumerate(generation.distinct, start=1)
    ]
    measures.append(("Generated, share in a loop", generation.loop, other.loop if other else None))
    if generation.common_prefix is not None and generation.agreement is not None:
        measures += [
            ("Generated, tokens before they part", generation.common_prefix, None),
            ("Generated, equal tokens", generation.agreement, None),
        ]
    return measures


def _with_error(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:,.{digits}f} ± {estimate.stderr:.{digits}f}"


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Their mean, with the standard error that independent tasks give it: √(Σ se²) / n."""
    n = len(estimates)
    spread = sum(estimate.stderr**2 for estimate in estimates) ** 0.5 / n
    return Estimate(sum(estimate.value for estimate in estimates) / n, spread, n)


def _difference(dense: float, pruned: float) -> str:
    return f"{pruned - dense:+.0f}".replace("-", "−")


def _gap(dense: float, pruned: float) -> str:
    return f"{pruned - dense:+.3f}".replace("-", "−")


def _percent(dense: float, pruned: float) -> str:
    return f"{100 * (pruned / dense - 1):+.1f} %".replace("-", "−")


def _points(dense: float, pruned: float) -> str:
    return f"{100 * (pruned - dense):+.1f} points".replace("-", "−")


def _paired_points(change: Estimate) -> str:
    text = f"{100 * change.value:+.1f} ± {100 * change.stderr:.1f} points"
    return text.replace("-", "−")


def _speed_change(result: RunResult, label: str) -> str | None:
    """The change by the paired rounds; ``None`` in older results, which have no rounds."""
    stage = result.stages.get(compared_stages(result)[1])
    if stage is None or stage.prefill_spread is None:
        return None
    name = next(name for name, title in SPEEDS.items() if title == label)
    change: Median | None = stage.speed_change.get(name)
    return f"× {change.value:.2f}{_half(change.spread, 2)}" if change else ""


def _half(spread: tuple[float, float] | None, digits: int) -> str:
    return "" if spread is None else f" ± {(spread[1] - spread[0]) / 2:,.{digits}f}"


def _factor(dense: float, pruned: float) -> str:
    return f"× {pruned / dense:.2f}"


def sizes(result: RunResult) -> tuple[str, ...]:
    """Sentences on what other numbers of dropped layers would cost, where the run knows it."""
    if result.plan is None:
        return ()
    lines = []
    if result.plan.curve:
        prices = ", ".join(f"{n}: {price:.2f}" for n, price in result.plan.curve.items())
        lines.append(f"Price by layers dropped (a bound on the loss, nats per token): {prices}")
    if result.plan.trials:
        ratios = ", ".join(f"{n}: × {ratio:.3f}" for n, ratio in result.plan.trials.items())
        lines.append(f"Perplexity on held-out text by layers dropped: {ratios}")
    return tuple(lines)
