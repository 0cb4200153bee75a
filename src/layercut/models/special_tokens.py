"""What a tokenizer puts in front of a text, and what ended documents in its model's training.

A model that always saw a leading token (Gemma's ``<bos>``) predicts badly without it, and other
layers then seem to matter. Documents are told apart by the token that ends a *text*; a chat model's
end-of-sequence token often ends only a *turn*, and stands between no two documents of its training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.hf_calls import guard
from layercut.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

END_OF_TEXT = frozenset(
    {
        "<|endoftext|>",
        "<|end_of_text|>",
        "</s>",
        "<eos>",
        "[EOS]",
        "<|eos|>",
        "<EOS_TOKEN>",
        "<seed:eos>",
        "<｜end▁of▁sentence｜>",
        "<|end_of_sentence|>",
        "<|end▁of▁sentence|>",
    }
)
"""Tokens that end a document in the training of the families that have them."""

END_OF_TURN = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|eot|>",
        "<|eom|>",
        "<end_of_turn>",
        "<turn|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|user|>",
        "<|observation|>",
        "<|END_OF_TURN_TOKEN|>",
        "[|endofturn|]",
        "<|assistant_end|>",
        "<|endofturn|>",
        "<|end_of_turn|>",
        "<|end_of_role|>",
    }
)
"""Tokens that end a message, and no document."""

PROBES = ("Hello there", "1 + 1 = 2")
"""Texts whose first tokens differ: what their encodings share in front, the tokenizer has added."""


CONFIGURATIONS = ("generation_config.json", "config.json")


@dataclass(frozen=True, slots=True)
class TextFrame:
    """What stands around the text in a window.

    Attributes:
        leading: ids of the tokens that start every window, as the tokenizer starts every text.
        separator: id of the token between documents; ``None``: they are joined directly.
        leading_token: the first as text; ``None`` without any.
        document_separator: the second as text.
    """

    leading: tuple[int, ...]
    separator: int | None
    leading_token: str | None
    document_separator: str | None

    def strip(self, ids: list[int]) -> list[int]:
        """A text's tokens without the leading ones, where a template has written them."""
        n = len(self.leading)
        return ids[n:] if n and tuple(ids[:n]) == self.leading else ids

    def to_json(self) -> dict[str, str | None]:
        """The keys that results have."""
        return {
            "leading_token": self.leading_token,
            "document_separator": self.document_separator,
        }


def text_frame(tokenizer: Any) -> TextFrame:
    """The leading tokens and the separator of a model's text.

    Raises:
        ModelError: the tokenizer makes no tokens of plain text.
    """
    leading, separator = leading_tokens(tokenizer), document_separator(tokenizer)
    ids = [*leading, *([] if separator is None else [separator])]
    with guard("the tokenizer cannot name its tokens", ModelError, "Use its original files."):
        names = tokenizer.convert_ids_to_tokens(ids)
    return TextFrame(
        leading,
        separator,
        leading_token="".join(map(str, names[: len(leading)])) or None,
        document_separator=None if separator is None else str(names[-1]),
    )


def leading_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that the tokenizer puts in front of every text.

    What it does counts, not what its configuration says: flags such as ``add_bos_token`` and the
    post-processor that acts may disagree.

    Raises:
        ModelError: the tokenizer makes no tokens of plain text.
    """
    found = []
    for text in PROBES:
        bare, whole = (_encode(tokenizer, text, special) for special in (False, True))
        if not bare:
            raise ModelError("the tokenizer makes no tokens of plain text. Use the model's own.")
        places = range(len(whole) - len(bare) + 1)
        start = next((i for i in places if whole[i : i + len(bare)] == bare), None)
        if start is None:
            raise ModelError(
                f"the tokenizer reads {text!r} otherwise when it adds its special tokens, so the "
                "text of a window cannot be told from them. Use the model's own tokenizer."
            )
        found.append((whole[:start], bare))
    (leading, bare), (_, other) = found
    # Some tokenizers put their first token in front even when asked for none.
    special = set(getattr(tokenizer, "all_special_ids", ()))
    for mine, theirs in zip(bare, other, strict=False):
        if mine != theirs or mine not in special:
            break
        leading = [*leading, mine]
    return tuple(leading)


def n_given(leading: tuple[int, ...], input_ids: Tensor) -> int:
    """How many of a window's next tokens are given, not predicted: the leading ones but the first.

    0 for nearly all tokenizers, which add one token at most, and for windows that start otherwise.

    Args:
        leading: ids of the tokens that the tokenizer puts in front of every text.
        input_ids: (batch, seq).
    """
    n = len(leading)
    if n < 2 or any(tuple(start) != leading for start in input_ids[:, :n].tolist()):
        return 0
    return n - 1


def document_separator(tokenizer: Any) -> int | None:
    """Id of the token that ended documents in the model's training; ``None`` if that is not known.

    In this order: the end-of-sequence token, if its name is one that ends texts, or is unknown and
    the chat template never writes it, so that no turn ends with it; else the one special token of
    the vocabulary that ends texts. Of several, or where the tokenizer names no end at all, it is
    the one that the model's configuration lists as an end. Nothing is guessed: text joined directly
    is plain text, while a wrong token in it is one that the model never saw there.
    """
    eos = tokenizer.eos_token_id
    name = None if eos is None else str(tokenizer.eos_token)
    if name in END_OF_TEXT:
        return int(eos)
    if name is not None and name not in END_OF_TURN and not _template_writes(tokenizer, name):
        return int(eos)
    candidates = sorted(
        i for i, token in _special_tokens(tokenizer).items() if token in END_OF_TEXT
    )
    if len(candidates) > 1 or eos is None:
        listed = _listed_ends(tokenizer)
        candidates = [i for i in candidates if i in listed]
    return candidates[0] if len(candidates) == 1 else None


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    # verbose=False: a text longer than the model's context is no mistake here.
    with guard("the tokenizer cannot encode a text", ModelError, "Use its original files."):
        encoded = tokenizer(text, add_special_tokens=special, verbose=False)
    return [int(i) for i in encoded["input_ids"]]


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {int(i): str(token.content) for i, token in added.items() if token.special}


def _template_writes(tokenizer: Any, token: str) -> bool:
    templates = getattr(tokenizer, "chat_template", None) or ""
    texts = templates.values() if isinstance(templates, Mapping) else [templates]
    return any(token in str(text) or "eos_token" in str(text) for text in texts)


def _listed_ends(tokenizer: Any) -> set[int]:
    """The ids that the checkpoint's configurations end a generation at."""
    folder = str(getattr(tokenizer, "name_or_path", "") or "")
    ends: set[int] = set()
    for path in (Path(folder, name) for name in CONFIGURATIONS if folder):
        try:
            content = read_json_object(path)
        except ModelError:
            continue  # not there, or not to be read: no list, so no choice
        text = content.get("text_config")
        for part in (content, text if isinstance(text, dict) else {}):
            ids = part.get("eos_token_id")
            ends |= {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
    return ends
