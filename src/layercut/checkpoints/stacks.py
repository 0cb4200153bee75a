"""The lists of modules in a checkpoint: which is the decoder's, in every spelling of its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from layercut.checkpoints.layout import Layout
from layercut.checkpoints.weight_names import Conversion, split_name

WRAPPERS = frozenset({"model", "language_model", "text_model"})
"""Parts by which engines and libraries wrap a decoder."""
N_SAMPLES = 3
"""Parameters of a list's first module that are enough to know it by."""

Find = Callable[[], Sequence[Conversion]]
View = Mapping[str, str | None]
"""Every module in one spelling → its name after the drop, ``None`` if it is gone."""


@dataclass(frozen=True, slots=True)
class _Spelling:
    """How one of transformers' models names the checkpoint.

    Attributes:
        conversion: from the files' names to the model's.
        decoder: prefix of the decoder's layers in the model.
        lists: prefix of every list of modules → a few parameters of its first one.
    """

    conversion: Conversion
    decoder: str
    lists: Mapping[str, Sequence[str]]


class Stacks:
    """Whose a list of layers is: the decoder's, another part's, or nobody's that is known.

    Args:
        layout: where the decoder's layers are.
        new_index: old index → new index of the kept layers.
        names: the stored tensors' names.
        find_conversions: builds transformers' models of the checkpoint, once a name needs them.
    """

    def __init__(
        self,
        layout: Layout,
        new_index: Mapping[int, int],
        names: Iterable[str],
        find_conversions: Find,
    ) -> None:
        self._layout = layout
        self._new_index = new_index
        self._names = tuple(names)
        self._find_conversions = find_conversions
        self._last = layout.stored.rpartition(".")[2]
        self._owners: dict[str, bool | None] = {}

    def own(self, prefix: str) -> bool | None:
        """Whether a list of layers is the decoder's; ``None`` if no list of that name is known."""
        if prefix not in self._owners:
            self._owners[prefix] = self._find_owner(prefix)
        return self._owners[prefix]

    def _find_owner(self, prefix: str) -> bool | None:
        if prefix == self._layout.stored:
            return True
        if prefix in self._stored_lists:
            return False
        parts = prefix.split(".")
        if len(parts) == 1:
            return None
        if prefix == self._layout.layers:
            return True
        for spelling in self._spellings:
            for known, samples in spelling.lists.items():
                rests = {name.removeprefix(f"{known}.0."): name for name in samples}
                if any(
                    spelling.conversion.convert(f"{prefix}.0.{rest}") == name
                    for rest, name in rests.items()
                ):
                    return known == spelling.decoder
            if spelling.conversion.passes_over(f"{prefix}.0.weight"):
                return False
        spelled = {*self._layout.stored.split("."), *self._layout.layers.split("."), *WRAPPERS}
        if set(parts) <= spelled and parts[-1] == self._last:
            return True
        own = _drop_wrappers(prefix)
        return False if len(own) > 1 and own in map(_drop_wrappers, self._stored_lists) else None

    def own_by_ending(self, text: str) -> bool | None:
        """Whose module a name without a prefix is, as libraries read it: by the names' endings."""
        ending = re.compile(rf"(^|.*\.){re.escape(text.rstrip('.'))}(\..*)?")
        owners = {
            name.startswith(f"{self._layout.stored}.")
            for name in self.stored_view
            if ending.fullmatch(name)
        }
        return owners.pop() if len(owners) == 1 else None

    @cached_property
    def _spellings(self) -> list[_Spelling]:
        return [
            _Spelling(conversion, decoder, _list_modules(conversion.parameters))
            for conversion in self._find_conversions()
            if (decoder := self._find_decoder(conversion))
        ]

    def _find_decoder(self, conversion: Conversion) -> str:
        """The decoder's prefix in one of transformers' models; empty if it loads none."""
        first = f"{self._layout.stored}.0."
        for name in self._names:
            if name.startswith(first):
                for stored in dict.fromkeys((name, f"{split_name(name)[0]}.weight")):
                    if conversion.reads(stored):
                        return conversion.convert(stored).partition(".0.")[0]
        return ""

    @cached_property
    def _stored_lists(self) -> set[str]:
        """Prefixes of everything numbered in the files but the decoder's layers."""
        return {
            name[: match.start()]
            for name in self._names
            for match in re.finditer(r"\.\d+(?=\.)", name)
        } - {self._layout.stored}

    @cached_property
    def stored_view(self) -> View:
        """All modules as the files name them."""
        return self._view(self._layout.stored, self._names)

    @cached_property
    def views(self) -> list[View]:
        """All modules as the files name them, and as each of transformers' models does."""
        return [
            self.stored_view,
            *(self._view(s.decoder, s.conversion.parameters) for s in self._spellings),
        ]

    def _view(self, prefix: str, names: Iterable[str]) -> View:
        modules = {split_name(name)[0] for name in names}
        for module in tuple(modules):
            while module := module.rpartition(".")[0]:
                modules.add(module)
        inside = re.compile(rf"{re.escape(prefix)}\.(\d+)(?=\.|$)")
        view: dict[str, str | None] = {}
        for module in modules:
            match = inside.match(module)
            if match is None:
                view[module] = module
                continue
            new = self._new_index.get(int(match.group(1)))
            view[module] = None if new is None else f"{prefix}.{new}{module[match.end() :]}"
        return view


def _drop_wrappers(prefix: str) -> tuple[str, ...]:
    """The parts of a prefix that say which part of the model it is."""
    return tuple(part for part in prefix.split(".") if part not in WRAPPERS | {"vision_model"})


def _list_modules(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Prefix of every list of modules → a few parameters of its first module."""
    lists: dict[str, list[str]] = defaultdict(list)
    for name in parameters:
        for match in re.finditer(r"\.0(?=\.)", name):
            if len(lists[name[: match.start()]]) < N_SAMPLES:
                lists[name[: match.start()]].append(name)
    return lists
