"""What is compared: every way of choosing layers with every recovery, from the registry.

``SCORE+RECOVERY`` names a pair; a score's name may end in ``@each`` or ``@one-shot``, which says
whether it scores again after every dropped layer. A preset is a published method by its own name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast, get_args

from layercut.errors import RecipeError, suggestion
from layercut.registry import Rounds, available, describe


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerChoice:
    """A way of choosing layers.

    Attributes:
        scoring: a file of ``layercut/scoring/methods``.
        strategy: a file of ``layercut/selection/methods``.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A choice with a recovery.

    Attributes:
        name: as the user called it.
        choice: which layers go.
        choice_name: the choice's name.
        recovery: a file of ``layercut/recovery/methods``.
        source: where the combination was published; empty for one that was not.
        reading: what the source leaves open and how it is read here.
    """

    name: str
    choice: LayerChoice
    choice_name: str
    recovery: str
    source: str = ""
    reading: str = ""

    @property
    def pair(self) -> str:
        """``SCORE+RECOVERY``."""
        return f"{self.choice_name}+{self.recovery}"


@dataclass(frozen=True, slots=True)
class Preset:
    """A published method by its own name.

    Attributes:
        name: that name.
        pair: ``SCORE+RECOVERY``.
        source: where the combination was published.
        reading: what the source leaves open and how it is read here.
    """

    name: str
    pair: str
    source: str
    reading: str = ""


VARIANTS = {
    "magnitude+": LayerChoice(scoring="magnitude", keep_first=4, keep_last=2),
    "taylor+": LayerChoice(scoring="taylor", keep_first=4, keep_last=2),
    "sleb": LayerChoice(scoring="perplexity", rounds="each", keep_first=1, keep_last=1),
}
"""Published ways of using a score that protect layers at the ends."""

WITHOUT_TASK = "the early run learns the calibration text, because there is no task"


def layer_choices() -> dict[str, LayerChoice]:
    """Name → which layers go: every score as its file declares, every selection that has a score of
    its own, and the published variants.
    """
    choices: dict[str, LayerChoice] = {}
    for name in available("scoring"):
        method = describe("scoring", name)
        if method.strategy not in available("selection") or name in VARIANTS:
            raise RecipeError(
                f"scoring '{name}' cannot be compared: its strategy '{method.strategy}' is no "
                "selection, or its name is that of a published variant. Change its file."
            )
        choices[name] = LayerChoice(scoring=name, strategy=method.strategy, rounds=method.rounds)
    for name in available("selection"):
        scoring = describe("selection", name).needs_scoring
        if scoring is not None and choices[scoring].strategy != name:
            choices[name] = LayerChoice(scoring=scoring, strategy=name)
    return choices | VARIANTS


def parse_pair(name: str) -> Entry:
    """The entry that ``SCORE+RECOVERY`` names.

    Raises:
        RecipeError: a part is unknown; the closest name is suggested.
    """
    choice_name, plus, recovery = name.rpartition("+")
    choices = layer_choices()
    if not plus:
        known = (*PRESETS, *GROUPS, *(f"{choice}+none" for choice in choices))
        raise RecipeError(
            f"unknown method '{name}'{suggestion(name, known)} (presets: {', '.join(PRESETS)}; or "
            "SCORE+RECOVERY, published, all)"
        )
    recoveries = available("recovery")
    if recovery not in recoveries:
        hint = suggestion(recovery, recoveries)
        raise RecipeError(
            f"method '{name}': unknown recovery '{recovery}'{hint} (known: {', '.join(recoveries)})"
        )
    base, at, rounds = choice_name.partition("@")
    if base not in choices:
        hint = suggestion(base, choices)
        raise RecipeError(
            f"method '{name}': unknown score '{base}'{hint} (known: {', '.join(choices)})"
        )
    choice = choices[base]
    if at:
        if rounds not in get_args(Rounds) or choice.strategy != "lowest":
            raise RecipeError(
                f"method '{name}': after @ stands each or one-shot, and only behind a score whose "
                "lowest layers go."
            )
        choice = replace(choice, rounds=cast(Rounds, rounds))
    learns = (describe("scoring", choice.scoring), describe("recovery", recovery))
    reading = WITHOUT_TASK if any(method.needs_tasks for method in learns) else ""
    return Entry(
        name=name, choice=choice, choice_name=choice_name, recovery=recovery, reading=reading
    )


ONCE = (
    "the paper compensates after every dropped layer and scores the compensated model; here layers "
    "are scored in rounds and compensated once, at the end"
)
OURS = Preset("ours", "priced-cuts+refit", "layercut's default")
CONTROLS = (
    Preset("random", "random+none", "control"),
    Preset("reverse-order", "reverse-order+none", "control; arXiv:2411.15558"),
)
PUBLISHED = (
    Preset("shortgpt", "block-influence+none", "arXiv:2403.03853"),
    Preset("uidl", "angular-distance+none", "arXiv:2403.17887"),
    Preset("sleb", "sleb+none", "arXiv:2402.09025"),
    Preset("shortened-llama-ppl", "perplexity+none", "arXiv:2402.02834"),
    Preset("shortened-llama-taylor", "taylor++none", "arXiv:2402.02834"),
    Preset("magnitude+", "magnitude++none", "arXiv:2402.02834"),
    Preset(
        "laco",
        "block-influence+laco",
        "arXiv:2402.11187",
        "the paper merges wherever the model's output stays similar beyond a threshold; here block "
        "influence says where, so that the number of layers can be given",
    ),
    Preset("replaceme", "angular-distance+linear-map", "arXiv:2505.02819"),
    Preset("prune-and-comp", "block-influence@each+magnitude-rescale", "arXiv:2507.18212", ONCE),
    Preset("prune-and-comp-ppl", "perplexity@each+magnitude-rescale", "arXiv:2507.18212", ONCE),
    Preset("linear-patch", "angular-distance+linear-patch", "arXiv:2505.24680"),
    Preset(
        "ghost",
        "angular-distance+ghost",
        "arXiv:2605.15491",
        "the extra operation stands at the cut of the block that angular distance chooses",
    ),
    Preset("gradmap", "gradmap+projection", "arXiv:2602.14649"),
    Preset(
        "gradpruner",
        "igia+sign-merge",
        "arXiv:2601.19503",
        f"{WITHOUT_TASK}; the paper fine-tunes after the merge, which here stands alone",
    ),
)
PRESETS = {preset.name: preset for preset in (OURS, *PUBLISHED, *CONTROLS)}
GROUPS = ("published", "all")
DEFAULT = ("ours", "gradmap", "shortgpt", "uidl", "replaceme", "reverse-order")


def parse_methods(names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries that ``names`` stand for, in order, each once.

    Args:
        names: presets, pairs, ``published`` (every preset), or ``all`` (every preset and pair).

    Raises:
        RecipeError: a name is unknown; the closest one is suggested.
    """
    entries = [entry for name in names for entry in _expand(name)]
    if not entries:
        raise RecipeError("methods is empty. Name one, or published.")
    by_pair: dict[str, Entry] = {}
    for entry in entries:
        by_pair.setdefault(entry.pair, entry)
    return tuple(by_pair.values())


def _expand(name: str) -> list[Entry]:
    if name == "published":
        return [_resolve_preset(preset) for preset in PRESETS.values()]
    if name == "all":
        recoveries = available("recovery")
        pairs = [f"{choice}+{recovery}" for choice in layer_choices() for recovery in recoveries]
        return [*_expand("published"), *map(parse_pair, pairs)]
    if name in PRESETS:
        return [_resolve_preset(PRESETS[name])]
    return [parse_pair(name)]


def _resolve_preset(preset: Preset) -> Entry:
    entry = parse_pair(preset.pair)
    reading = preset.reading or entry.reading
    return replace(entry, name=preset.name, source=preset.source, reading=reading)
