"""``layercut inspect``: what a checkpoint is, and whether and where it can be pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, Any

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries

if TYPE_CHECKING:
    from layercut.pipeline.inspect import Inspection


def inspect(
    model: options.ModelArgument,
    revision: options.RevisionOption = None,
    json_file: options.JsonOption = None,
    offline: options.OfflineOption = False,
) -> None:
    """Describe MODEL: family, layers, sizes, what must stay, and what scoring would take.

    Reads the configuration and the files' headers; no weight is loaded.

    Example: layercut inspect embedded:smollm2-135m
    """
    set_up_libraries(offline=offline)
    from layercut.cli.tables import print_fields
    from layercut.pipeline.inspect import inspect as described

    inspection = described(model, revision=revision)
    print_fields(model, list(fields(inspection)))
    options.write_json(json_file, inspection.to_json())


def fields(inspection: Inspection) -> Iterator[tuple[str, str]]:
    """What is shown, as (label, value)."""
    from layercut.checkpoints.layout import LAST_TO_COUNT

    yield "Family", f"{inspection.model_type} ({inspection.architecture})"
    yield "Layers", "unknown" if inspection.n_layers is None else str(inspection.n_layers)
    for first, last, layer in _runs(inspection.layers):
        numbers = f"{first}" if first == last else f"{first}-{last}"
        kind = f", {layer.kind}" if layer.kind else ""
        yield f"  {numbers}", f"{layer.n_parameters:,} parameters each{kind}"
    yield "Parameters", f"{inspection.n_parameters:,}"
    sizes = ", ".join(f"{kind} {size / 1e6:,.1f} MB" for kind, size in inspection.stored.items())
    yield "Stored as", f"{sizes}; files: {inspection.n_files}"
    if inspection.quantisation:
        yield "Quantised", inspection.quantisation
    yield "Output head", "tied to the embedding" if inspection.tied else "its own"
    if inspection.context:
        yield "Context", f"{inspection.context:,} tokens"
    yield "Text starts with", inspection.leading_token or "its own first token"
    yield "Between documents", inspection.document_separator or "nothing"
    yield "Prunable", f"no: {inspection.refusal}" if inspection.refusal else "yes"
    if inspection.refusal and inspection.by_plan:
        yield "", "`layercut prune` can apply a plan to it."
    for number, layer in enumerate(inspection.layers):
        if layer.pinned:
            yield "Must stay", f"layer {number}: {layer.pinned}"
    if inspection.keep_one_of:
        numbers = ", ".join(map(str, inspection.keep_one_of))
        yield "Must stay", f"one of the layers {numbers}: {LAST_TO_COUNT}"
    if inspection.summary:
        yield "A default run", inspection.summary[0]
        yield from (("", line) for line in inspection.summary[1:])
        yield from ((f"  {e['name']}", _stage(e)) for e in inspection.estimate["stages"])
        yield from ((f"--effort {name}", told) for name, told in inspection.efforts.items())


def _runs(layers: tuple[Any, ...]) -> Iterator[tuple[int, int, Any]]:
    """Neighbouring layers that are alike: first, last, and one of them."""
    numbered = enumerate(layers)
    for _, group in groupby(numbered, key=lambda item: (item[1].kind, item[1].n_parameters)):
        members = list(group)
        yield members[0][0], members[-1][0], members[0][1]


def _stage(stage: Mapping[str, Any]) -> str:
    """Seconds and bytes of one stage of an estimate."""
    if stage["seconds"] is None:
        return f"not estimated: {stage['missing']}"
    sizes = (("device memory", "device"), ("memory", "host"), ("disk", "disk"))
    parts = [f"{n / 1e9:,.2f} GB of {name}" for name, key in sizes if (n := stage[f"{key}_bytes"])]
    return ", ".join([f"{stage['seconds']:,.0f} s", *parts])
