"""docs/benchmarks.md from finished comparisons; some of the rows give some of the page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.comparison.entries import OURS, PUBLISHED
from layercut.comparison.result import Comparison
from layercut.comparison.row import Row
from layercut.evaluation.accuracy import paired_change
from layercut.evaluation.evaluate import BY_LENGTH, collect_outcomes
from layercut.results import Estimate, Provenance

HEAD = """\
# Every method side by side

Written by `python benchmarks/compare.py --data ../shared/data`; do not edit. One model, and in
each part one calibration text for all; a method's seconds are what it would have taken alone to
score, select and recover. Perplexity is a multiple of the dense model's, in windows of 512 tokens.
A forward pass is timed once per part and other jobs share the machine: seconds and passes are good
to a factor of two, between rows of one part and of equal threads. ± is one standard error over
windows, paired with the dense model's. Rows with neither ± nor threads were measured before those
were kept: on one thread, with another job on the machine's other core.
"""


def read(path: Path) -> Comparison:
    """What a comparison's ``compare.json`` holds."""
    content = json.loads(path.read_text(encoding="utf-8"))
    origin = Provenance(**{k: content[k] for k in ("layercut", "versions", "hardware", "command")})
    rows = tuple(map(Row.from_json, content["rows"]))
    return Comparison(content["settings"], origin, Row.from_json(content["dense"]), rows)


def page(results: Sequence[Comparison]) -> str:
    """The whole page, the comparison with the most calibration text first."""
    parts = [HEAD]
    for result in sorted(results, key=n_tokens, reverse=True):
        parts += [f"## {n_tokens(result):,} calibration tokens\n", origin(result)]
        parts += [perplexity(result), against_peers(result)]
        if result.dense.evaluation.accuracy:
            parts.append(accuracy(result))
        parts += [healed(result), failed(result)]
    parts.append(sources(results))
    return "\n".join(part for part in parts if part)


def n_tokens(result: Comparison) -> int:
    """Calibration tokens."""
    drawn = result.settings["calibration"]
    return int(drawn["n_sequences"] * drawn["seq_len"])


def origin(result: Comparison) -> str:
    dense = ", ".join(
        f"{name} {e.value:.2f} ± {e.stderr:.2f} ({e.n:,} tokens)"
        for name, e in result.dense.evaluation.perplexity.items()
    )
    hardware = result.provenance.hardware
    versions = ", ".join(f"{k} {v}" for k, v in result.provenance.versions.items())
    model = f"{result.dense.model}, {result.dense.evaluation.n_parameters:,} parameters"
    text = f"{result.settings['calibration']['data']}; seed {result.settings['seed']}"
    forward = f"{result.dense.forward_seconds:.0f} s"
    return f"""\
- Model: {model}. Dense perplexity: {dense}.
- Calibration: {text}.
- One forward pass over it takes {forward}: the unit of “passes”.
- Machine: {hardware["cpu"]}, {hardware["torch_threads"]} threads. Versions: {versions}.
"""


def perplexity(result: Comparison) -> str:
    lines = ["### Perplexity over dense", ""]
    head = ["layers", "method", *result.texts, "same token, %", "KL, nats", "loops, %"]
    lines += table_head([*head, "seconds", "passes", "threads"])
    for row in ran(result):
        if is_healed(row):
            continue
        assert row.fidelity and row.generation
        beside = [
            f"{100 * row.fidelity.agreement.value:.1f}",
            f"{row.fidelity.kl.value:.3f}",
            f"{100 * row.generation.loop.value:.0f}",
        ]
        ratios = ratios_with_errors(row, result)
        passes = sum(row.passes(result.dense).values())
        cost = [f"{row.total_seconds:,.0f}", f"{passes:,.1f}", threads(row)]
        lines.append(line([str(row.layers), row.method, *ratios, *beside, *cost]))
    first, dense = result.texts[0], result.dense.generation
    assert dense
    return "\n".join(lines) + (
        f"\n\nAgreement, KL and loops (the share of greedy continuations that repeats itself; "
        f"{100 * dense.loop.value:.0f} % when dense) are on {first}.\n"
    )


def against_peers(result: Comparison) -> str:
    """Ours beside the best published method of each size, and beside SLEB's time."""
    first = result.texts[0]
    titles = ["layers", "ours", "best peer", "excess over dense, ours / peer's"]
    lines = table_head([*titles, "seconds, SLEB / ours"])
    n_head = len(lines)
    rows = [row for row in ran(result) if not is_healed(row)]
    for size in sorted({row.layers for row in rows}):
        here = {row.method: row for row in rows if row.layers == size}
        ours, published = here.get(OURS.name), peers(result, size)
        if ours is None or not published:
            continue
        peer = here[published[0]]
        mine, its = (row.ratios(result.dense)[first] for row in (ours, peer))
        sleb = here.get("sleb")
        times = f"{(sleb.total_seconds or 0) / (ours.total_seconds or 1):.1f}" if sleb else "–"
        cells = [str(size), f"{mine:.3f}", f"{its:.3f} ({peer.method})"]
        lines.append(line([*cells, f"{(mine - 1) / (its - 1):.2f}", times]))
    if len(lines) == n_head:
        return ""
    note = f"Perplexity over dense on {first}; seconds to the repaired model"
    if any(row.method == "sleb" for row in rows):
        note += ", SLEB's with the first and last layer, which it scores and never drops"
    note = f"{note}.{unmeasured(rows)}"
    return "\n".join(["### Ours and the best published peer", "", *lines, "", note, ""])


def unmeasured(rows: Sequence[Row]) -> str:
    """What the best peer was chosen from where that is not all of them, size by size."""
    found = ""
    for size in sorted({row.layers for row in rows}):
        here = {row.method for row in rows if row.layers == size}
        missing = [peer.name for peer in PUBLISHED if peer.name not in here]
        there = [peer.name for peer in PUBLISHED if peer.name in here]
        if len(missing) > len(there):
            found += f" Peers measured at {size} layers: {', '.join(there) or 'none'}."
        elif missing:
            found += f" Not measured at {size} layers: {', '.join(missing)}."
    return found


def peers(result: Comparison, size: int) -> list[str]:
    """The published methods that ran at this size, the lowest perplexity first."""
    names = {preset.name for preset in PUBLISHED}
    return [row.method for row in ran(result) if row.layers == size and row.method in names]


def accuracy(result: Comparison) -> str:
    tasks = [name for name in result.dense.evaluation.accuracy if not name.endswith(BY_LENGTH)]
    lines = ["### Zero-shot accuracy, %", ""]
    lines += table_head(
        ["layers", "method", *tasks, "mean", "mean − dense, points", "ours − it, points"]
    )
    for row in (result.dense, *ran(result)):
        if any(task not in row.evaluation.accuracy for task in tasks):
            continue
        estimates = [row.evaluation.accuracy[task] for task in tasks]
        cells = [f"{100 * e.value:.1f} ± {100 * e.stderr:.1f}" for e in estimates]
        mean = f"{100 * sum(e.value for e in estimates) / len(estimates):.1f}"
        to_dense = row.accuracy_changes(result.dense)
        changes = [to_dense[task] for task in tasks if row.layers]
        last = [mean_change(changes), mean_change(to_ours(result, row, tasks))]
        lines.append(line([str(row.layers), row.method, *cells, mean, *last]))
    rows = max(e.n for e in result.dense.evaluation.accuracy.values())
    return "\n".join(lines) + (
        f"\n\nAt most {rows} rows of each task, a fixed draw; ± is one standard error, that of "
        "differences paired by row. Of the peers, at least the three with the lowest perplexity.\n"
    )


def to_ours(result: Comparison, row: Row, tasks: Sequence[str]) -> list[Estimate]:
    """Accuracy of ours minus this row's at the same size, task by task, paired by row."""
    for ours in ran(result):
        if (ours.method, ours.layers) == (OURS.name, row.layers) and ours is not row:
            its, mine = (collect_outcomes(each.evaluation) for each in (row, ours))
            if all(len(its[task]) == len(mine.get(task, ())) for task in tasks):
                return [paired_change(its[task], mine[task]) for task in tasks]
    return []


def healed(result: Comparison) -> str:
    """Healed models beside the dense one healed in the same way."""
    rows = [(row, row.heal) for row in ran(result) if row.heal]
    if not rows:
        return ""
    lines = ["### After a heal: perplexity over dense", ""]
    over = [f"{name} over dense, healed" for name in result.texts]
    cost = ["seconds", "threads", "steps", "tokens"]
    lines += table_head(["layers", "method", "healed on", *result.texts, *over, *cost])
    for row, took in rows:
        alike = dense_healed_as(row, result.rows)
        ratios = ratios_with_errors(row, result)
        ratios += [shown(over_dense(row, alike, text)) for text in result.texts]
        cost = [f"{took['train_seconds']:,.0f}", threads(row)]
        cost += [str(took["n_steps"]), f"{took['n_tokens']:,}"]
        cells = [str(row.layers), row.method, heal_text(took), *ratios]
        lines.append(line([*cells, *cost]))
    shares = {took["settings"]["label_weight"] for _, took in rows}
    share = " or ".join(f"{100 * weight:.0f}" for weight in sorted(shares))
    return "\n".join(lines) + (
        "\n\nDistilled from the dense model on texts that are in no table; WikiText-2 valid is "
        "wikitext2's sibling, and the columns “over dense, healed” leave out what the same heal "
        f"brings the dense model. {share} % of the loss is the text's own next token.\n"
    )


def heal_text(took: Mapping[str, Any]) -> str:
    """The files that a heal trained on, without their folders."""
    data = took["settings"]["data"]
    return " + ".join(Path(source).name for source in ([data] if isinstance(data, str) else data))


def dense_healed_as(row: Row, rows: Sequence[Row]) -> Row | None:
    """The dense model healed with the settings of this healed row."""
    assert row.heal
    settings = row.heal["settings"]
    alike = (r for r in rows if r.layers == 0 and r.heal and r.heal["settings"] == settings)
    return next(alike, None)


def over_dense(row: Row, dense: Row | None, text: str) -> float | None:
    """Its perplexity over that of the healed dense model, where both were measured."""
    return row.ratios(dense).get(text) if dense else None


def mean_change(changes: Sequence[Estimate]) -> str:
    """Mean over tasks, whose errors are independent: √Σ se² / n."""
    if not changes:
        return ""
    mean = sum(change.value for change in changes) / len(changes)
    error = sum(change.stderr**2 for change in changes) ** 0.5 / len(changes)
    return f"{100 * mean:+.1f} ± {100 * error:.1f}".replace("-", "−")


def threads(row: Row) -> str:
    """On how many threads the row was measured, where it tells."""
    return str(row.measured_with["threads"]) if row.measured_with else "–"


def ratios_with_errors(row: Row, result: Comparison) -> list[str]:
    """Text by text the ratio and its standard error over windows, if known and no rubble."""
    ratios, errors = row.ratios(result.dense), row.ratio_errors(result.dense)
    return [
        f"{ratios[text]:.3f} ± {errors[text]:.3f}"
        if text in errors and ratios[text] < 1000
        else shown(ratios.get(text))
        for text in result.texts
    ]


def shown(ratio: float | None) -> str:
    """A ratio; what is beyond all use in powers of ten."""
    if ratio is None:
        return "–"
    return f"{ratio:.3f}" if ratio < 1000 else f"{ratio:.0e}"


def failed(result: Comparison) -> str:
    reasons = [row for row in result.rows if row.reason is not None]
    if not reasons:
        return ""
    lines = [f"- {row.method}, {row.layers} layers: {row.reason}" for row in reasons]
    return "\n".join(["### Could not run", "", *lines, ""])


def sources(results: Sequence[Comparison]) -> str:
    lines = [
        "## What the names stand for",
        "",
        *table_head(["method", "pair", "source", "reading"]),
    ]
    known = {row.method: row for result in results for row in result.rows if row.pair}
    for name in sorted(known):
        row = known[name]
        lines.append(line([name, f"`{row.pair}`", row.source, row.reading]))
    return "\n".join([*lines, ""])


def is_healed(row: Row) -> bool:
    """Whether it is a healed model; the dense one without labels is only named so."""
    return row.heal is not None or not row.layers


def ran(result: Comparison) -> list[Row]:
    return [row for row in result.rows if row.reason is None]


def table_head(titles: Sequence[str]) -> list[str]:
    return [line(titles), line(["---"] * len(titles))]


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
