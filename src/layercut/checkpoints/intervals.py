"""Keys by which a layer's type follows from its number: every n-th layer is another one.

transformers reads the list of types where there is one, and passes over the key; other engines read
the key alone. So a pruned configuration keeps both in step wherever an interval can say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layercut.checkpoints.layer_types import read_entries

FULL = "full_attention"


@dataclass(frozen=True, slots=True)
class Interval:
    """A key that says "every n-th layer".

    Attributes:
        key: its name.
        listed: the per-layer list that says the same.
        marked: the entry of every n-th layer in that list.
        first: families in which it is the first of n layers; elsewhere it is the last.
    """

    key: str
    listed: str = "layer_types"
    marked: str | int = FULL
    first: tuple[str, ...] = ()


INTERVALS = (
    Interval("full_attention_interval"),
    Interval("sliding_window_pattern"),
    Interval("_sliding_window_pattern"),
    Interval("layer_group_size"),
    Interval("global_attn_every_n_layers", first=("modernbert", "modernbert-decoder")),
    Interval("no_rope_layer_interval", "no_rope_layers", 0),
    Interval("interleave_moe_layer_step", "moe_layers"),
)
BY_KEY = {interval.key: interval for interval in INTERVALS}


def find_marks(text: Any, interval: Interval) -> list[bool]:
    """For each layer, whether it is one of the n-th; empty if the configuration lists none.

    Args:
        text: a transformers configuration of a text decoder.
        interval: the key.
    """
    if interval.listed == "moe_layers":  # a list of layer numbers
        listed = getattr(text, "moe_layers", None)
        numbers = listed if isinstance(listed, list | tuple) else ()
        return [i in numbers for i in range(text.num_hidden_layers)] if numbers else []
    return [entry == interval.marked for entry in read_entries(text, interval.listed)]


def derive_marks(value: Any, n_layers: int, *, first: bool = False) -> list[bool]:
    """What an engine makes of an interval, or of a pattern word such as LLLG; empty for nonsense.

    Args:
        value: of the key.
        n_layers: how many layers there are.
        first: whether the first of n layers is marked, not the last.
    """
    if isinstance(value, str) and value and set(value) <= {"L", "G"}:
        return [value[i % len(value)] == "G" for i in range(n_layers)]
    if type(value) is not int or value < 1:
        return []
    return [i % value == (0 if first else value - 1) for i in range(n_layers)]


def mend_intervals(section: Mapping[str, Any], text: Any, kept: Sequence[int]) -> dict[str, Any]:
    """Intervals that say of the kept layers what is so, for the keys that are stale after pruning.

    Args:
        section: the text decoder's part of config.json.
        text: its configuration before pruning.
        kept: sorted indices of the layers that stay.

    Returns:
        Key → new value. An interval is left out if it is right as it is, if it never was, or if
        none has the kept layers' pattern; `layercut export-check` then names who reads it.
    """
    mended: dict[str, Any] = _renumber_linear_lists(section, text, kept)
    for interval in INTERVALS:
        value, marks = section.get(interval.key), find_marks(text, interval)
        first = text.model_type in interval.first
        derived = derive_marks(value, len(marks), first=first)
        if not marks or derived != marks:
            continue
        wanted = [marks[i] for i in kept]
        if derive_marks(value, len(kept), first=first) != wanted:
            if isinstance(value, str):
                mended[interval.key] = _shortest_word(wanted)
            elif found := _find_interval(wanted, first=first):
                mended[interval.key] = found
    return mended


def _renumber_linear_lists(
    section: Mapping[str, Any], text: Any, kept: Sequence[int]
) -> dict[str, Any]:
    """Kimi Linear's lists of layers, which stand in an object of their own and count from 1."""
    inner = section.get("linear_attn_config")
    if text.model_type != "kimi_linear" or not isinstance(inner, Mapping):
        return {}
    new_number = {old + 1: new + 1 for new, old in enumerate(kept)}
    lists = {
        key: [new_number[i] for i in inner[key] if type(i) is int and i in new_number]
        for key in ("full_attn_layers", "kda_layers")
        if isinstance(inner.get(key), list)
    }
    return {"linear_attn_config": {**inner, **lists}}


def _find_interval(marks: Sequence[bool], *, first: bool) -> int:
    """The smallest interval with this pattern; 0 if there is none."""
    candidates = range(1, len(marks) + 2)  # one more than there are layers: none of them
    right = (n for n in candidates if derive_marks(n, len(marks), first=first) == list(marks))
    return next(right, 0)


def _shortest_word(marks: Sequence[bool]) -> str:
    word = "".join("G" if mark else "L" for mark in marks)
    lengths = range(1, len(word) + 1)
    return next(word[:n] for n in lengths if all(word[i] == word[i % n] for i in range(len(word))))
