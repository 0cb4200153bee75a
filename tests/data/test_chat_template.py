"""Templates that write what they are given, and those that do not."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import byte_tokenizer
from layercut.data.chat import Conversation
from layercut.data.chat_template import Rendering, render
from layercut.errors import DataError

USER = {"role": "user", "content": "Hi"}
REPLY = {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
BEGIN = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + BEGIN
FULL = (
    "{% if tools %}T{{ tools | tojson }}{% endif %}{% if documents %}D{{ documents[0].text }}"
    "{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.name %}({{ m.name }}){% endif %}"
    "{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if quiet %}[]{% endif %}{% endif %}"
)


def written(
    template: Any, reply: dict[str, Any] = REPLY, *before: dict[str, Any], **variables: Any
) -> Rendering:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return render(Conversation(before or (USER,), reply, variables), tokenizer, "line 1")


def test_everything_is_handed_to_a_template_that_takes_it():
    reply = REPLY | {"reasoning_content": "because"}
    found = written(FULL, reply, USER | {"name": "Ann"}, tools=[TOOL], documents=[{"text": "doc"}])
    start = 'T[{"type": "function", "function": {"name": "f", "parameters": {}}}]Ddoc<user>(Ann)Hi'
    assert found.prompt == f"{start}<assistant>"
    assert found.whole == f"{start}<assistant>[because]Hello"


def test_tool_calls_are_written_with_their_arguments():
    asked = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    answer = {"role": "tool", "content": "2", "name": "f"}
    found = written(FULL, REPLY, USER, asked, answer, tools=[TOOL])
    assert found.whole.endswith('<user>Hi<assistant>f{"x": 1}<tool>(f)2<assistant>Hello')
    assert written(FULL, asked, tools=[TOOL]).whole.endswith('<assistant>f{"x": 1}')


@pytest.mark.parametrize(
    ("template", "reply", "variables", "message"),
    [
        (PLAIN, REPLY, {"tools": [TOOL]}, "has no use for 'tools'"),
        (PLAIN, REPLY, {"documents": [{"text": "a"}]}, "has no use for 'documents'"),
        (PLAIN, REPLY, {"enable_thinking": False}, "has no use for 'enable_thinking'"),
        (
            "{# enable_thinking #}" + PLAIN,
            REPLY,
            {"enable_thinking": False},
            "has no use for 'enable_thinking'",
        ),
        (
            "{% if tools and messages[0].role == 'system' %}T{% endif %}" + PLAIN,
            REPLY,
            {"tools": [TOOL]},
            "writes the same with and without the row's 'tools'",
        ),
        (PLAIN, REPLY | {"reasoning_content": "why"}, {}, "leaves out the 'reasoning_content' of"),
        (PLAIN, REPLY | {"tool_calls": [CALL]}, {}, "leaves out the tool call of the reply"),
        (PLAIN, REPLY | {"name": "Bob"}, {}, "has no use for 'name' of the messages"),
        (PLAIN, REPLY | {"mood": "glad"}, {}, "has no use for 'mood' of the messages"),
        ("<{{ messages[0].content }}>" + BEGIN, REPLY, {}, "leaves out the text of the reply"),
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}",
            REPLY | {"content": "<think>why</think>Hello"},
            {},
            "leaves out the text of the reply",
        ),
        ("{% if true %}{% endif %} ", REPLY, {}, "writes nothing for the messages of the roles"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(
    template: str, reply: dict[str, Any], variables: dict[str, Any], message: str
):
    with pytest.raises(DataError, match=f"^line 1: the tokenizer's chat template {message}"):
        written(template, reply, **variables)


def test_other_messages_are_looked_for_as_well():
    drops_system = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match=r"leaves out the text of message 1 \(system\)"):
        written(drops_system, REPLY, {"role": "system", "content": "Be brief."}, USER)
    with pytest.raises(DataError, match="leaves out the reasoning of message 2"):
        written(PLAIN, REPLY, USER, REPLY | {"thinking": "why"}, USER)
    with pytest.raises(DataError, match="leaves out the tool call of message 2"):
        written(PLAIN, REPLY, USER, REPLY | {"tool_calls": [CALL]}, USER)


def test_an_earlier_reply_may_lose_its_reasoning():
    template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}"
    before = [USER, REPLY | {"content": "<think>why</think>Yes"}, USER]
    assert written(template, REPLY, *before).whole == "HiYesHiHello"


def test_a_key_that_only_links_is_told():
    answer = {"role": "tool", "content": "2", "tool_call_id": "7"}
    with pytest.warns(UserWarning, match="does not write 'tool_call_id' of the messages"):
        assert written(PLAIN, REPLY, USER, answer).whole.endswith("<tool>2<assistant>Hello")


def test_a_beginning_that_the_reply_does_not_have_is_told():
    thinking = PLAIN.replace("<assistant>{% endif", "<assistant><think>{% endif")
    with pytest.warns(UserWarning, match="begins a reply with '<think>', but writes a reply"):
        found = written(thinking)
    assert found == Rendering("<user>Hi<assistant><think>", "<user>Hi<assistant>Hello")
    # The same beginning, written by the template in the reply as well.
    assert written(thinking, REPLY | {"content": "<think></think>Hello"}).prompt.endswith("<think>")
    assert written(FULL, REPLY | {"content": "[]Hello"}, quiet=True).prompt.endswith("[]")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0].content + 1 }}", r"fails \(TypeError\) on the messages of the roles user"),
        ("{{ messages[9].content }}", r"fails \(UndefinedError\) on"),
        ("{% if %}", r"fails \(TemplateSyntaxError\) on"),
        ("{{ 1 / 0 }}", r"fails \(ZeroDivisionError\) on"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", r"fails \(RecursionError\) on"),
        ("{{ raise_exception('No users') }}", "refuses the messages of the roles user: No users"),
    ],
)
def test_whatever_a_template_raises_is_a_refusal(template: str, message: str):
    with pytest.raises(DataError, match=f"^line 1: the tokenizer's chat template {message}"):
        written(template)


def test_named_templates_need_a_default():
    with pytest.raises(DataError, match="the named chat templates rag, tool_use, none of which"):
        written({"rag": PLAIN, "tool_use": PLAIN})
    with pytest.raises(DataError, match="chat template 'default' leaves out the text of the reply"):
        written({"default": "Hi{{ '' }}", "tool_use": FULL})
    chosen = written({"default": PLAIN, "tool_use": FULL}, tools=[TOOL])
    assert chosen.whole.startswith("T[")


def test_a_list_of_one_text_is_written_as_text_or_as_a_list():
    reply = REPLY | {"content": [{"type": "text", "text": "Hello"}]}
    looped = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    user = USER | {"content": [{"type": "text", "text": "Hi"}]}
    for template, whole in ((PLAIN, "<user>Hi<assistant>Hello"), (looped, "HiHello")):
        assert written(template, reply, user).whole == whole
    two = REPLY | {"content": [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]}
    assert written(looped, two, user).whole == "HiHello"
    with pytest.raises(DataError, match="writes the parts of 'content' as code"):
        written(PLAIN, two)
