"""Routed experts that are stored as one tensor: what each of them reads, and which tokens reach it.

The output Σ_k p_k(t) · W_k·a_k(t) is linear in all W_k at once. How a_k follows from what the block
reads is the same rule in every family of transformers but Llama 4, where the gates p_k multiply
what is read. `layercut.models.writers` holds the sum by that rule against the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DOWN = "down_proj"


@dataclass(frozen=True, slots=True)
class Routing:
    """Which expert every token is sent to, one entry per token and expert, in any order.

    Attributes:
        inputs: what the experts read, (n_read, d).
        tokens: the entry's token, (n,), int64.
        experts: its expert, (n,), int64.
        rows: its row of ``inputs``, (n,), int64.
        gates: p, what the expert's output is multiplied by, (n,) float32.
    """

    inputs: Tensor
    tokens: Tensor
    experts: Tensor
    rows: Tensor
    gates: Tensor


@dataclass(frozen=True, slots=True)
class Experts:
    """A block of experts.

    Attributes:
        module: holds ``down_proj``, (experts, out, in) or (experts, in, out).
        n_experts: how many.
        width: what each down-projection reads.
        output_last: whether the last dimension of the weights is the output's.
        gates_input: whether p multiplies what is read, and not what is written.
    """

    module: Any
    n_experts: int
    width: int
    output_last: bool
    gates_input: bool

    def read(self, expert: int, inputs: Tensor) -> Tensor:
        """What one expert's down-projection reads, (n, in), of what the block does, (n, d)."""
        m = self.module
        if self.gates_input:
            gate, up = (inputs @ m.gate_up_proj[expert]).chunk(2, dim=-1)
            return up * m.act_fn(gate)  # type: ignore[no-any-return]
        name = "gate_up_proj" if m.has_gate else "up_proj"
        weight = getattr(m, name)[expert]
        raised = inputs @ (weight if m.is_transposed else weight.T)
        if m.has_bias:
            raised = raised + getattr(m, f"{name}_bias")[expert]
        return m._apply_gate(raised) if m.has_gate else m.act_fn(raised)  # type: ignore[no-any-return]

    def weight(self, expert: int) -> Tensor:
        """W of one expert, (out, in)."""
        stored: Tensor = getattr(self.module, DOWN)[expert]
        return stored.T if self.output_last else stored

    def bias(self, expert: int) -> Tensor | None:
        """What one expert adds to W·a, (out,)."""
        biases = getattr(self.module, f"{DOWN}_bias", None)
        return None if biases is None else biases[expert]

    def route(self, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Routing:
        """What one call of the module says about routing."""
        bound = inspect.signature(type(self.module).forward).bind(None, *inputs, **keywords)
        hidden, *rest = [value for value in bound.args[1:] if isinstance(value, Tensor)]
        hidden = hidden.flatten(0, -2)
        device = hidden.device
        if self.gates_input:
            n_tokens = len(hidden) // self.n_experts
            rows = hidden.abs().amax(dim=1).nonzero().squeeze(1)
            tokens, experts = rows % n_tokens, rows // n_tokens
            order = torch.arange(len(rows), device=device)
            return Routing(hidden[rows], tokens, experts, order, torch.ones_like(rows).float())
        index, gates = rest
        tokens = torch.arange(len(hidden), device=device).repeat_interleave(index.shape[1])
        experts, gates = index.flatten(), gates.flatten().float()
        known = experts < self.n_experts  # a number behind the last one is no expert
        tokens = tokens[known]
        return Routing(hidden, tokens, experts[known], tokens, gates[known])

    def add_up(self, output: Tensor, n_tokens: int) -> Tensor:
        """The block's output, (n_tokens, d), of what its module returns."""
        return output.view(-1, n_tokens, output.shape[-1]).sum(dim=0)


def find_experts(layer: nn.Module) -> dict[str, Experts]:
    """The blocks of experts of one layer whose rule is known, by their path in it."""
    found = {}
    for path, module in layer.named_modules():
        weight = getattr(module, DOWN, None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 3:
            continue
        parameters = inspect.signature(type(module).forward).parameters
        gates_input = len(parameters) == 2
        if not gates_input and not (len(parameters) == 4 and hasattr(module, "has_gate")):
            continue
        output_last = gates_input or bool(module.is_transposed)
        width = weight.shape[1 if output_last else 2]
        found[path] = Experts(module, len(weight), width, output_last, gates_input)
    return found


@contextmanager
def capture_routing(experts: Experts, keep: Callable[[Routing, Any], None]) -> Iterator[None]:
    """Call ``keep(routing, output)`` at every forward pass of the block inside the ``with``."""

    def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        keep(experts.route(args, keywords), output)

    handle = experts.module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def add_experts(experts: Experts, routing: Routing, n_tokens: int) -> Tensor:
    """Σ_k p_k · (W_k·a_k + b_k) by the rule, (n_tokens, d) float32."""
    total: Tensor | None = None
    for expert in range(experts.n_experts):
        entries = (routing.experts == expert).nonzero().squeeze(1)
        a = experts.read(expert, routing.inputs[routing.rows[entries]])
        written = a @ experts.weight(expert).T
        if (bias := experts.bias(expert)) is not None:
            written = written + bias
        written = written.float() * routing.gates[entries, None]
        if total is None:
            total = torch.zeros(n_tokens, written.shape[1], device=written.device)
        total.index_add_(0, routing.tokens[entries], written)
    assert total is not None
    return total
