"""A loaded model as lm-evaluation-harness sees one, its requests begun as the model's texts are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from layercut.checkpoints.hf_calls import guard
from layercut.data.encoding import OTHER_TEXT
from layercut.errors import DataError, ModelError

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

CANNOT_ENCODE = "the tokenizer cannot encode a task's row"
OTHER_TOKENIZER = "Use the model's own tokenizer."


def wrap_model(view: DecoderView, batch_size: int) -> Any:
    """The model as the harness sees one, in the arithmetic of the other evaluations."""
    from lm_eval.models.huggingface import HFLM

    leading = list(view.leading)

    class Model(HFLM):  # type: ignore[misc]
        """Without progress bars of its own, and with the tokenizer's leading tokens exactly once.

        Left to itself, the class ends requests where the tokenizer ends texts, puts the leading
        token twice before a text that it rolls over windows, and cuts it off a long prompt.
        """

        def tok_encode(
            self,
            string: str,
            add_special_tokens: bool | None = None,
            left_truncate_len: int | None = None,
            **_: Any,
        ) -> list[int]:
            with guard(CANNOT_ENCODE, DataError, OTHER_TEXT):
                ids = list(self.tokenizer.encode(string, add_special_tokens=False))
            if add_special_tokens is not False and ids[: len(leading)] != leading:
                ids = leading + ids
            return _shorten(ids, leading, left_truncate_len)

        def tok_batch_encode(
            self,
            strings: list[str],
            padding_side: str = "left",
            left_truncate_len: int | None = None,
            **_: Any,
        ) -> tuple[Tensor, Tensor]:
            ids = [self.tok_encode(text, left_truncate_len=left_truncate_len) for text in strings]
            with guard("the tokenizer cannot pad a task's rows", ModelError, OTHER_TOKENIZER):
                padded = self.tokenizer.pad(
                    {"input_ids": ids}, padding_side=padding_side, return_tensors="pt"
                )
            return padded["input_ids"], padded["attention_mask"]

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **options: Any) -> Any:
            fitting = []
            for key, context, rest in requests:
                whole = leading if context == leading[-1:] else context  # of an empty prompt
                room = max(1, self.max_length + 1 - len(rest))
                fitting.append((key, _shorten(whole, leading, room), rest))
            return super()._loglikelihood_tokens(fitting, **options | {"disable_tqdm": True})

        def loglikelihood(self, requests: Any, *_: Any, **__: Any) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, *_: Any, **__: Any) -> Any:
            if not leading:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            sums = []
            for request in requests:
                ids = self.tok_encode(request.args[0])[len(leading) :]
                room = max(1, self.max_length + 1 - len(leading))
                starts = range(0, len(ids), room)
                windows = [(None, leading, ids[start : start + room]) for start in starts]
                sums.append(sum(value for value, _ in self._loglikelihood_tokens(windows)))
            return sums

        def generate_until(self, requests: Any, *_: Any, **__: Any) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    return Model(
        pretrained=view.model,
        tokenizer=copy.deepcopy(view.tokenizer),  # which it may give a token to pad with
        backend="causal",
        max_length=min(view.context, 2**20),
        batch_size=batch_size,
        add_bos_token=bool(leading),
        prefix_token_id=leading[-1] if leading else None,
        # It switches off an outer autocast, so that ours has to be asked for.
        mixed_precision_dtype="bfloat16" if view.mixed_precision else None,
    )


def _shorten(ids: list[int], leading: Sequence[int], length: int | None) -> list[int]:
    """At most ``length`` tokens: a long prompt loses its start, but not the leading tokens."""
    if length is None or len(ids) <= length:
        return ids
    n = len(leading) if ids[: len(leading)] == list(leading) and length > len(leading) else 0
    return ids[:n] + ids[len(ids) - length + n :]
