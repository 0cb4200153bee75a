"""Names of layers outside of the tensors' own: in configurations, lists, expressions and metadata.

A name belongs to the decoder by its full prefix, in any spelling by which transformers loads the
decoder. A prefix of another stack, a vision tower's or that of prediction layers, leaves it alone.
Expressions and wildcards are judged by what they pick among all modules of the checkpoint. What
looks like a layer's name and is neither is refused.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from layercut.checkpoints.layout import Layout
from layercut.checkpoints.stacks import Find, Stacks
from layercut.errors import ModelError

CONFIG_KEYS = frozenset({"quantization_config", "compression_config", "quantization"})
"""Where a configuration says how weights are quantised; the last key is mlx-lm's."""
LAYER_WORDS = "layers|layer|h|blocks|block|blk"
"""What lists of layers are called."""
PATTERN_SIGNS = frozenset("*[](|+?\\^$")
MARK = re.compile(r"re:|[+-]:")
"""What llm-compressor and GPTQModel put before an expression."""
ANCHORED = re.compile(r"(?:re:|[+-]:)?\^?((?:\w+\\\.)+\w+)\\\.(\d+)\\\.[^|]*")
"""An expression that picks within one layer of one list, whatever follows."""
INDEX_KEYS = re.compile(r"layers_to_\w+|\w*layer_(ids|indices|indexes|idxs)")
"""Keys of a quantisation whose lists of integers are layers."""


class LayerNames:
    """Renumbers the names of one checkpoint's decoder layers, wherever they stand.

    Args:
        layout: where its layers are.
        new_index: old index → new index of the kept layers.
        names: the stored tensors' names.
        find_conversions: builds transformers' models of the checkpoint, once a name needs them.
    """

    def __init__(
        self,
        layout: Layout,
        new_index: Mapping[int, int],
        names: Iterable[str],
        find_conversions: Find = tuple,
    ) -> None:
        self._layout = layout
        self._new_index = new_index
        self._stacks = Stacks(layout, new_index, names, find_conversions)
        self._last = layout.stored.rpartition(".")[2]
        words = f"{LAYER_WORDS}|{re.escape(self._last)}"
        # `a.layers.13`, also escaped as in `a\.layers\.13`, but neither `sublayers.13` nor
        # `layers.133` in the place of `layers.13`.
        self._token = re.compile(
            rf"(?<![A-Za-z0-9_])((?:\w+\\?\.)*?(?:{words}))(\\?\.)(\d+)(?![\w])"
        )

    def renumber(self, text: str, *, wildcards: bool = False) -> str | None:
        """One name, or what picks some; ``None`` if it named dropped layers only.

        Args:
            text: a module's or tensor's name, an expression, or wildcards.
            wildcards: whether it is known to be wildcards, if it is a pattern at all.

        Raises:
            ModelError: it looks like a layer's name, but it cannot be told whose; or it picks
                layers in a way that renumbering cannot follow.
        """
        if PATTERN_SIGNS & set(text):
            return self._renumber_pattern(text, wildcards=wildcards)
        return self._renumber_name(text)

    def walk(self, value: Any, *, every_pattern: bool = False, wildcards: bool = False) -> Any:
        """Parsed JSON after the layer drop; entries of dropped layers are gone.

        Args:
            value: what was read.
            every_pattern: whether any string may pick layers, as in a quantisation's
                configuration; otherwise only one that spells the name of a layer does.
            wildcards: whether patterns are known to be wildcards, as ModelOpt's are.
        """
        if isinstance(value, str):
            return self._renumber_value(value, every_pattern=every_pattern, wildcards=wildcards)
        if isinstance(value, list):
            items = [
                (item, self.walk(item, every_pattern=every_pattern, wildcards=wildcards))
                for item in value
            ]
            return [new for old, new in items if new is not None or old is None]
        if not isinstance(value, dict):
            return value
        entries = {}
        wildcards = wildcards or value.get("quant_method") == "modelopt"
        for key, item in value.items():
            inside = every_pattern or key in CONFIG_KEYS
            globs = wildcards or key == "exclude_modules"
            name = self._renumber_value(key, every_pattern=every_pattern, wildcards=globs)
            if name is None:
                continue
            if inside and INDEX_KEYS.fullmatch(key):
                entries[name] = self._renumber_numbers(item)
                continue
            new = self.walk(item, every_pattern=inside, wildcards=globs)
            if new is not None or item is None:
                entries[name] = new
        return entries

    def mentions_layers(self, value: Any) -> bool:
        """Whether parsed JSON names a layer of the decoder."""
        if isinstance(value, str):
            return any(
                self._stacks.own(match.group(1).replace("\\", ""))
                for match in self._token.finditer(value)
            )
        if isinstance(value, dict):
            return any(self.mentions_layers(part) for item in value.items() for part in item)
        return isinstance(value, list) and any(map(self.mentions_layers, value))

    def renumber_metadata(self, metadata: Mapping[str, str] | None) -> dict[str, str] | None:
        """A file's ``__metadata__`` after the drop: names in keys, values, and JSON in values."""
        if metadata is None:
            return None
        entries = {}
        for key, value in metadata.items():
            name, new = self._renumber_value(key), self._renumber_text(value)
            if name is not None and new is not None:
                entries[name] = new
        return entries

    def _renumber_text(self, text: str) -> str | None:
        if text[:1] not in {"{", "["}:
            return self._renumber_value(text)
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            return text
        new = self.walk(content)
        if new == content:
            return text
        compact = json.dumps(content, separators=(",", ":")) == text
        return json.dumps(new, separators=(",", ":") if compact else None)

    def _renumber_value(
        self, text: str, *, every_pattern: bool = False, wildcards: bool = False
    ) -> str | None:
        """A string of JSON; free text and paths hold no layer's name."""
        if not every_pattern and (
            "/" in text or any(c.isspace() for c in text) or not self._token.search(text)
        ):
            return text
        return self.renumber(text, wildcards=wildcards)

    def _renumber_numbers(self, value: Any) -> Any:
        is_list = isinstance(value, list) and all(type(item) is int for item in value)
        if not is_list or not set(value) <= set(range(self._layout.n_layers)):
            return value
        return [self._new_index[i] for i in value if i in self._new_index]

    def _renumber_name(self, text: str) -> str | None:
        match = self._token.search(text)
        if match is None or self._stays(match):
            return text
        prefix = match.group(1)
        owner = self._stacks.own(prefix)
        if owner is None and prefix in {self._last, *LAYER_WORDS.split("|")}:
            owner = self._stacks.own_by_ending(text)
        if owner is None and int(match.group(3)) >= self._layout.n_layers:
            return text  # no layer has this number, before or after
        if owner is None:
            raise ModelError(
                f"{text!r} looks like the name of a layer, but it is neither one of "
                f"{self._layout.stored} nor one that this checkpoint holds elsewhere. Write its "
                "full name, or remove it."
            )
        return self._substitute(text, match) if owner else text

    def _stays(self, match: re.Match[str]) -> bool:
        number = int(match.group(3))
        return self._new_index.get(number) == number

    def _substitute(self, text: str, match: re.Match[str]) -> str | None:
        """The name with its first number replaced; ``None`` if that layer is gone."""
        new = self._new_index.get(int(match.group(3)))
        if new is None:
            return None
        return f"{text[: match.start(3)]}{new}{text[match.end(3) :]}"

    def _renumber_pattern(self, text: str, *, wildcards: bool) -> str | None:
        if match := ANCHORED.fullmatch(text):
            owner = self._stacks.own(match.group(1).replace("\\", ""))
            if owner is not None:
                return self._replace(text, {True}) if owner else text
        # What holds no digit picks alike in every spelling.
        views = self._stacks.views if any(c.isdigit() for c in text) else [self._stacks.stored_view]
        readings = [(pick, v) for v in views for pick in read_pattern(text, wildcards=wildcards)]
        before = [pick(text, view) for pick, view in readings]
        wanted = [
            {new for module in picked if (new := view[module])}
            for picked, (_, view) in zip(before, readings, strict=True)
        ]
        new = next(
            (
                candidate
                for candidate in self._candidates(text)
                if wanted == [pick(candidate, filter(None, v.values())) for pick, v in readings]
            ),
            None,
        )
        if not any(before):
            if not self._is_known(text):
                raise ModelError(
                    f"{text!r} looks like the name of a layer, but it picks nothing in this "
                    "checkpoint. Remove it, or write the full name."
                )
            return self._replace(text, {True})
        if new is None and any(wanted):
            raise ModelError(
                f"the quantisation's configuration picks layers by {text!r}, which cannot be "
                "renumbered. Write one entry per layer instead, with its full name."
            )
        return new

    def _is_known(self, text: str) -> bool:
        """Whether every layer that a pattern names stays as it is, or has a known full prefix."""
        return all(
            self._stays(match)
            or int(match.group(3)) >= self._layout.n_layers
            or self._stacks.own(match.group(1).replace("\\", "")) is not None
            for match in self._token.finditer(text)
        )

    def _candidates(self, text: str) -> Iterator[str]:
        """What may stand in a pattern's place: full names renumbered, the same, every number."""
        choices: tuple[set[bool | None], ...] = ({True}, set(), {True, None})
        for owners in choices:
            new = self._replace(text, owners)
            if new is not None:
                yield new

    def _replace(self, text: str, owners: set[bool | None]) -> str | None:
        """The text with the numbers of some lists replaced; ``None`` if it names a dropped one."""
        gone = False

        def replace(match: re.Match[str]) -> str:
            nonlocal gone
            prefix = match.group(1).replace("\\", "")
            if self._stacks.own(prefix) not in owners or prefix.rpartition(".")[2] != self._last:
                return match.group()
            new = self._new_index.get(int(match.group(3)))
            gone = gone or new is None
            return f"{match.group(1)}{match.group(2)}{new}"

        new_text = self._token.sub(replace, text) if owners else text
        return None if gone else new_text


def read_pattern(
    text: str, *, wildcards: bool = False
) -> list[Callable[[str, Iterable[str]], set[str]]]:
    """How libraries may read a pattern: as an expression, or as shell wildcards."""
    if MARK.match(text):
        return [_expression]
    return [_wildcards] if wildcards else [_expression, _wildcards]


def _expression(text: str, names: Iterable[str]) -> set[str]:
    mark = MARK.match(text)
    try:
        pattern = re.compile(text[mark.end() :] if mark else text)
    except re.error:
        return set()
    return {name for name in names if pattern.match(name)}


def _wildcards(text: str, names: Iterable[str]) -> set[str]:
    pattern = re.compile(fnmatch.translate(text))
    return {name for name in names if pattern.match(name)}
