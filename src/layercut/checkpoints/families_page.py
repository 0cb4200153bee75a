"""docs/families.md, generated from the rules: ``python -m layercut.checkpoints.families_page``."""

from __future__ import annotations

from pathlib import Path

from layercut.checkpoints.families import (
    ATTENTION_OUTPUTS,
    DOWN_PROJECTIONS,
    EXPERT_BLOCKS,
    FAMILIES,
    INDEX_LISTS,
    LAYER_COUNTS,
    MTP_COUNTS,
    MTP_PREFIX,
    NOT_PER_LAYER,
    PER_LAYER_STRINGS,
    PREFIX_COUNTS,
    RE_KEYED,
    STEPS,
    SUFFIX_COUNTS,
    FamilyRules,
)

PAGE = Path(__file__).parents[3] / "docs" / "families.md"

HEAD = """# Model families

<!-- Written by `python -m layercut.checkpoints.families_page`; do not edit. -->

Any decoder-only model that transformers builds as a causal language model can be pruned, in a
multimodal wrapper too (the text decoder is pruned, the rest is copied). A family that is built like
Llama needs no rule. What layercut does not know, it refuses; it is never guessed:

1. the weights' names and shapes must be exactly those of the configured model;
2. every per-layer value that transformers derives from the pruned configuration must be the kept
   layers' old one, and every module that it builds must be the kept layer's (class, shapes,
   windows, scales);
3. the pruned model must give bit for bit the logits of the dense one with its dropped layers passed
   over (within rounding where a rule rescales weights);
4. the written checkpoint, reloaded, must give those logits again, and with a cache as without.

## Keys that are edited in every family

| kind | keys | becomes |
|---|---|---|
"""

MIDDLE = """
## What is special to a family

Every other family has nothing special, but for this: where `indexer_types` says that later layers
reuse what a `full` layer selects, that layer must stay, and the layers are not scored.

| model type | special |
|---|---|
"""

TAIL = """
## Recovery

`projection` and `linear-map` fold a d × d matrix into all weights that write a layer's MLP output
to the residual stream: one down-projection (`Linear` or `Conv1D`), or those of all routed and
shared experts.
`refit` fits one down-projection per layer, so it refuses mixtures of experts; where a layer has an
attention output projection that is known, it is refitted first. Its gradient steps move all linear
weights of the kept layers that the checkpoint stores as such. `sign-merge` and `igia` need LoRA
adapters on every weight, so they refuse experts that are stored as one tensor.

Before `projection`, `linear-map` and `refit` compute anything, every layer is tried out: doubling
half of the coordinates of its MLP's output must change the layer's output by just that. A norm
behind the projection (Gemma 2 and 3, OLMo 2 and 3) or a factor (Granite's `residual_multiplier`)
fails that test and is refused; parallel attention and MLP (GPT-NeoX, Falcon, GPT-J, Phi) pass it.

`magnitude-rescale` tries out another property: doubling what enters a layer and all that the layer
writes must double its output, and the final norm must remove the factor. A norm behind the
projections fails that, Granite's factor passes it. `laco` adds weights of equal name and shape.

"""


def markdown() -> str:
    """The whole page."""
    lines = [f"| {kind} | {_code(keys)} | {becomes} |" for kind, keys, becomes in _generic()]
    special = [
        f"| `{name}` | {'; '.join(_special(rules))} |" for name, rules in sorted(FAMILIES.items())
    ]
    places = [
        f"- MLP outputs: {_code(DOWN_PROJECTIONS)}; of experts, the output of "
        f"{_code(EXPERT_BLOCKS)}.",
        f"- Attention outputs: {_code(ATTENTION_OUTPUTS)}.",
    ]
    parts = (lines, special, places)
    body = ["\n".join(part) + "\n" for part in parts]
    return HEAD + body[0] + MIDDLE + body[1] + TAIL + body[2]


def _generic() -> list[tuple[str, tuple[str, ...], str]]:
    return [
        ("lists of layer numbers", INDEX_LISTS, "the kept ones' new numbers"),
        ("the first n layers", PREFIX_COUNTS, "the kept ones among them"),
        ("the last n layers", SUFFIX_COUNTS, "the kept ones among them"),
        ("every s-th layer is sparse", tuple(STEPS), f"1, with {_code(tuple(STEPS.values()))}"),
        ("objects keyed by layer", RE_KEYED, "the kept ones, renumbered"),
        ("one letter per layer", PER_LAYER_STRINGS, "the kept ones' letters"),
        ("the number of layers", LAYER_COUNTS, "that of the kept ones, in every spelling"),
        (
            "multi-token prediction",
            MTP_COUNTS,
            f"0, and the layers behind the decoder go; tensors named `{MTP_PREFIX}…` are carried "
            "along with their count",
        ),
        (
            "any other list with one entry per layer",
            ("layer_types", "no_rope_layers", "…"),
            f"the kept ones' entries (but for `{NOT_PER_LAYER.pattern.replace('|', ', ')}`)",
        ),
    ]


def _special(rules: FamilyRules) -> list[str]:
    found = []
    if rules.refused:
        found.append(f"refused: {rules.refused}")
    if rules.unscorable:
        found.append(f"not scored, name the layers with `selection.drop`: {rules.unscorable}")
    found += [f"keeps {PINS[pin.where]}: {pin.why}" for pin in rules.pinned]
    found += [f"`{key}` is spelled out, one entry per kept layer" for key in rules.patterns]
    if rules.sliced:
        found.append(f"{_code(tuple(rules.sliced))} lose the dropped layers' blocks")
    if rules.index_scaled:
        flag, projection = rules.index_scaled
        found.append(f"with `{flag}`, the queries in `{projection}` take a factor")
    return found


PINS = {
    "first": "layer 0",
    "last": "the last layer",
    "kv-producers": "the layers that store keys and values for others",
}


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(name if name == "…" else f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(markdown(), encoding="utf-8")
