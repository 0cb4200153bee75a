"""docs/families.md, generated from the rules: ``python scripts/families_page.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layercut.checkpoints.families import (
    ATTENTION_OUTPUTS,
    DOWN_PROJECTIONS,
    EXPERT_BLOCKS,
    FAMILIES,
    INDEX_LISTS,
    LAYER_COUNTS,
    MTP_COUNTS,
    NOT_PER_LAYER,
    ONE_BASED_LISTS,
    PER_LAYER_STRINGS,
    PREFIX_COUNTS,
    RE_KEYED,
    STEPS,
    SUFFIX_COUNTS,
    FamilyRules,
)

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "families.md"
sys.path.append(str(ROOT / "tests" / "support"))

from decoder_status import CACHE_INEXACT, NOT_BUILT, REFUSED  # noqa: E402
from family_configs import FAMILIES as CONFIGURATIONS  # noqa: E402
from method_status import UNEQUAL, UNSCORED, WHY, find_refusal  # noqa: E402

HEAD = """# Model families

<!-- Written by `python scripts/families_page.py`; do not edit. -->

Any decoder-only model that transformers builds as a causal language model can be pruned, in a
multimodal wrapper too (the text decoder is pruned, the rest is copied). The decoder is what
transformers' own conversion loads from the files, whatever its prefix there. A family that is built
like Llama needs no rule. What layercut does not know, it refuses; it is never guessed:

1. the weights' names and shapes must be exactly those of the configured model;
2. every per-layer value that transformers derives from the pruned configuration must be the kept
   layers' old one, and every module that it builds must be the kept layer's (class, shapes,
   windows, scales);
3. the pruned model must give bit for bit the logits of the dense one with its dropped layers passed
   over (within rounding where a rule rescales weights);
4. the written checkpoint, reloaded, must give those logits again, and with a cache as without;
5. a hybrid keeps at least one layer with keys and values: transformers reads the length of what it
   has cached from such a layer.

A checkpoint may name code of its own (`auto_map`), as those of DeepSeek, Phi and Falcon do. That
code is never run. If its classes are called as transformers' own for that model type, the
checkpoint is read as the built-in family, with a warning; else it is refused. The written
`config.json` has no `auto_map`: the files that it names are not copied, and readers that trust
them would fail.

## Why layers are not cut out in memory

Taking layers out of a loaded model and lowering the count is wrong for many families, often
without an error:

- transformers fills tensors that a checkpoint lacks with random numbers. Surplus ones get a log
  line.
- A layer's type may follow from its number. After a shift, masks, windows or rotary tables are
  those of another layer. That concerns Qwen2 and Qwen3 with sliding windows, Gemma 2 and 3,
  OLMo 3, GPT-OSS, Llama 4, Cohere 2, EXAONE 4, AFMoE and ModernBERT.
- Other families go wrong only after saving and loading: Qwen3-MoE, DeepSeek-V2 and V3, GLM-4-MoE,
  Jamba, Nemotron-H, RecurrentGemma, and GPT-2 with `scale_attn_by_inverse_layer_idx`.
- transformers checks the length of `layer_types`. It does not check lists of layer numbers, counts
  of first layers, steps, or `no_rope_layers`: in SmolLM3, a stale one changes logits by 0.05.
- Attention layers use their number as a place in the cache. With old numbers, decoding with a
  cache ends in an `IndexError`, or uses another layer's entries.

So layercut edits the configuration, builds a new model from it, loads the kept tensors under new
names with every name and shape required, and compares the logits.

## Keys that are edited in every family

| kind | keys | becomes |
|---|---|---|
"""

MIDDLE = """
The order matters. Lists of layer numbers come first, because some have one entry per layer by
chance (Llama 4's `moe_layers`, LFM2's `full_attn_idxs`). The number of layers comes last.
`max_window_layers` means "from this layer on" in Qwen2 and Qwen3; the families' own rules are
checked against what transformers builds. The original `config.json` is edited as text, so that keys
which other engines read, such as `rope_theta`, keep their spelling. Constants that were tuned to
the depth, such as Granite's `residual_multiplier`, stay as they are.

Names are those on disk. In memory, experts are one tensor per layer; on disk, many checkpoints hold
each expert apart. Layers for multi-token prediction are stored behind the decoder's
(`layers.61` of DeepSeek-V3). They go, and their count becomes 0.

## What is special to a family

Every other family has nothing special, but for this: where `indexer_types` says that later layers
reuse what a `full` layer selects, that layer must stay, and the layers are not scored.

| model type | special |
|---|---|
"""

TAIL = """
- **GPT-2 with `scale_attn_by_inverse_layer_idx`** divides attention by the layer's number. The
  query part of `c_attn`, weight and bias, is multiplied by (new + 1)/(old + 1). Logits agree to
  5e-7, not bit for bit.
- **Jamba** derives its pattern from a period and an offset. It can only lose layers after which the
  pattern is the same: whole periods, or the last layer alone.
- **Gemma 3n and 4** share keys and values. Without a layer that stores them, later layers would
  read those of another layer.
- **Nemotron-H** counts each mixer (attention, Mamba, MLP or experts) as a layer. Its numbers of
  layers do not compare with those of other families.
- **MiniMax** decodes wrongly with a cache if its first layer is linear attention, by 0.13 to 0.19
  in the logits, even unpruned. Hence layer 0 stays.
- **OPT, XGLM and BioGPT** skip whole layers at random in training mode (`layerdrop`). layercut
  sets it to 0 when it loads a model, and scores in evaluation mode.

Layers that accelerate offloads to CPU or disk get no gradient, without an error. layercut therefore
loads a model onto one device.

## Recovery

`projection` and `linear-map` fold a d × d matrix into all weights that write a layer's MLP output
to the residual stream: one down-projection (`Linear` or `Conv1D`), or those of all routed and
shared experts.
`refit` corrects whatever writes to the residual stream by a linear map: attention, a recurrence or
a convolution in its place, the down-projection, shared and routed experts. A factor behind the map
(Granite) or a norm (Gemma 2 and 3, OLMo 2 and 3, EXAONE 4) is allowed for;
[methods.md](methods.md#refit) says how. Its gradient steps move all linear weights of the kept
layers that the checkpoint stores as such. `sign-merge` and `igia` need LoRA adapters on every
weight, so they refuse experts that are stored as one tensor, and Mamba's fused kernels, which read
weights past their adapters; heals and fine-tuning leave those weights as they are.

Before `projection` and `linear-map` compute anything, every layer is tried out: doubling
half of the coordinates of its MLP's output must change the layer's output by just that. A norm
behind the projection (Gemma 2 and 3, OLMo 2 and 3) or a factor (Granite's `residual_multiplier`)
fails that test and is refused; parallel attention and MLP (GPT-NeoX, Falcon, GPT-J, Phi) pass it.

`magnitude-rescale` tries out another property: doubling what enters a layer and all that the layer
writes must double its output, and the final norm must remove the factor. A norm behind the
projections fails that, Granite's factor passes it. `laco` adds weights of equal name and shape.

"""


def render() -> str:
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
    return HEAD + body[0] + MIDDLE + body[1] + TAIL + body[2] + _methods() + _status() + END


COLUMNS = {
    "scores but igia": "residual-sensitivity",
    "igia": "igia",
    "priced-cuts, refit": "refit",
    "projection, linear-map": "projection",
    "magnitude-rescale": "magnitude-rescale",
    "laco": "laco",
    "sign-merge": "sign-merge",
    "ghost, linear-patch": "ghost",
}
"""Columns of the table of methods, each with one of its methods; the others do as it does."""


def _methods() -> str:
    """Every method on every configuration that can be pruned."""
    numbers = {why: n for n, why in enumerate(WHY, 1)}
    rows = [f"| configuration | {' | '.join(COLUMNS)} |", f"|{'---|' * (len(COLUMNS) + 1)}"]
    for name, family in sorted(CONFIGURATIONS.items()):
        if family.unprunable:
            continue
        found = [find_refusal(method, name) for method in COLUMNS.values()]
        marks = [
            "●" if why is None else f"{'◐' if why == UNEQUAL else '○'} {numbers[why]}"
            for why in found
        ]
        rows.append(f"| {name} | {' | '.join(marks)} |")
    reasons = [f"{n}. {WHY[why]}" for why, n in numbers.items()]
    unscored = _code(tuple(UNSCORED))
    return METHODS.format(table="\n".join(rows), reasons="\n".join(reasons), unscored=unscored)


METHODS = """
## Every method on every configuration

● works as [methods.md](methods.md) says; ◐ works for some plans; ○ is refused before any compute,
for the reason with that number. Every cell is run by `pytest -m slow
tests/models/test_every_method.py`. The layers of {unscored} can still be named with
`selection.drop`. A model whose projections `refit` does not know, such as OPT-350m, is repaired by
gradient steps alone, with a warning.

{table}

{reasons}
"""


def _status() -> str:
    """What becomes of every causal model type of the installed transformers."""
    types = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    exact = sorted(types - REFUSED.keys() - NOT_BUILT.keys())
    refused = {name: why.replace("|", " or ") for name, why in REFUSED.items()}
    not_built = {name: why for name, (_, why) in NOT_BUILT.items()}
    return STATUS.format(
        n=len(types),
        n_exact=len(exact),
        exact=_code(tuple(exact)),
        n_refused=len(refused),
        refused=_rows(refused),
        not_built=_rows(not_built),
        inexact=_rows(CACHE_INEXACT),
    )


def _rows(reasons: Mapping[str, str]) -> str:
    return "\n".join(f"| `{name}` | {why} |" for name, why in sorted(reasons.items()))


def _generic() -> list[tuple[str, tuple[str, ...], str]]:
    return [
        ("lists of layer numbers", INDEX_LISTS, "the kept ones' new numbers"),
        ("the same, counted from 1", ONE_BASED_LISTS, "the kept ones' new numbers"),
        ("the first n layers", PREFIX_COUNTS, "the kept ones among them"),
        ("the last n layers", SUFFIX_COUNTS, "the kept ones among them"),
        ("every s-th layer is sparse", tuple(STEPS), f"1, with {_code(tuple(STEPS.values()))}"),
        ("objects keyed by layer", RE_KEYED, "the kept ones, renumbered"),
        ("one letter per layer", PER_LAYER_STRINGS, "the kept ones' letters"),
        ("the number of layers", LAYER_COUNTS, "that of the kept ones, in every spelling"),
        (
            "multi-token prediction",
            MTP_COUNTS,
            "0, and the layers behind the decoder go; tensors named `mtp.…` are carried "
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


STATUS = """
## Every causal model type

The {n} types that transformers maps to a causal language model. Each is built at toy size from its
own defaults and loses several sets of layers; a new type takes part by existing.

**Exact, whatever layers go** ({n_exact}): {exact}.

**Refused, for all or for some of the layers** ({n_refused}). The words are those of the message.

| model type | why |
|---|---|
{refused}

**Not built at toy size**, so not tried:

| model type | why |
|---|---|
{not_built}

**Cached decoding is inexact in transformers itself**, unpruned. The cached logits of a pruned model
are then not held against the uncached ones:

| model type | when |
|---|---|
{inexact}
"""

END = """
## How families are tested

Tiny random models of 51 configurations, mostly of 8 layers, lose several sets of layers. Windows
are shorter than the text, so that a wrong mask shows. The reference is the dense model with the
dropped layers passed over. Required are:

| compared | tolerance |
|---|---|
| logits without a cache | bit for bit (GPT-2 with inverse scaling: 5e-7) |
| logits with a cache, against those without | 1e-5 in the tests, 1e-4 in a run's own check |
| logits after saving and loading | bit for bit |

Cached and uncached logits differ by about 1e-6 even unpruned, and by 3e-5 in Qwen3-Next. Where the
sweep over all types finds more than 1e-5, it compares in float64. JetMoE
differs by 3e-7 between two loads, because its experts' sums have no fixed order.

The configurations: afmoe, bloom, cohere2, deepseek_v2, deepseek_v3, exaone4, falcon, falcon_h1,
gemma2, gemma3, gemma3n, gemma4, glm4_moe, gpt2, gpt2 with inverse scaling, gpt_neo, gpt_neox,
gpt_oss, gptj, granite, granitemoehybrid, jamba, lfm2, llama, llama4, mamba, minimax, mistral,
mixtral, modernbert-decoder, mpt, nemotron_h, olmo2, olmo3, olmoe, opt, phi, phi3, phimoe, qwen2,
qwen2_moe, qwen3, qwen3_moe, qwen3_next, qwen3_5_text, recurrent_gemma, seed_oss, smollm3, stablelm,
starcoder2, and zamba2, which is refused.
"""


PINS = {
    "first": "layer 0",
    "last": "the last layer",
    "kv-producers": "the layers that store keys and values for others",
}


def _code(names: tuple[str, ...]) -> str:
    return ", ".join(name if name == "…" else f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
