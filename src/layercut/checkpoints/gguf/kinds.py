"""Which plans llama.cpp would misread: a kept layer, or the model, would become another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layercut.checkpoints.gguf.layers import GgufLayers
from layercut.errors import ModelError
from layercut.types import PruningPlan

WHOLE_PERIODS = "Drop whole periods of the pattern"
NO_KIND_LEFT = (
    "no layer with attention, or none without, would be left, and llama.cpp keeps a state for each "
    "kind. Keep one layer of each."
)


def check_kinds(layers: GgufLayers, plan: PruningPlan) -> None:
    """Refuse plans after which llama.cpp takes a kept layer, or the model, for another one.

    Raises:
        ModelError: it would, or a hybrid would lose a kind of layer.
    """
    rules, header = layers.rules, layers.header
    before, after = layers.n_layers, len(plan.kept)
    window = layers.count("attention.sliding_window")
    pattern = layers.key("attention.sliding_window_pattern")
    named = layers.key("attention.sliding_window") in header
    slides = window > 0 or (rules.always_slides and not (named and layers.family == "llama4"))
    if not header.is_list(pattern):
        period = layers.count("attention.sliding_window_pattern", rules.sliding)
        if rules.needs_list:
            raise header.wrong(pattern, "is absent or one number, and a list is needed there")
        if period > 1 and (slides or pattern in header):
            first = rules.first_is_full
            _check_same(
                plan,
                lambda i: i % period == (0 if first else period - 1),
                f"of every {period} layers all but one slide, by their numbers",
            )
    if rules.rope_period and (slides or not (rules.rope_needs_window or rules.always_slides)):
        period, place = rules.rope_period, 0 if rules.first_is_full else rules.rope_period - 1
        _check_same(
            plan,
            lambda i: i % period == place,
            f"one of every {period} layers is without rotation, by its number",
        )
    interval = layers.count("full_attention_interval", rules.recurrent_interval)
    if interval > 1 and not header.is_list(layers.key("attention.recurrent_layers")):
        _check_same(
            plan,
            lambda i: (i + 1) % interval == 0,
            f"one of every {interval} layers attends to everything, by its number",
        )
        if after < interval:
            raise ModelError(NO_KIND_LEFT)
    if (step := layers.count("interleave_moe_layer_step")) > 1:
        _check_same(
            plan,
            lambda i: (i + 1) % step == 0,
            f"one of every {step} layers has experts, by its number",
        )
    _check_counts(layers, before, after)
    _check_hybrid(layers, plan)
    shown = layers.count("n_deepstack_layers")
    if first_dropped := [i for i in plan.dropped if i < shown]:
        raise ModelError(
            f"layer {first_dropped[0]} cannot be dropped: the first {shown} layers also take "
            "images, each its own. Keep them."
        )


def _check_same(plan: PruningPlan, kind: Callable[[int], bool], why: str) -> None:
    for new, old in enumerate(plan.kept):
        if kind(new) != kind(old):
            raise ModelError(
                f"layer {old} would become layer {new} and another kind of layer in llama.cpp: "
                f"{why}. {WHOLE_PERIODS}, as selection.preserve_pattern: true does."
            )


def _check_counts(layers: GgufLayers, before: int, after: int) -> None:
    rules, header = layers.rules, layers.header
    crossed = [n for n in rules.count_steps if (before >= n) != (after >= n)]
    known = [min(c) for c in rules.known_counts if (before in c) != (after in c)]
    if crossed or known:
        raise ModelError(
            f"llama.cpp knows a member of '{layers.family}' by {[*crossed, *known][0]} layers, so "
            f"{after} instead of {before} would be run as another model. Drop another number of "
            "layers, or use an engine that reads the configuration."
        )
    if rules.needs_key and layers.key(rules.needs_key) not in header:
        raise header.wrong(
            layers.key(rules.needs_key),
            "is absent, and llama.cpp computes it from the number of layers",
        )
    if rules.no_per_layer_input and (
        layers.count("embedding_length_per_layer_input")
        or layers.count("attention.shared_kv_layers")
    ):
        raise ModelError(
            f"{header.path}: its layers share keys and values or have inputs of their own, which "
            "layercut does not edit in GGUF files. Prune the original checkpoint and convert that."
        )
    if layers.count("attention.shared_kv_layers"):
        raise header.wrong(layers.key("attention.shared_kv_layers"), "is not 0")
    if rules.scale_count and rules.scale_count in (before, after):
        per_head = layers.count("embedding_length") // max(1, layers.count("attention.head_count"))
        if layers.count("attention.key_length", per_head) != per_head:
            raise ModelError(
                f"llama.cpp knows the 27B model of '{layers.family}' by {rules.scale_count} layers "
                f"and scales its attention otherwise, so {after} instead of {before} would be run "
                "wrongly. Use an engine that reads the configuration."
            )


def _check_hybrid(layers: GgufLayers, plan: PruningPlan) -> None:
    """Keep a layer of each kind, and the first layer's number of heads, from which sizes follow."""
    heads = _entries(layers, "attention.head_count")
    with_keys = [bool(n) for n in _entries(layers, "attention.head_count_kv")]
    inner = _entries(layers, "feed_forward_length") or [0] * layers.n_layers
    recurrent = [bool(flag) for flag in _entries(layers, "attention.recurrent_layers")]
    kinds = (
        with_keys,
        # Nemotron-H: a layer is attention, an MLP, or neither and then recurrent.
        [not keys and not n for keys, n in zip(with_keys, inner, strict=False)],
        recurrent,
        [not flag for flag in recurrent],
    )
    for kind in kinds:
        if any(kind) and not any(kind[i] for i in plan.kept):
            raise ModelError(NO_KIND_LEFT)
    if not heads:
        return
    first, new = heads[0], heads[plan.kept[0]]
    sized = all(
        layers.key(f"attention.{part}_length") in layers.header for part in ("key", "value")
    )
    if first != new and not (sized and first and new):
        raise ModelError(
            f"layer {plan.kept[0]} would become the first one with {new} heads instead of {first}, "
            "from which llama.cpp computes sizes of all layers. Keep layer 0."
        )


def _entries(layers: GgufLayers, name: str) -> list[Any]:
    """The decoder layers' entries of a list; none where there is no such list."""
    key, header = layers.key(name), layers.header
    values: list[Any] = header.fields[key].decode() if header.is_list(key) else []
    if values and len(values) < layers.n_layers:
        raise wrong_length_error(layers, key)
    return values[: layers.n_layers]


def wrong_length_error(layers: GgufLayers, key: str) -> ModelError:
    """What to raise when a list has not one entry per layer."""
    found = layers.header.fields[key]
    return layers.header.wrong(
        key, f"has {found.count} entries of {found.element} for {layers.n_layers} layers"
    )
