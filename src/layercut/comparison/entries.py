"""Who takes part: every way of choosing layers crossed with every recovery, as data.

``SCORE+RECOVERY`` names a pair; a score's name may end in ``@each`` or ``@one-shot``, which says
whether it scores again after every dropped layer. A preset is a published method by its own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from layercut.errors import RecipeError, suggestion
from layercut.registry import available

Rounds = Literal["one-shot", "each"]

UNFOLDABLE = ("linear-patch", "ghost")
"""Recoveries that no plain weights can hold; see `layercut.recovery.runtime_maps`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A way of choosing layers.

    Attributes:
        scoring: a file of ``layercut/scoring``.
        strategy: a file of ``layercut/selection``.
        rounds: score once, or again after every dropped layer.
        keep_first: layers at the start that are protected.
        keep_last: layers at the end that are protected.
        options: the scoring method's own.
    """

    scoring: str
    strategy: str = "lowest"
    rounds: Rounds = "one-shot"
    keep_first: int = 0
    keep_last: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def protect(self, n_layers: int) -> set[int]:
        """The layers that the method itself protects."""
        last = range(max(0, n_layers - self.keep_last), n_layers)
        return {*range(min(self.keep_first, n_layers)), *last}

    def to_json(self) -> dict[str, Any]:
        """Everything that decides which layers go."""
        return {
            "scoring": self.scoring,
            "strategy": self.strategy,
            "rounds": self.rounds,
            "keep_first": self.keep_first,
            "keep_last": self.keep_last,
            "options": dict(self.options),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestant:
    """A choice with a recovery.

    Attributes:
        name: what the user called it.
        choice: which layers go.
        chooser: the choice's name.
        recovery: a file of ``layercut/recovery``, or one of ``UNFOLDABLE``.
        source: where the combination was published; empty for one that was not.
        reading: what the source leaves open and how it is read here.
    """

    name: str
    choice: Choice
    chooser: str
    recovery: str
    source: str = ""
    reading: str = ""

    @property
    def pair(self) -> str:
        """``SCORE+RECOVERY``."""
        return f"{self.chooser}+{self.recovery}"


CHOICES: dict[str, Choice] = {
    "random": Choice(scoring="random"),
    "reverse-order": Choice(scoring="reverse-order"),
    "magnitude": Choice(scoring="magnitude"),
    "magnitude+": Choice(scoring="magnitude", keep_first=4, keep_last=2),
    "taylor": Choice(scoring="taylor"),
    "taylor+": Choice(scoring="taylor", keep_first=4, keep_last=2),
    "block-influence": Choice(scoring="block-influence"),
    "angular-distance": Choice(scoring="angular-distance", strategy="block"),
    "perplexity": Choice(scoring="perplexity"),
    "sleb": Choice(scoring="perplexity", rounds="each", keep_first=1, keep_last=1),
    "gradmap": Choice(scoring="gradmap", rounds="each"),
    "igia": Choice(scoring="igia"),
    "residual-sensitivity": Choice(scoring="residual-sensitivity"),
    "priced-cuts": Choice(scoring="residual-sensitivity", strategy="priced-cuts"),
}
"""Name → which layers go. gradmap scores in rounds, as its paper does."""


def recoveries() -> tuple[str, ...]:
    """Every recovery that a pair may name."""
    return (*available("recovery"), *UNFOLDABLE)


def _pair(name: str) -> Contestant:
    chooser, plus, recovery = name.rpartition("+")
    if not plus:
        known = (*PRESETS, *GROUPS, *(f"{choice}+none" for choice in CHOICES))
        raise RecipeError(
            f"unknown method '{name}'{suggestion(name, known)} (presets: {', '.join(PRESETS)}; or "
            "SCORE+RECOVERY, published, all)"
        )
    if recovery not in recoveries():
        hint = suggestion(recovery, recoveries())
        raise RecipeError(
            f"method '{name}': unknown recovery '{recovery}'{hint} "
            f"(known: {', '.join(recoveries())})"
        )
    base, at, rounds = chooser.partition("@")
    if base not in CHOICES:
        hint = suggestion(base, CHOICES)
        raise RecipeError(
            f"method '{name}': unknown score '{base}'{hint} (known: {', '.join(CHOICES)})"
        )
    choice = CHOICES[base]
    if at:
        if rounds not in get_args(Rounds) or choice.strategy != "lowest":
            raise RecipeError(
                f"method '{name}': after @ stands each or one-shot, and only behind a score whose "
                "lowest layers go."
            )
        choice = replace(choice, rounds=cast(Rounds, rounds))
    return Contestant(name=name, choice=choice, chooser=chooser, recovery=recovery)


def _preset(name: str, pair: str, source: str, reading: str = "") -> Contestant:
    return replace(_pair(pair), name=name, source=source, reading=reading)


ONCE = (
    "the paper compensates after every dropped layer and scores the compensated model; here layers "
    "are scored in rounds and compensated once, at the end"
)
OURS = _preset("ours", "priced-cuts+refit", "layercut's default")
CONTROLS = (
    _preset("random", "random+none", "control"),
    _preset("reverse-order", "reverse-order+none", "control; arXiv:2411.15558"),
)
PUBLISHED = (
    _preset("shortgpt", "block-influence+none", "arXiv:2403.03853"),
    _preset("uidl", "angular-distance+none", "arXiv:2403.17887"),
    _preset("sleb", "sleb+none", "arXiv:2402.09025"),
    _preset("shortened-llama-ppl", "perplexity+none", "arXiv:2402.02834"),
    _preset("shortened-llama-taylor", "taylor++none", "arXiv:2402.02834"),
    _preset("magnitude+", "magnitude++none", "arXiv:2402.02834"),
    _preset(
        "laco",
        "block-influence+laco",
        "arXiv:2402.11187",
        "the paper merges wherever the model's output stays similar beyond a threshold; here block "
        "influence says where, so that the number of layers can be given",
    ),
    _preset("replaceme", "angular-distance+linear-map", "arXiv:2505.02819"),
    _preset("prune-and-comp", "block-influence@each+magnitude-rescale", "arXiv:2507.18212", ONCE),
    _preset("prune-and-comp-ppl", "perplexity@each+magnitude-rescale", "arXiv:2507.18212", ONCE),
    _preset("linear-patch", "angular-distance+linear-patch", "arXiv:2505.24680"),
    _preset(
        "ghost",
        "angular-distance+ghost",
        "Ghosted Layers",
        "the extra operation stands at the cut of the block that angular distance chooses",
    ),
    _preset("gradmap", "gradmap+projection", "arXiv:2602.14649"),
    _preset(
        "gradpruner",
        "igia+sign-merge",
        "arXiv:2601.19503",
        "the early run learns the calibration text, because there is no task; the paper fine-tunes "
        "after the merge, which here stands alone",
    ),
)
PRESETS = {preset.name: preset for preset in (OURS, *PUBLISHED, *CONTROLS)}
GROUPS = ("published", "all")
DEFAULT = ("ours", "gradmap", "shortgpt", "uidl", "replaceme", "reverse-order")


def parse_methods(names: Sequence[str]) -> tuple[Contestant, ...]:
    """The contestants that ``names`` stand for, in order, each once.

    Args:
        names: presets, pairs, ``published`` (every preset), or ``all`` (every preset and pair).

    Raises:
        RecipeError: a name is unknown; the closest one is suggested.
    """
    found = [contestant for name in names for contestant in _named(name)]
    if not found:
        raise RecipeError("methods names no contestant. Name one, or published.")
    by_pair: dict[str, Contestant] = {}
    for contestant in found:
        by_pair.setdefault(contestant.pair, contestant)
    return tuple(by_pair.values())


def _named(name: str) -> list[Contestant]:
    if name == "published":
        return list(PRESETS.values())
    if name == "all":
        pairs = [f"{choice}+{recovery}" for choice in CHOICES for recovery in recoveries()]
        return [*PRESETS.values(), *map(_pair, pairs)]
    if name in PRESETS:
        return [PRESETS[name]]
    return [_pair(name)]
