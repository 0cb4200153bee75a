"""Rows of messages: what is read of them, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from layercut.data.chat import Conversation, read_messages, text_of
from layercut.errors import DataError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def chat(*messages: dict[str, Any], **columns: Any) -> Conversation:
    return read_messages({"messages": list(messages), **columns})


def test_the_last_reply_is_what_is_learnt():
    said = chat(USER, REPLY, USER, REPLY | {"content": "Again"})
    assert said == Conversation((USER, REPLY, USER), REPLY | {"content": "Again"})


def test_what_the_template_takes_is_kept():
    reply = REPLY | {"reasoning_content": "because"}
    said = chat(
        USER, reply, tools=[TOOL], documents=[{"text": "a"}], chat_template_kwargs={"thinking": 0}
    )
    assert said.reply == reply
    assert said.variables == {"tools": [TOOL], "documents": [{"text": "a"}], "thinking": 0}


def test_json_within_a_column_is_read():
    said = read_messages(
        {
            "messages": json.dumps([USER, REPLY]),
            "tools": json.dumps([TOOL]),
            "documents": [json.dumps({"text": "a"})],
            "chat_template_kwargs": '{"thinking": true}',
        }
    )
    assert said.variables == {"tools": [TOOL], "documents": [{"text": "a"}], "thinking": True}
    assert said.messages == (USER,)


def test_arguments_of_tool_calls_become_objects():
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    said = chat(USER, {"role": "assistant", "content": None, "tool_calls": [call]})
    assert said.reply == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize("arguments", [None, "", "null", "{}", {}])
def test_a_call_without_arguments_has_an_empty_object(arguments: object):
    call = {"function": {"name": "f", "arguments": arguments}}
    (read,) = chat(USER, REPLY | {"tool_calls": [call]}).reply["tool_calls"]
    assert read == {"function": {"name": "f", "arguments": {}}}


def test_null_and_empty_keys_are_as_absent():
    empty = {"tool_calls": None, "reasoning_content": "", "name": None, "weight": None}
    assert chat(USER | empty, REPLY | empty | {"tool_calls": []}, tools=[]) == chat(USER, REPLY)


def test_a_column_of_the_system_becomes_a_message():
    system = {"role": "system", "content": "Be brief."}
    assert chat(USER, REPLY, system="Be brief.") == chat(system, USER, REPLY)
    assert chat(system, USER, REPLY, system="Be brief.") == chat(system, USER, REPLY)
    with pytest.raises(DataError, match="a column 'system' and another system message"):
        chat(system, USER, REPLY, system="Be long.")


def test_lists_as_prompt_and_completion_are_one_conversation():
    assert read_messages({"prompt": [USER], "completion": [REPLY]}) == chat(USER, REPLY)


def test_parts_of_text_are_kept_as_they_are():
    parts = [{"type": "text", "text": "He", "image_url": None}, {"type": "text", "text": "llo"}]
    reply = chat(USER, REPLY | {"content": parts}).reply
    assert reply["content"] == [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    assert text_of(reply) == "Hello"


def test_flags_that_ask_for_the_last_reply_alone_are_heard():
    assert chat(USER, REPLY | {"weight": 0}, USER, REPLY | {"weight": 1}) == chat(
        USER, REPLY, USER, REPLY
    )
    assert chat(USER, REPLY | {"train": True}) == chat(USER, REPLY)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, REPLY | {"weight": 0}]}, "'weight'.* nothing from message 2 of 2"),
        ({"messages": [USER, REPLY, USER, REPLY | {"weight": 1}]}, "learn from message 2 of 4"),
        ({"messages": [USER | {"train": True}, REPLY]}, "'train'.* learn from message 1 of 2"),
        ({"messages": [USER, REPLY | {"refusal": "No."}]}, "message 2 has 'refusal'"),
        ({"messages": [USER, REPLY | {"reasoning_content": ["a"]}]}, "'reasoning_content' should"),
        ({"messages": [USER, REPLY | {"tool_calls": ["f"]}]}, "message 2: 'tool_calls' should be"),
        (
            {
                "messages": [
                    USER,
                    REPLY | {"tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
                ]
            },
            "arguments of the call of 'f' should be an object",
        ),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "image_url": "a"}]}, REPLY]},
            "a part of 'content' is of the type 'image_url'",
        ),
        ({"messages": [USER | {"content": ["Hi"]}, REPLY]}, "is of the type 'str'"),
        ({"messages": [USER | {"content": None}, REPLY]}, "should be a list of"),
        ({"messages": [USER, REPLY], "tools": "none"}, "'tools' should be a list of objects"),
        ({"messages": [USER, REPLY], "documents": ["a"]}, "'documents' should be a list of obj"),
        ({"messages": [USER, REPLY], "chat_template_kwargs": [1]}, "kwargs' should be an object"),
        (
            {"messages": [USER, REPLY], "chat_template_kwargs": {"tokenize": True}},
            "sets 'tokenize', which is no variable",
        ),
        ({"messages": [USER, REPLY], "prompt": "Ho"}, "a 'prompt' that is none of them"),
        ({"prompt": [USER], "completion": [REPLY, USER, REPLY]}, "should be one reply after"),
        ({"prompt": [USER, REPLY], "completion": [REPLY]}, "a prompt that ends with another role"),
        ({"prompt": [USER], "completion": "Hello"}, "'completion' should be a list of"),
    ],
)
def test_what_is_not_done_is_refused_by_name(row: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        read_messages(row)
