"""Floating-point operations of a forward pass, from the model's shapes alone.

Formula  per token: 2 · (entries of every matrix it passes through) + 2 · T · (width of all heads'
         queries and keys + width of all heads' values) per layer with softmax attention
         T = tokens of the context; a multiplication and an addition count as two
Meaning  of a mixture of experts only the active ones count, and the shared ones; as in the usual
         tools the causal mask halves nothing, and embeddings, norms and activations are left out
Limits   a layer without softmax attention (linear attention, a recurrence) counts by its matrices
         alone, a sliding window as a full context
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

FLOPS_CONTEXT = 512
"""Tokens of the context that is assumed, where the model allows as many."""

ACTIVE_EXPERTS = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""What configurations call the number of experts that each token passes through."""


def flops_per_token(view: DecoderView, *, context: int = FLOPS_CONTEXT) -> int | None:
    """Operations for one token of a forward pass over ``context`` tokens, the head included.

    Args:
        view: the model as it is now; skipped layers cost nothing.
        context: tokens in the sequence.

    Returns:
        The count, or ``None`` where a mixture of experts does not say how many are active.
    """
    head = view.model.get_output_embeddings()
    total = 0.0 if head is None else 2.0 * head.weight.numel()
    total += 2 * sum(_outside_layers(view))
    for layer in range(view.n_layers):
        if layer in view.skipped:
            continue
        entries = count_active_entries(view, layer)
        if entries is None:
            return None
        total += 2 * entries + 2 * context * attention_width(view, layer)
    return round(total)


def count_active_entries(view: DecoderView, layer: int) -> float | None:
    """Entries of a layer's matrices that one token passes through.

    Returns:
        The count, or ``None`` where a mixture of experts does not say how many are active.
    """
    experts = _expert_entries(view, layer)
    if experts is None:
        return None
    return experts + sum(m.weight.numel() for m in view.linear_modules(layer).values())


def _outside_layers(view: DecoderView) -> Iterator[int]:
    """Entries of the matrices between embedding, layers and head, such as OPT-350m has."""
    for name, module in view.decoder.named_modules():
        in_layer = any(part.isdigit() for part in name.split("."))
        if not in_layer and isinstance(module, nn.Linear | Conv1D):
            yield module.weight.numel()


def _expert_entries(view: DecoderView, layer: int) -> float | None:
    """Entries of the experts' matrices that one token passes through, and of their router's."""
    experts = view.expert_weights(layer)
    if not experts:
        return 0.0
    text = view.model.config.get_text_config(decoder=True)
    counts = (getattr(text, key, None) for key in ACTIVE_EXPERTS)
    active = next((value for value in counts if isinstance(value, int)), None)
    if active is None:
        return None
    n_experts = max(int(weight.shape[0]) for weight in experts.values())
    linear = {id(module.weight) for module in view.linear_modules(layer).values()}
    routers = sum(
        parameter.numel()
        for name, parameter in view.layers[layer].named_parameters()
        # A router is a bare matrix in most families, with a row per expert.
        if name.endswith("weight")
        and parameter.dim() == 2
        and parameter.shape[0] == n_experts
        and id(parameter) not in linear
    )
    return routers + sum(
        weight.numel() * min(1.0, active / int(weight.shape[0])) for weight in experts.values()
    )


def attention_width(view: DecoderView, layer: int) -> int:
    """Width of all heads' queries plus that of all heads' values; 0 without softmax attention."""
    text: Any = view.model.config.get_text_config(decoder=True)
    modules = [
        module
        for name, module in view.layers[layer].named_modules()
        if any(word in name.rpartition(".")[2] for word in ("attn", "attention"))
        and "linear" not in name
    ]
    if not modules:
        return 0
    kinds = getattr(text, "layer_types", None) or ()
    if len(kinds) == view.n_layers and kinds[layer].startswith("linear"):
        return 0
    n_heads = int(text.num_attention_heads)
    # A module knows its own width where the configuration has one for each layer.
    sizes = (getattr(module, "head_dim", None) for module in modules)
    head_dim = next((size for size in sizes if size), int(text.hidden_size) // n_heads)
    keys = getattr(text, "qk_head_dim", None) or head_dim  # latent attention has two widths
    values = getattr(text, "v_head_dim", None) or head_dim
    return n_heads * (int(keys) + int(values))
