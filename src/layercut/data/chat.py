"""A row of chat messages, checked: what is handed to a chat template, and which reply is learnt.

Messages are as transformers' templates take them: role, content, and perhaps reasoning, tool calls,
names. What asks for something else than learning the last reply is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from layercut.data.columns import is_absent
from layercut.errors import DataError

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which a message may hold its reasoning; transformers gives templates all of them."""

TRAINING_FLAGS = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "learn")
"""Keys of a message that say whether it is learnt from (OpenAI, axolotl and others)."""

UNUSED = ("refusal", "audio", "function_call", "images", "image", "mask", "masked", "prefix")
"""Keys of a message with a meaning that no text stands for here."""

RESERVED = (
    *("conversation", "messages", "tools", "documents", "chat_template", "tokenize", "padding"),
    *("add_generation_prompt", "continue_final_message", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    "sanitize_control_tokens",
)
"""Keys that ``chat_template_kwargs`` cannot set: they are arguments of the call around it."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a chat template is given.

    Attributes:
        messages: those before the reply; ``content`` is text, or a list of text parts.
        reply: the assistant's last message, with its reasoning and tool calls.
        variables: ``tools``, ``documents`` and what the template is told besides.
    """

    messages: tuple[Message, ...]
    reply: Message
    variables: Mapping[str, Any] = field(default_factory=dict)


def read_messages(row: Mapping[str, Any]) -> Conversation:
    """The conversation of a row with ``messages``, or with lists as prompt and completion.

    Raises:
        DataError: without the row's place: the messages are not well formed, end with no reply, or
            ask for something that is not done.
    """
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
        _check_repeats(row, messages)
    else:
        prompt = _messages(row.get("prompt"), "prompt")
        completion = _messages(row.get("completion"), "completion")
        if len(completion) != 1 or prompt[-1]["role"] == "assistant":
            raise DataError(
                "'completion' should be one reply after a prompt that ends with another role; "
                f"got the roles {_roles(prompt)} and {_roles(completion)}. Only one reply of a row "
                "is learnt: give each its own row"
            )
        messages = [*prompt, *completion]
    messages = _with_system(row, messages)
    *before, reply = messages
    if reply["role"] != "assistant" or not before or not _says_something(reply):
        raise DataError(
            "'messages' should end with a reply of the role assistant after at least one other "
            f"message, got the roles {_roles(messages)}"
        )
    _check_training_flags(messages)
    plain = [_without(message, TRAINING_FLAGS) for message in messages]
    return Conversation(tuple(plain[:-1]), plain[-1], _variables(row))


def text_of(message: Message) -> str:
    """A message's content as one text."""
    return "".join(text_parts(message))


def text_parts(message: Message) -> list[str]:
    """The texts of a message's content, in order."""
    content = message.get("content") or ""
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def parse_json(value: Any) -> Any:
    """A value that a file without nested columns holds as JSON; another text stays text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _messages(value: Any, column: str) -> list[dict[str, Any]]:
    value = parse_json(value)  # a CSV file has no lists
    expected = f"'{column}' should be a list of {{role, content}}, both text"
    if not isinstance(value, list | tuple) or not value:
        raise DataError(expected)
    return [_message(message, number, expected) for number, message in enumerate(value, start=1)]


def _message(message: Any, number: int, expected: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(expected)
    read = {
        key: value for key, value in message.items() if key == "content" or not is_absent(value)
    }
    read = {key: value for key, value in read.items() if key not in REASONING or value != ""}
    for key in UNUSED:
        if read.get(key) not in (None, False, ""):
            raise DataError(
                f"message {number} has '{key}', which is not used. Remove it, or the row"
            )
        read.pop(key, None)
    for key in REASONING:
        if key in read and not isinstance(read[key], str):
            raise DataError(f"message {number}: '{key}' should be text")
    if "tool_calls" in read:
        read["tool_calls"] = _tool_calls(read["tool_calls"], number)
    content = read.get("content")
    if isinstance(content, list | tuple) and content:
        read["content"] = [_part(part, number) for part in content]
    elif is_absent(content) and ("tool_calls" in read or any(key in read for key in REASONING)):
        read["content"] = ""
    elif not isinstance(content, str):
        raise DataError(expected)
    return read


def _part(part: Any, number: int) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise DataError(
            f"message {number}: a part of 'content' is of the type {kind!r}; only "
            '{"type": "text", "text": "…"} can be read'
        )
    return {"type": "text", "text": part["text"]}


def _tool_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects: templates write these, not JSON within JSON."""
    calls = parse_json(value)
    read = []
    for call in calls if isinstance(calls, list | tuple) else [None]:
        call = parse_json(call)
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(
                f"message {number}: 'tool_calls' should be a list of "
                '{"type": "function", "function": {"name", "arguments"}}'
            )
        arguments = parse_json(function.get("arguments") or "{}") or {}
        if not isinstance(arguments, Mapping):
            raise DataError(
                f"message {number}: the arguments of the call of '{function['name']}' should be an "
                "object, or one as JSON"
            )
        function = {**function, "arguments": dict(arguments)}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def _says_something(reply: Message) -> bool:
    return bool(text_of(reply).strip()) or "tool_calls" in reply


def _check_repeats(row: Mapping[str, Any], messages: Sequence[Message]) -> None:
    """Refuse a prompt or a completion beside the messages that says something else than they do."""
    texts = {text_of(message).strip() for message in messages}
    for column in ("prompt", "completion"):
        value = row.get(column)
        if value is not None and not (isinstance(value, str) and value.strip() in texts):
            raise DataError(
                f"the row has 'messages' and a '{column}' that is none of them. Remove one of both"
            )


def _with_system(row: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after those of the column ``system``, as a message of that role."""
    system = row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise DataError("'system' should be text")
    if messages[0]["role"] in ("system", "developer"):
        if text_of(messages[0]).strip() == system.strip():
            return messages
        raise DataError("the row has a column 'system' and another system message. Remove one")
    return [{"role": "system", "content": system}, *messages]


def _check_training_flags(messages: Sequence[Message]) -> None:
    """Refuse flags by which something else is learnt than the last reply alone.

    Where there are flags, a reply without one is learnt, as for OpenAI.
    """
    keys = [key for key in TRAINING_FLAGS if any(key in message for message in messages)]
    for key in keys:
        last = len(messages) - 1
        for number, message in enumerate(messages):
            learnt = message.get(key, message["role"] == "assistant")
            if learnt not in (0, 1) or bool(learnt) != (number == last):
                raise DataError(
                    f"by the key '{key}' of its messages, the row asks to learn "
                    f"{'from' if learnt else 'nothing from'} message {number + 1} of {last + 1}, "
                    "but the last reply is what is learnt, and it alone. Give each reply its own "
                    "row, or remove the key"
                )


def _variables(row: Mapping[str, Any]) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    for column in ("tools", "documents"):
        values = parse_json(row.get(column))
        if is_absent(values) or values == "":
            continue
        parsed = [parse_json(v) for v in values] if isinstance(values, list | tuple) else [None]
        objects = [dict(value) for value in parsed if isinstance(value, Mapping)]
        if len(objects) < len(parsed):
            raise DataError(f"'{column}' should be a list of objects, or one as JSON")
        variables[column] = objects
    more = parse_json(row.get("chat_template_kwargs"))
    if is_absent(more) or more == "":
        return variables
    if not isinstance(more, Mapping):
        raise DataError("'chat_template_kwargs' should be an object, or one as JSON")
    if reserved := [key for key in more if key in RESERVED]:
        raise DataError(
            f"'chat_template_kwargs' sets '{reserved[0]}', which is no variable of a template. "
            "Remove it"
        )
    return variables | {key: value for key, value in more.items() if value is not None}


def _without(message: Message, keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(str(message["role"]) for message in messages)
