"""What a layer drop must edit in a model's configuration and shared tensors, as data.

A Llama-like family needs no row. The keys below mean the same in every family that has them; a row
of `FAMILIES` names what is special to one. Safety does not rest on these tables:
`layercut.checkpoints.config_edit` refuses every plan after which a kept layer would be another one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

INDEX_LISTS = (
    "moe_layers",
    "mlp_only_layers",
    "attn_layer_indices",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "cross_attention_layers",
    "kv_source_layers",
    "local_layer_ids",
)
"""Keys that list layer numbers; they may well have one entry per layer by chance."""
ONE_BASED_LISTS = ("ple_layer_ids",)
"""Keys that list layer numbers, the first layer being 1."""
PREFIX_COUNTS = (
    "first_k_dense_replace",
    "num_dense_layers",
    "max_window_layers",
    "moe_layer_start_index",
)
"""Keys that mean "the first n layers"."""
SUFFIX_COUNTS = ("num_kv_shared_layers",)
"""Keys that mean "the last n layers"."""
STEPS = {"decoder_sparse_step": "mlp_only_layers"}
"""Every s-th layer is sparse unless listed; written as step 1 and a list of the dense ones."""
RE_KEYED = ("per_layer_config",)
"""Objects whose keys are layer numbers."""
PER_LAYER_STRINGS = ("hybrid_override_pattern",)
"""Strings with one letter per layer."""
MTP_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""Multi-token prediction layers behind the decoder; 0 where their tensors are not written."""
MTP_PART = re.compile(r"(^|\.)mtp[._]")
"""In names of tensors that transformers passes over whatever the number of layers: carried."""
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks")
"""Keys by which engines look for the number of layers; a configuration may hold several."""
LENDING = {
    "indexer_types": (
        "full",
        "shared",
        "later layers attend to the positions that it selects (a shared indexer)",
    )
}
"""Per-layer key → the type that computes something, the type that reuses the last such layer's, and
why the former must stay."""
ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers")
"""Keys that only a configuration of an encoder-decoder has."""
FROM_PREVIOUS = re.compile(r"prev(ious)?_(?!topk_indices$).+")
"""What a layer is given by the one before beside the stream; selected positions have a rule."""
TYPE_LISTS = ("layer_types", "mlp_layer_types", "indexer_types")
"""Per-layer lists that may go on with entries for prediction layers behind the decoder's."""
LEFTOVER_TABLES = re.compile(
    r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|causal_mask))"
)
"""Masks and rotary tables that old checkpoints store in every layer; they are computed today."""
NOT_PER_LAYER = re.compile(
    r".*_ids?|.*_tokens|.*_labels|architectures|ssm_multipliers|mlp_multipliers|time_step_limit|"
    r"rope_.*"
)
"""Lists that have one entry per layer only by chance; every other list of that length is edited."""
INDEX_ATTRIBUTE = re.compile(r"(.*_)?(idx|index|id|number)")
"""Attributes of a layer's modules that may hold a layer's number, and then change with it."""
COUNT_ATTRIBUTE = re.compile(r"num_hidden_layers|n_layers?")
"""Attributes of a layer's modules that may hold the number of layers."""
INDEX_SCALED_ATTRIBUTES = frozenset({"scaling"})
"""What a layer's number enters where `FamilyRules.index_scaled` applies."""

ALWAYS_CAUSAL = ("gpt_neox", "gpt_neox_japanese")
"""Families that are causal although their configuration says ``is_decoder: false``."""

ATTENTION_OUTPUTS = (
    "self_attn.o_proj",
    "self_attn.out_proj",
    "self_attn.dense",
    "self_attention.dense",
    "attention.dense",
    "attn.attention.out_proj",
    "attn.c_proj",
    "attn.out_proj",
    "attn.Wo",
    "temporal_block.o_proj",
    "temporal_block.linear_out",
    "linear_attn.out_proj",
    "mixer.o_proj",
    "mixer.out_proj",
    "mamba.out_proj",
    "conv.out_proj",
    "self_attn.Wo",
)
"""Where a layer's attention, or what stands in for it, writes to the residual stream."""
DOWN_PROJECTIONS = (
    "mlp.down_proj",
    "mlp.c_proj",
    "mlp.dense_4h_to_h",
    "mlp.fc_out",
    "mlp.fc2",
    "mlp.Wo",
    "mlp_block.down_proj",
    "feed_forward.down_proj",
    "feed_forward.w2",
    "ffn.down_proj",
    "mixer.down_proj",
    "fc2",
)
"""Where a layer's MLP writes to the residual stream."""
SHARED_EXPERTS = (
    "mlp.shared_experts.down_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_mlp.down_proj",
    "mlp.shared_experts.w2",
    "feed_forward.shared_expert.down_proj",
    "shared_mlp.output_linear",
    "shared_mlp.down_proj",
    "block_sparse_moe.shared_experts.down_proj",
)
"""Where experts that every token passes through write, beside the routed ones."""
EXPERT_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
"""Modules whose output is a sum over routed, and perhaps shared, experts."""
EXPERT_DOWN_PROJECTIONS = re.compile(
    r"experts\.down_proj(_bias)?|shared_experts?\.down_proj\.(weight|bias)"
)
"""Parameters of such a module that write to its output."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Layers that cannot be dropped, and why.

    Attributes:
        where: the first layer, the last one, or those whose keys and values later layers reuse.
        why: ends the sentence "layer 3 cannot be dropped: …".
    """

    where: Literal["first", "last", "kv-producers"]
    why: str


@dataclass(frozen=True, slots=True)
class FamilyRules:
    """What is special about one ``model_type``.

    Attributes:
        refused: why no layer of it can be dropped exactly.
        unscorable: why its layers cannot be scored; they can still be named.
        pinned: layers that must stay.
        patterns: keys that spell the layer pattern as runs (``[[[types], times], …]``) or as a
            cycle that repeats over the layers.
        sliced: tensors outside of the layers that hold one equal block per layer → dimension.
        index_scaled: a flag of the configuration and the projection whose first part, the queries,
            must take a factor when it is set: the layer divides by its number.
    """

    refused: str = ""
    unscorable: str = ""
    pinned: tuple[Pin, ...] = ()
    patterns: Mapping[str, Literal["runs", "cycle"]] = field(default_factory=dict)
    sliced: Mapping[str, int] = field(default_factory=dict)
    index_scaled: tuple[str, str] | None = None


KV_PRODUCERS = Pin("kv-producers", "later layers reuse its keys and values (key-value sharing)")
LAST_IS_FULL = Pin("last", "transformers makes the last layer full_attention, whatever it was")
PER_LAYER_EMBEDDINGS = {
    "embed_tokens_per_layer.weight": 1,
    "per_layer_model_projection.weight": 0,
}
SHARED_KV = "later layers reuse earlier ones' keys and values, so that no layer runs alone"
SHARED_RESULTS = "later layers reuse what earlier ones compute, so that no layer runs alone"
SHARED_BLOCKS = "one shared transformer block serves several layers, and weights are tied by number"
RESCALED = "it halves the stream and its weights every few layers, counted by their numbers"
LISTS = "its layers return lists, which no other layer can stand in for"
PROMPT = "it puts a learned prompt before the text, so that states and tokens do not correspond"
CROSS_ATTENTION = "its layers also read another stream than the text's own"
BLOCK_SUMS = "its layers attend to the sums of whole groups of earlier layers, counted by number"
RECURRENT_STACKS = "its two stacks of layers run several times over, in turns"
SPREAD = "each of its layers is spread over several lists of modules"
DOUBLE = "each of its layers holds two of the layers that its configuration counts"
BIDIRECTIONAL = "its tokens see later ones"
DRAFTER = "it drafts for another model, whose states, keys and values it reads"

FAMILIES: dict[str, FamilyRules] = {
    "gemma3n_text": FamilyRules(
        unscorable=SHARED_KV, pinned=(KV_PRODUCERS,), sliced=PER_LAYER_EMBEDDINGS
    ),
    "gemma4_text": FamilyRules(
        unscorable=SHARED_KV,
        pinned=(KV_PRODUCERS, LAST_IS_FULL),
        sliced=PER_LAYER_EMBEDDINGS,
    ),
    "gemma4_unified_text": FamilyRules(pinned=(LAST_IS_FULL,)),
    "gpt2": FamilyRules(index_scaled=("scale_attn_by_inverse_layer_idx", "attn.c_attn")),
    "gpt_neo": FamilyRules(patterns={"attention_types": "runs"}),
    "minimax": FamilyRules(
        pinned=(Pin("first", "with a linear-attention layer in front, cached decoding goes wrong"),)
    ),
    "modernbert-decoder": FamilyRules(
        pinned=(Pin("first", "layer 0 alone has no norm before its attention"),)
    ),
    "recurrent_gemma": FamilyRules(patterns={"block_types": "cycle"}),
    "cpmant": FamilyRules(refused=PROMPT),
    "openai-gpt": FamilyRules(refused=LISTS),
    "rwkv": FamilyRules(refused=RESCALED),
    "gemma4_assistant": FamilyRules(refused=DRAFTER),
    "gemma4_unified_assistant": FamilyRules(refused=DRAFTER),
    "gpt_neox_japanese": FamilyRules(
        pinned=(Pin("last", "the last layer alone adds a bias behind its attention"),)
    ),
    "hrm_text": FamilyRules(refused=RECURRENT_STACKS),
    "inkling2_text": FamilyRules(refused=BLOCK_SUMS),
    "longcat_flash": FamilyRules(refused=DOUBLE),
    "xlm": FamilyRules(refused=SPREAD),
    "xlnet": FamilyRules(refused=BIDIRECTIONAL),
    "zamba": FamilyRules(refused=SHARED_BLOCKS),
    "zamba2": FamilyRules(refused=SHARED_BLOCKS),
    "mllama": FamilyRules(refused=CROSS_ATTENTION),
    "mllama_text_model": FamilyRules(refused=CROSS_ATTENTION),
    "blt": FamilyRules(refused=CROSS_ATTENTION),
}


def find_rules(model_type: str) -> FamilyRules:
    """The family's row; an empty one for a family that has nothing special."""
    return FAMILIES.get(model_type, FamilyRules())
