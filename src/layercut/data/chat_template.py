"""A conversation as the model's own chat template writes it, held against what the row says.

A template writes what it knows and passes over the rest without a word. So what it was given is
looked for in what it wrote: a reply, a reasoning, a tool or a name that is not there is refused.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from jinja2 import Environment
from jinja2 import TemplateError as JinjaError

from layercut.checkpoints.hf_calls import guard
from layercut.data.chat import REASONING, Conversation, Message, text_of, text_parts
from layercut.errors import DataError

LINKS = ("tool_call_id", "id")
"""Keys that join a tool's answer to its call; most models' formats tell that by the order."""

KNOWN_KEYS = ("role", "content", "tool_calls", *REASONING)


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the template wrote.

    Attributes:
        prompt: the messages before the reply, and what the model is given to begin one.
        whole: all messages.
    """

    prompt: str
    whole: str


@dataclass(frozen=True, slots=True)
class _Template:
    """A chat template and what is said of it in errors."""

    tokenizer: Any
    source: str
    name: str
    where: str

    def render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The messages as text.

        Raises:
            DataError: the template raised something, whatever it was, or wrote nothing.
        """
        roles = ", ".join(str(message["role"]) for message in messages)
        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )
        except Exception as error:  # noqa: BLE001 - a template is a program of someone else's
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            # What a template raises by itself is of this very class; its own faults are of others.
            said = "refuses" if type(error) is JinjaError else f"fails ({type(error).__name__}) on"
            raise DataError(
                f"{self.where}: {self.name} {said} the messages of the roles {roles}: {reason}. "
                "Change the row."
            ) from None
        if not text.strip():
            raise self.refuse(f"writes nothing for the messages of the roles {roles}")
        return text

    def names(self) -> set[str]:
        """Every name in the template's code; comments and texts are left out."""
        with guard(f"{self.where}: {self.name} cannot be read", DataError, "Correct it."):
            tokens = list(Environment().lex(self.source))
        return {token for _, kind, token in tokens if kind == "name"}

    def refuse(self, what: str) -> DataError:
        """An error that says what the template does with the row."""
        return DataError(
            f"{self.where}: {self.name} {what}. Change the row, or use a model whose template "
            "has a place for it."
        )


def render(conversation: Conversation, tokenizer: Any, where: str) -> Rendering:
    """Write a conversation with the tokenizer's chat template.

    Args:
        conversation: the row's.
        tokenizer: the model's.
        where: the row's place, for errors.

    Raises:
        DataError: there is no template, or none is the default; it fails; or it leaves out
            something that the row says.
    """
    template = _choose_template(conversation, tokenizer, where)
    try:
        return _render(template, conversation)
    except DataError:
        # Content given as a list of one text: most templates take a text, some only a list.
        joined = _join_parts(conversation)
        if joined is None:
            raise
        return _render(template, joined)


def _choose_template(conversation: Conversation, tokenizer: Any, where: str) -> _Template:
    known = getattr(tokenizer, "chat_template", None)
    if not known:
        raise DataError(
            f"{where} holds chat messages, but the model's tokenizer has no chat template. "
            "Use rows with prompt and completion, or a model with a template."
        )
    if not isinstance(known, Mapping):
        return _Template(tokenizer, known, "the tokenizer's chat template", where)
    # As transformers chooses.
    name = "tool_use" if "tools" in conversation.variables and "tool_use" in known else "default"
    if name not in known:
        raise DataError(
            f"{where} holds chat messages, and the tokenizer has the named chat templates "
            f"{', '.join(sorted(known))}, none of which is the default. Save the one to use as "
            "chat_template.jinja in the model's folder, without the others."
        )
    return _Template(tokenizer, known[name], f"the tokenizer's chat template '{name}'", where)


def _render(template: _Template, conversation: Conversation) -> Rendering:
    before, variables = list(conversation.messages), conversation.variables
    prompt = template.render(before, variables, add_generation_prompt=True)
    whole = template.render([*before, conversation.reply], variables)
    _check_reply(template, conversation, prompt, whole)
    rest = prompt.removeprefix(_common_start(prompt, whole))
    if rest.strip():
        warnings.warn(
            f"{template.name} begins a reply with {rest[-40:]!r}, but writes a reply of these rows "
            "otherwise. It is predicted from where the two part, so behind a beginning that the "
            "model is not given when it generates. A reasoning_content, or chat_template_kwargs "
            "such as enable_thinking: false, may make both the same.",
            stacklevel=2,
        )
    _check_variables(template, conversation, whole)
    _check_messages(template, conversation, whole)
    _check_keys(template, conversation, whole)
    return Rendering(prompt, whole)


def _check_variables(template: _Template, conversation: Conversation, whole: str) -> None:
    """Refuse what the template is told, but has no use for."""
    messages, variables = [*conversation.messages, conversation.reply], conversation.variables
    names = template.names()
    for name in variables:
        if name not in names:
            raise template.refuse(f"has no use for '{name}'")
        others = {key: value for key, value in variables.items() if key != name}
        if name in ("tools", "documents") and template.render(messages, others) == whole:
            raise template.refuse(f"writes the same with and without the row's '{name}'")


def _check_reply(template: _Template, conversation: Conversation, prompt: str, whole: str) -> None:
    """Refuse a rendering in which a part of the reply is not behind the prompt."""
    reply = conversation.reply
    common = len(_squeeze(_common_start(prompt, whole)))
    text = _squeeze(whole)
    parts = [("text", part) for part in text_parts(reply)]
    parts += [(f"'{key}'", reply[key]) for key in REASONING if key in reply]
    parts += [("tool call", name) for name in _called(reply)]
    for what, part in parts:
        wanted = _squeeze(part)
        if text.rfind(wanted) + len(wanted) <= common or wanted not in text:
            raise template.refuse(f"leaves out the {what} of the reply")
    if isinstance(reply.get("content"), list) and _shows_parts(whole):
        raise template.refuse("writes the parts of 'content' as code, not as text")


def _check_messages(template: _Template, conversation: Conversation, whole: str) -> None:
    """Refuse a rendering that leaves out what another message says."""
    text, names = _squeeze(whole), template.names()
    for number, message in enumerate(conversation.messages, start=1):
        role = message["role"]
        for part in text_parts(message):
            # Of an earlier reply, templates leave out the reasoning: their models do not see it.
            said = part.rpartition("</think>")[2] if role == "assistant" else part
            # Tools' answers are written as JSON by some.
            quoted = json.dumps(said, ensure_ascii=False)[1:-1]
            if _squeeze(said) not in text and _squeeze(quoted) not in text:
                raise template.refuse(f"leaves out the text of message {number} ({role})")
        if isinstance(message.get("content"), list) and _shows_parts(whole):
            raise template.refuse("writes the parts of 'content' as code, not as text")
        for name in _called(message):
            if _squeeze(name) not in text:
                raise template.refuse(f"leaves out the tool call of message {number}")
        if any(key in message for key in REASONING) and not names & set(REASONING):
            raise template.refuse(f"leaves out the reasoning of message {number}")


def _check_keys(template: _Template, conversation: Conversation, whole: str) -> None:
    """Refuse, or tell of, further keys of messages without which the rendering is the same."""
    messages = [*conversation.messages, conversation.reply]
    for key in dict.fromkeys(key for message in messages for key in message):
        if key in KNOWN_KEYS:
            continue
        without = [{k: v for k, v in message.items() if k != key} for message in messages]
        if template.render(without, conversation.variables) != whole:
            continue
        roles = {message["role"] for message in messages if key in message}
        if key not in LINKS and (key != "name" or roles - {"tool", "function"}):
            raise template.refuse(f"has no use for '{key}' of the messages")
        warnings.warn(
            f"{template.name} does not write '{key}' of the messages; this model's format tells "
            "by the order which tool answers.",
            stacklevel=2,
        )


def _called(message: Message) -> list[str]:
    """The names of the functions that a message calls."""
    return [str(call.get("function", call)["name"]) for call in message.get("tool_calls", ())]


def _shows_parts(text: str) -> bool:
    return any(mark in text for mark in ("'type': 'text'", '"type": "text"'))


def _join_parts(conversation: Conversation) -> Conversation | None:
    """The conversation with text in place of lists of one; ``None`` where none is so given."""
    messages = [*conversation.messages, conversation.reply]
    lists = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    if not lists or any(len(parts) > 1 for parts in lists):
        return None
    *before, reply = ({**message, "content": text_of(message)} for message in messages)
    return Conversation(tuple(before), reply, conversation.variables)


def _common_start(one: str, other: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(letter for letter, _ in pairs)


def _squeeze(text: str) -> str:
    """Without white space, which templates trim and set as they like."""
    return "".join(text.split())
