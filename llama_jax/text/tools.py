"""Tools in a chat: functions that a model may ask to have called, and what they returned.

How they are written is the chat template's affair; how a model asks for a call is one of a few
forms, which `parse_tool_calls` knows.
"""

import dataclasses
import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from llama_jax.text.chat import Message

TOOL_ROLE = "tool"  # of a message with what a function returned
TAGGED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)  # Hermes, Qwen
MISTRAL, LLAMA3 = "[TOOL_CALLS]", "<|python_tag|>"


@dataclasses.dataclass(frozen=True)
class ToolMessage(Message):
    """An assistant's message that asks for calls, or one with what a function returned."""

    tool_calls: Sequence[Mapping[str, Any]] = ()  # each with "function": name and arguments

    def __post_init__(self) -> None:
        if self.role != TOOL_ROLE:
            super().__post_init__()


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for."""

    name: str
    arguments: Mapping[str, Any]


def parse_tool_calls(text: str, names: Collection[str]) -> tuple[str, list[ToolCall]]:
    """Return what an answer says beside the calls that it asks for, and those calls.

    The forms are objects with a name and arguments (or parameters) between <tool_call> tags, a list
    of them after [TOOL_CALLS], or one alone, as Llama 3.1 writes it. An answer in none of them, or
    with a call of another name, is text.

    Args:
      names: of the functions there are.
    """
    if tagged := TAGGED.findall(text):
        said, sources = TAGGED.sub("", text).strip(), tagged
    elif MISTRAL in text:
        said, _, source = text.partition(MISTRAL)
        sources = [source]
    else:
        said, sources = "", [text.strip().removeprefix(LLAMA3)]
    calls: list[ToolCall] = []
    for source in sources:
        try:
            found = json.loads(source)
        except (ValueError, RecursionError):
            return text, []
        calls += map(_tool_call, found if isinstance(found, list) else [found])
    if not calls or any(call.name not in names for call in calls):
        return text, []
    return said.strip(), calls


def _tool_call(found: Any) -> ToolCall:
    """Return the call that JSON describes; one without a name if it is something else."""
    if not isinstance(found, dict):
        return ToolCall("", {})
    name, arguments = found.get("name"), found.get("arguments", found.get("parameters", {}))
    if isinstance(name, str) and isinstance(arguments, dict):
        return ToolCall(name, arguments)
    return ToolCall("", {})
