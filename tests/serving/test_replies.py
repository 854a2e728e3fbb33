"""What a model generated becomes JSON of OpenAI's protocol; here calls of tools."""

import json
import re

import pytest
from servers import write_tiny

from llama_jax.inference.completions import collect
from llama_jax.llm import LLM
from llama_jax.serving.fields import ApiError
from llama_jax.serving.protocol import make_request, parse_chat
from llama_jax.serving.replies import Reply

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ASKED = '{"name": "weather", "arguments": {"city": "Rome"}}'
MADE = {"id": "x", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}
SOURCE = (
    "{{ tools | tojson }}{% for message in messages %}{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.arguments.a }}{% endfor %}\n{% endfor %}"
)
HELLO = {"role": "user", "content": "hello"}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLM(write_tiny(tmp_path_factory.mktemp("replies") / "tiny"), template=SOURCE)


def answer(llm, said=ASKED, **fields):
    """Return the answer of a model that says what it must, whole, and its chunks."""
    fields = {"messages": [HELLO], "tools": [TOOL], "regex": re.escape(said), **fields}
    call = parse_chat(fields)
    request = make_request(call, llm)
    deltas = list(llm.generate(request))
    whole = Reply(call, request, "tiny", llm.tokenizer).whole(collect(deltas, request))
    reply = Reply(call, request, "tiny", llm.tokenizer)
    chunks = [each["choices"][0] for delta in deltas for each in reply.chunks(delta)]
    return whole["choices"][0], chunks


def test_a_call_that_a_model_asks_for_is_no_content(llm):
    choice, chunks = answer(llm)
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
    first, last = chunks
    assert first["delta"]["tool_calls"][0]["function"] == call["function"]
    assert (last["delta"], last["finish_reason"]) == ({}, "tool_calls")


def test_another_answer_is_content(llm):
    choice, chunks = answer(llm, said="It rains")
    assert choice["message"]["content"] == "It rains" and choice["finish_reason"] == "stop"
    assert "".join(each["delta"].get("content", "") for each in chunks) == "It rains"


def test_tools_that_may_not_be_called_are_not_shown(llm):
    choice, chunks = answer(llm, tool_choice="none")
    assert choice["message"]["content"] == ASKED and len(chunks) > 2


def test_earlier_calls_and_results_are_prompts(llm):
    asked = {"role": "assistant", "content": None, "tool_calls": [MADE]}
    messages = [HELLO, asked, {"role": "tool", "tool_call_id": "x", "content": "sun"}]
    request = make_request(parse_chat({"messages": messages, "tools": [TOOL]}), llm)
    text = llm.tokenizer.decode(request.prompts[0])
    assert text.endswith("assistant: 1tool: sun")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": "weather"}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [TOOL] * 200}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"messages": [HELLO, {"role": "tool", "content": 5}]}, "messages"),
        ({"messages": [HELLO, {"role": "tool", "content": "\ud800"}]}, "messages"),
        ({"tools": [{"type": "function", "function": {"name": "\ud800"}}]}, "messages"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": [5]}]}, "messages"),
        ({"messages": [HELLO, {"role": "assistant", "tool_calls": 5}]}, "messages"),
    ],
)
def test_wrong_tools_are_named(llm, fields, param):
    with pytest.raises(ApiError) as error:
        make_request(parse_chat({"messages": [HELLO], **fields}), llm)
    assert error.value.param == param


def test_a_format_without_tools_refuses_them(llm, monkeypatch):
    monkeypatch.setattr(llm, "_template", "chatml")
    with pytest.raises(ApiError, match="have no place in the model's chat format") as error:
        make_request(parse_chat({"messages": [HELLO], "tools": [TOOL]}), llm)
    assert error.value.param == "tools"
