"""Stand-ins for parts of a model's forward pass, and a look at what passes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.utils import ModelOutput

PASSED_ON = "prev_topk_indices"
"""What a layer with an indexer of its own returns, and later ones are given in their turn."""


@dataclass
class DecoderOutput(ModelOutput):  # type: ignore[misc]
    """What the decoder hands to the head, with ``None`` for all that it does not have."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        return None


def prepare_for_inference(model: Any) -> Any:
    """A model in evaluation mode, without gradients, that skips no layer by chance when trained."""
    for module in model.modules():
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
    return model.eval().requires_grad_(False)


def identity(n_outputs: int) -> Callable[..., Any]:
    """The forward pass of a layer that changes nothing and returns what the others do.

    Args:
        n_outputs: length of the tuple that they return; 0 for a tensor.
    """

    def forward(hidden_states: Tensor, *_: Any, **kwargs: Any) -> Any:
        if not n_outputs:
            return hidden_states
        rest: list[Any] = [None] * (n_outputs - 1)
        if PASSED_ON in kwargs:
            rest[0] = kwargs[PASSED_ON]
        return hidden_states, *rest

    return forward


def capture(
    module: nn.Module, keep: Callable[[Tensor, Tensor], None]
) -> AbstractContextManager[None]:
    """Call ``keep(input, output)`` at every forward pass of ``module`` inside the block."""

    @contextmanager
    def block() -> Iterator[None]:
        def hook(_: nn.Module, args: Sequence[Tensor], output: Any) -> None:
            keep(args[0], output if isinstance(output, Tensor) else output[0])

        handle = module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    return block()
