"""The fields of a request's JSON body, each checked, and the errors that refuse one.

Every field of OpenAI's protocol and of llama-cpp-python's server is honoured, or refused by name,
or without influence on the answer. Unknown fields are ignored, as clients send extras.
"""

import contextlib
import json
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from llama_jax.errors import UserError, finite_number, shown, whole_number
from llama_jax.inference.request import SamplingParams
from llama_jax.text.chat import Message, parse_messages
from llama_jax.text.tools import TOOL_ROLE, ToolMessage

MAX_SEQUENCES = 64  # of a request: prompts times completions of each
MAX_TOOLS = 128
MAX_STOP = 500  # characters of a stop string
ALIASES = {"repeat_penalty": "repetition_penalty", "max_completion_tokens": "max_tokens"}
NAMES = {**ALIASES, "response_format": "json_schema"}  # as errors of the library call fields
NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
# Fields that would change the answer in a way that is not there, with the values that do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "typical_p": (None, 1),
    "tfs_z": (None, 1),
    "mirostat_mode": (None, 0),
    "min_tokens": (None, 0),
    "logit_bias_type": (None, "input_ids"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
}


class ApiError(UserError):
    """A request that is refused, with what the client gets."""

    def __init__(
        self, message: object, param: str = "", *, status: int = 400, code: str = "", **headers: str
    ):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        """Return the JSON of the answer."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        error = {"message": str(self), "type": kind, "param": self.param or None}
        return {"error": {**error, "code": self.code or None}}


@contextlib.contextmanager
def refusing(fields: Mapping[str, Any], param: str = "") -> Iterator[None]:
    """Turn a `UserError` of the block into the `ApiError` of the field that it names.

    Args:
      fields: of the request.
      param: the field if the error begins with none of them.
    """
    try:
        yield
    except ApiError:
        raise
    except UserError as error:
        found = re.match(r"\w+", str(error))
        name = found[0] if found else ""
        alias = next((alias for alias in NAMES if NAMES[alias] == name and alias in fields), "")
        named = name if fields.get(name) is not None else alias
        raise ApiError(error, named or param) from error


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object of a request's body.

    Raises:
      ApiError: unless it is one JSON object without duplicate keys and numbers that are none.
    """

    def refuse(constant: str) -> NoReturn:
        raise ApiError(f"the body has the number {constant}; expected JSON, which has none")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ApiError(f"the body has the key {shown(twice)} twice; leave one of them out")
        return found

    try:
        found = json.loads(body, parse_constant=refuse, object_pairs_hook=unique)
    except ApiError:
        raise
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error or 'it is nested too deeply'}") from error
    if not isinstance(found, dict):
        raise ApiError(f"the body is {shown(found)}; expected a JSON object")
    return found


# ---- fields ----


class Fields:
    """The fields of a request's body; null is as if absent."""

    def __init__(self, body: Mapping[str, Any]):
        self.all = {name: value for name, value in body.items() if value is not None}
        for name, neutral in UNSUPPORTED.items():
            if name in self.all and self.all[name] not in neutral:
                raise ApiError(
                    f"{name}={shown(self.all[name])} is not supported; leave it out", name
                )
        for alias, name in ALIASES.items():
            if alias in self.all and self.all.get(name, self.all[alias]) != self.all[alias]:
                raise ApiError(f"{alias} and {name} differ; leave one of them out", alias)

    def _get(self, name: str) -> tuple[str, Any]:
        """Return the name that a field has in the body, and its value; None if it is absent."""
        alias = next((alias for alias in ALIASES if ALIASES[alias] == name), "")
        name = alias if alias in self.all and name not in self.all else name
        return name, self.all.get(name)

    def text(self, name: str, default: str = "") -> str:
        """Return a field that is text."""
        value = self.all.get(name, default)
        if not isinstance(value, str):
            raise ApiError(f"{name}={shown(value)} is not text; expected a text", name)
        return value

    def flag(self, name: str) -> bool:
        """Return a field that is true or false, by default false."""
        value = self.all.get(name, False)
        if not isinstance(value, bool):
            raise ApiError(f"{name}={shown(value)}; expected true or false", name)
        return value

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> Any:
        """Return a field that is an integer of a range, or the default."""
        used, value = self._get(name)
        if value is None:
            return default
        with refusing({}, used):
            return whole_number(used, value, lambda n: least <= n <= most, f"{least} to {most}")

    def number(self, name: str) -> float | None:
        """Return a field that is a finite number; None if it is absent."""
        used, value = self._get(name)
        if value is None:
            return None
        with refusing({}, used):
            return finite_number(used, value, lambda _: True, "a number")

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a field that is an object, by default an empty one."""
        value = self.all.get(name, {})
        if not isinstance(value, dict):
            raise ApiError(f"{name}={shown(value)} is not an object; expected one", name)
        return value

    def sampling(self) -> dict[str, Any]:
        """Return the sampling options that are set, and a random seed if none is."""
        params: dict[str, Any] = {name: self.number(name) for name in NUMBERS}
        params["top_k"] = self.integer("top_k", 0, 2**31 - 1)
        params["seed"] = self.integer("seed", -(2**63), 2**63 - 1)
        if params["seed"] in (None, -1):  # -1 as for llama.cpp
            params["seed"] = random.getrandbits(31)
        params["seed"] %= 2**31  # clients send any; completion j has the seed + j
        params["logit_bias"] = self._biases()
        params["json_schema"] = self._json_schema()
        params |= {name: self.all.get(name) for name in ("regex", "grammar")}
        params["stop"] = self.all.get("stop")
        with refusing(self.all, "stop"):
            params["stop"] = SamplingParams.of(stop=params["stop"]).stop
        if any(len(stop) > MAX_STOP for stop in params["stop"]):
            raise ApiError(f"stop has a text of more than {MAX_STOP} characters", "stop")
        return params

    def _json_schema(self) -> Any:
        """Return the schema of `response_format`; True for any JSON object, None for any text."""
        form = self.mapping("response_format")
        kind = form.get("type", "text")
        if kind == "json_object":  # with a schema as for llama-cpp-python
            return form.get("schema") or True
        if kind == "json_schema":
            found = form.get("json_schema")
            return (found.get("schema") if isinstance(found, dict) else found) or True
        if kind != "text":
            expected = "expected text, json_object or json_schema"
            message = f"response_format has the type {shown(kind)}; {expected}"
            raise ApiError(message, "response_format")
        return None

    def _biases(self) -> dict[int, float]:
        biases = {}
        for key, bias in self.mapping("logit_bias").items():
            if not re.fullmatch("[0-9]{1,10}", key):
                raise ApiError(
                    f"logit_bias has the key {shown(key)}; expected token ids", "logit_bias"
                )
            biases[int(key)] = bias
        return biases

    def prompts(self, name: str) -> list[Any]:
        """Return a field of a text, of token ids, or of a list of either, as a list of prompts."""
        value = self.all.get(name, "")
        is_ids = isinstance(value, list) and all(type(each) is int for each in value)
        listed = [value] if isinstance(value, str) or (value and is_ids) else value
        if not isinstance(listed, list) or not listed:
            raise ApiError(f"{name}={shown(value)}; expected a text, token ids, or a list", name)
        if len(listed) > MAX_SEQUENCES:
            raise ApiError(
                f"{name} has {len(listed)} items; expected at most {MAX_SEQUENCES}", name
            )
        for place, each in enumerate(listed):
            if not isinstance(each, str) and not (
                isinstance(each, list) and each and all(type(token) is int for token in each)
            ):
                raise ApiError(f"{name}[{place}]={shown(each)}; expected a text or token ids", name)
        return listed

    def tools(self) -> list[dict[str, Any]]:
        """Return the functions that an answer may call; none for `tool_choice` "none"."""
        choice, listed = self.all.get("tool_choice", "auto"), self.all.get("tools", [])
        if choice not in ("auto", "none"):
            message = f"tool_choice={shown(choice)} is not supported; expected auto or none"
            raise ApiError(message, "tool_choice")
        if not isinstance(listed, list) or len(listed) > MAX_TOOLS:
            raise ApiError(f"tools={shown(listed)}; expected up to {MAX_TOOLS} of them", "tools")
        for place, tool in enumerate(listed):
            function = tool.get("function") if isinstance(tool, dict) else None
            if not isinstance(function, dict) or not isinstance(function.get("name"), str):
                expected = 'expected {"type": "function", "function": {"name": …}}'
                raise ApiError(f"tools[{place}]={shown(tool)}; {expected}", "tools")
        return listed if choice == "auto" else []

    def messages(self) -> list[Message]:
        """Return the messages of a chat; their content may be a list of texts."""
        listed = self.all.get("messages")
        if not isinstance(listed, list) or not listed:
            raise ApiError(f"messages={shown(listed)}; expected a list of messages", "messages")
        with refusing(self.all, "messages"):
            return parse_messages([_message(place, item) for place, item in enumerate(listed)])


def _message(place: int, item: Any) -> Any:
    """Return a message as the library takes it: a developer is the system, parts are joined."""
    if not isinstance(item, dict):
        return item
    role = "system" if item.get("role") == "developer" else item.get("role")
    content = item.get("content")
    if isinstance(content, list):
        content = "".join(_text_part(place, part) for part in content)
    calls = item.get("tool_calls") or []
    if role == TOOL_ROLE or (role == "assistant" and calls):
        calls = [_made_call(call) for call in calls] if isinstance(calls, list) else [None]
        is_text = isinstance(content, str) or (content is None and calls)
        if is_text and None not in calls:
            return ToolMessage(role, content or "", calls)
        expected = "expected a text, or tool_calls with names and arguments of functions"
        raise ApiError(f"messages[{place}] is not understood; {expected}", "messages")
    return {"role": role, "content": content}


def _text_part(place: int, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        found = f"messages[{place}].content has a part of type {shown(kind)}"
        raise ApiError(f"{found}; expected texts, the only kind that models here read", "messages")
    return part["text"]


def _made_call(call: Any) -> dict[str, Any] | None:
    """Return an earlier call with its arguments as an object, as templates expect; or None."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments.encode(errors="replace"))
        except ApiError:
            return None
    return {**call, "type": "function", "function": {**function, "arguments": arguments}}
