"""The refit of routed experts, whose output Σ_k p_k(t) · W_k·a_k(t) is linear in all W_k at once.

Source   docs/methods.md#refit
Formula  first one map for all, W_k ← (I + D)·W_k, fitted on the block's output; then every W_k on
         p_k·a_k, and shared experts once more, by sweeps: `layercut.recovery.expert_sweeps`
Rule     an expert that fewer tokens reach than twice its inputs has the map for all alone
Cost     one more reading of the block's inputs and its sums, in² per expert, for every sweep
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream, advance_and_record
from layercut.models.experts import DOWN, Experts, Routing, capture_routing
from layercut.models.hooks import capture
from layercut.models.output_projections import store_like
from layercut.models.view import DecoderView
from layercut.models.writers import Writer
from layercut.recovery.expert_sweeps import Member, Part, Sweeps
from layercut.recovery.writer_fit import (
    ROUNDS,
    ThroughNorm,
    WriterRows,
    choose_fit_device,
    fit_ridge_update,
    marked_slices,
    weigh,
)
from layercut.spool import SLICE, Spool

TOKENS_PER_INPUT = 2


def record_writer(
    stream: ResidualStream, layer: int, writer: Writer, *, routing: bool = False
) -> tuple[Spool, Spool | None, Routing | None]:
    """Move ``stream`` past ``layer`` and keep what a fit of one of its writers reads.

    Args:
        stream: moved.
        layer: the layer that it enters.
        writer: of that layer.
        routing: keep what routed experts read as well, and where it was sent.

    Returns:
        The rows that a map is fitted on, (n_tokens, in): a, or what a block of experts returns;
        what the norm behind the writer reads, where there is one; and the routing, where it is
        asked for.
    """
    n_tokens, width = len(stream.states), stream.states.rows.shape[1]
    outputs = None
    with ExitStack() as stack:
        if writer.norm is not None:
            outputs = Spool(n_tokens, width, device=stream.view.device)
            write = stack.enter_context(outputs.filling())
            if writer.norm.module is None:
                stack.enter_context(capture(writer.module, write))
            else:  # what it reads may be the sum of several writers
                stack.enter_context(capture(writer.norm.module, lambda z, _: write(z, z)))
        if writer.experts is None:
            return advance_and_record(stream, layer, writer.module), outputs, None
        written, sent = _record_experts(stream, layer, writer.experts, routing=routing)
    return written, outputs, sent


def _record_experts(
    stream: ResidualStream, layer: int, experts: Experts, *, routing: bool
) -> tuple[Spool, Routing | None]:
    """Move ``stream`` past ``layer``; what its block of experts returned, and where tokens went."""
    n_tokens, width = len(stream.states), stream.states.rows.shape[1]
    written = Spool(n_tokens, width, device=stream.view.device)
    inputs: Spool | None = None
    parts: list[Routing] = []
    done = read = 0

    def keep(found: Routing, output: Any) -> None:
        nonlocal inputs, done, read
        n = min(stream.micro_batch * stream.seq_len, n_tokens - done)
        written.write(done, experts.add_up(output, n).float())
        if routing:
            if inputs is None:
                per_token = int(found.tokens.bincount().max()) if experts.gates_input else 1
                inputs = Spool(n_tokens * per_token, found.inputs.shape[1], device=written.device)
            inputs.write(read, found.inputs)
            parts.append(replace(found, tokens=found.tokens + done, rows=found.rows + read))
            read += len(found.inputs)
        done += n

    with capture_routing(experts, keep):
        stream.advance(layer)
    if inputs is None:
        return written, None
    names = "tokens", "experts", "rows", "gates"
    joined = [torch.cat([getattr(part, name) for part in parts]) for name in names]
    return written, Routing(inputs.rows, *joined)


def fit_experts(
    view: DecoderView,
    writer: Writer,
    rows: WriterRows,
    routing: Routing | None,
    beside: Sequence[tuple[Writer, Spool, Tensor]] = (),
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The replaced tensors that lower the held-out error, and how many experts got what.

    Args:
        view: the model; the writer's layer is in memory.
        writer: the block.
        rows: of all calibration tokens; its inputs are z.
        routing: where every token was sent; ``None``: the map for all experts is enough.
        beside: shared experts, what they read, and their present weights.

    Returns:
        The tensors; and the numbers of experts, of maps for all of them (0 or 1), of experts
        fitted one by one, and of those that no token reached.
    """
    experts = writer.experts
    assert experts is not None
    device = choose_fit_device(view, rows, max(experts.width, rows.inputs.rows.shape[1]))
    through = None
    if writer.norm is None:
        change = fit_ridge_update(rows, writer.factor, device)
    else:
        through = ThroughNorm(writer, writer.norm, rows, device)
        change = through.fit_map()
    found: dict[str, Tensor] = {}
    counts = {"experts": experts.n_experts, "mapped": int(change is not None)}
    counts |= {"fitted": 0, "not_reached": 0}
    # A shared expert that adds to the same sum has taken a part of their changes on itself.
    beside = [b for b in beside if b[0].factor == writer.factor and is_same_norm(b[0], writer)]
    if routing is not None:
        reached, members = _list_experts(experts, routing, rows)
        counts["not_reached"] = int((reached == 0).sum())
        if members:
            members += [_list_shared(shared, inputs) for shared, inputs, _ in beside]
        sweep = partial(Sweeps, members, held_out=rows.held_out, ranks=rows.ranks, device=device)
        if through is None:
            found, _ = sweep(*_plain_residual(writer, rows, change, device)).run()
        else:
            found = _sweep_through_norm(through, sweep)
    changed: dict[str, Tensor] = {}
    for shared, _, weight in beside:
        own = found.pop(shared.prefix, None)
        if own is not None:
            changed[f"{shared.prefix}.weight"] = weight + store_like(shared.module, own).to(weight)
    counts["fitted"] = len(found)
    changed |= _change_weights(writer, change, {int(name): d for name, d in found.items()})
    return changed | (through.fit_gain(view) if through is not None else {}), counts


def _sweep_through_norm(through: ThroughNorm, sweep: Callable[..., Sweeps]) -> dict[str, Tensor]:
    """The members' changes by Gauss–Newton, each round as far as the held-out error falls."""
    total: dict[str, Tensor] = {}
    for _ in range(ROUNDS):
        found, moved = sweep(*through.residuals()).run()
        step = through.choose_step(moved) if found else 0.0
        if step == 0:
            break
        through.move(step, moved)
        for name, change in found.items():
            total[name] = step * change + total[name] if name in total else step * change
    return total


def is_same_norm(one: Writer, other: Writer) -> bool:
    """Whether two writers add to one sum: without a norm, or in front of the same one."""
    a, b = one.norm and one.norm.module, other.norm and other.norm.module
    return a is b and (one.norm is None) == (other.norm is None) and (a is not None or not one.norm)


def _list_experts(
    experts: Experts, routing: Routing, rows: WriterRows
) -> tuple[Tensor, list[Member]]:
    """How many tokens reach every expert, and the members that enough of them reach."""
    held_out = rows.held_out.to(routing.tokens.device)
    n = experts.n_experts
    counts = routing.experts.bincount(minlength=n)
    entries = routing.experts.argsort(stable=True).split(counts.tolist())
    reached = counts.double().cpu()
    fitted = routing.experts[~held_out[routing.tokens]].bincount(minlength=n).double().cpu()
    rows.ranks.sum_(reached, fitted)
    chosen = (fitted >= TOKENS_PER_INPUT * experts.width).nonzero().squeeze(1).tolist()
    return reached, [
        Member(str(k), experts.width, partial(_read_expert, experts, routing, k, entries[k]))
        for k in chosen
    ]


def _read_expert(experts: Experts, routing: Routing, expert: int, own: Tensor) -> list[Part]:
    """The tokens that reach an expert, and their p·a; ``own`` are its entries of the routing."""
    parts = []
    weight = getattr(experts.module, DOWN)
    for entries in own.split(SLICE):
        rows = routing.rows[entries].to(routing.inputs.device)
        inputs = routing.inputs[rows].to(weight.device, weight.dtype)
        a = experts.read(expert, inputs).float()
        gates = routing.gates[entries, None].to(a.device)
        parts.append((routing.tokens[entries], a * gates))
    return parts


def _list_shared(writer: Writer, inputs: Spool) -> Member:
    """A shared expert, which every token reaches."""

    def parts() -> list[Part]:
        starts = range(0, len(inputs), SLICE)
        tokens = [torch.arange(start, min(start + SLICE, len(inputs))) for start in starts]
        return list(zip(tokens, inputs.slices(), strict=True))

    return Member(writer.prefix, inputs.rows.shape[1], parts)


def _plain_residual(
    writer: Writer, rows: WriterRows, change: Tensor | None, device: torch.device
) -> tuple[Spool, Tensor]:
    """What z lacks once the map for all experts is applied, and the weight of every token's."""
    residual = Spool(len(rows.stream), rows.stream.rows.shape[1], device=rows.stream.device)
    weights: list[Tensor] = []
    right = None if change is None else change.float().T
    everything = torch.ones_like(rows.held_out)
    parts = marked_slices(everything, device, rows.inputs, rows.stream, rows.target)
    for place, (z, stream, target) in enumerate(parts):
        left = (target - stream) / writer.factor
        residual.write(place * SLICE, left if right is None else left - z @ right)
        weights.append(weigh(target))
    return residual, torch.cat(weights)


def _change_weights(
    writer: Writer, change: Tensor | None, own: dict[int, Tensor]
) -> dict[str, Tensor]:
    """The block's tensors with (I + D)·W_k + D_k for every expert k, as they are stored."""
    experts = writer.experts
    assert experts is not None
    if change is None and not own:
        return {}
    stored: Tensor = getattr(experts.module, DOWN)
    new = stored.detach().clone()
    for expert in range(experts.n_experts):
        weight = experts.weight(expert).detach().float()
        if change is not None:
            weight = weight + change.float().to(weight.device) @ weight
        if expert in own:
            weight = weight + own[expert].to(weight.device)
        new[expert] = (weight.T if experts.output_last else weight).to(new.dtype)
    changed = {f"{writer.prefix}.{DOWN}": new}
    bias = getattr(experts.module, f"{DOWN}_bias", None)
    if bias is not None and change is not None:
        bias = bias.detach()
        moved = bias.float() @ change.float().T.to(bias.device)
        changed[f"{writer.prefix}.{DOWN}_bias"] = (bias.float() + moved).to(bias.dtype)
    return changed
