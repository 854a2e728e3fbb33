"""The calls of OpenAI's protocol: JSON to calls, and calls to requests of the engine.

`serving.fields` has the fields by themselves, `serving.replies` the way back.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llama_jax.inference.request import Request
from llama_jax.llm import LLM
from llama_jax.serving.batch import MAX_LOGPROBS
from llama_jax.serving.fields import MAX_SEQUENCES, ApiError, Fields, refusing
from llama_jax.text.chat import Message, Template

TEXT_TOKENS = 16  # of a completion if max_tokens is absent, as OpenAI's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A request for completions or an answer, checked as far as the model need not be known."""

    model: str  # "": the first
    fields: Mapping[str, Any]
    messages: Sequence[Message] = ()  # of a chat
    tools: Sequence[Mapping[str, Any]] = ()  # that an answer may call
    prompts: Sequence[str | list[int]] = ()  # of completions
    sampling: Mapping[str, Any]
    max_tokens: int | None
    n: int
    best_of: int
    logprobs: int | None  # top tokens to report; None: no log-probabilities
    echo: bool = False
    continues: bool = False  # the last message, which the assistant began
    stream: bool
    include_usage: bool

    @property
    def is_chat(self) -> bool:
        """Whether it is a dialogue to answer."""
        return bool(self.messages)

    @property
    def text_field(self) -> str:
        """The field that has its text."""
        return "messages" if self.is_chat else "prompt"


def _shared(fields: Fields, prompts: int) -> dict[str, Any]:
    """Return what chats and completions have in common."""
    n = fields.integer("n", 1, MAX_SEQUENCES, 1)
    best_of = fields.integer("best_of", n, MAX_SEQUENCES, n)
    if best_of * prompts > MAX_SEQUENCES:
        param = "best_of" if "best_of" in fields.all else "n"
        raise ApiError(
            f"{param}={best_of} of {prompts} prompts are too many; expected {MAX_SEQUENCES}"
            " completions at most",
            param,
        )
    stream = fields.flag("stream")
    if stream and best_of > n:
        raise ApiError(f"best_of={best_of} does not go with stream; leave one out", "best_of")
    options = Fields(fields.mapping("stream_options"))
    return {
        "model": fields.text("model"),
        "fields": fields.all,
        "sampling": fields.sampling(),
        "n": n,
        "best_of": best_of,
        "stream": stream,
        "include_usage": options.flag("include_usage"),
    }


def parse_chat(body: Mapping[str, Any]) -> Call:
    """Return the call of a body for /v1/chat/completions; raises `ApiError`."""
    fields = Fields(body)
    logprobs = fields.integer("top_logprobs", 0, MAX_LOGPROBS, 0)
    if logprobs and not fields.flag("logprobs"):
        raise ApiError("top_logprobs needs logprobs; set it to true", "top_logprobs")
    return Call(
        messages=fields.messages(),
        tools=fields.tools(),
        max_tokens=fields.integer("max_tokens", 1, 2**31 - 1),
        logprobs=logprobs if fields.flag("logprobs") else None,
        continues=fields.flag("continue_final_message"),
        **_shared(fields, prompts=1),
    )


def parse_completion(body: Mapping[str, Any]) -> Call:
    """Return the call of a body for /v1/completions; raises `ApiError`."""
    fields = Fields(body)
    prompts = fields.prompts("prompt")
    return Call(
        prompts=prompts,
        max_tokens=fields.integer("max_tokens", 0, 2**31 - 1),
        logprobs=fields.integer("logprobs", 0, MAX_LOGPROBS),
        echo=fields.flag("echo"),
        **_shared(fields, prompts=len(prompts)),
    )


# ---- requests of the engine ----


def make_request(call: Call, llm: LLM) -> Request:
    """Return the request that a call is for a model.

    Without `max_tokens`, an answer may fill the context, and a completion has up to 16 tokens.

    Raises:
      ApiError: for what the model cannot do, such as a prompt and `max_tokens` that together are
        longer than the context.
    """
    options = dict(call.sampling)
    if call.logprobs is not None or call.best_of > call.n:
        options["logprobs"] = call.logprobs or 0
    with refusing(call.fields, call.text_field):
        params = llm.sampling_params(**options)
        if call.is_chat:
            template = llm.template
            ids = _dialogue(call, llm, template)
            # An answer that was begun goes on where it stands.
            strip = not call.continues or not call.messages[-1].content.strip()
            request = llm.chat_request(ids, params, template, n=call.best_of, strip=strip)
        else:
            request = llm.request(list(call.prompts), params, n=call.best_of, echo=call.echo)
    limits = [_limit(call, len(prompt), llm.context_length) for prompt in request.prompts]
    params_B = [
        dataclasses.replace(each, max_tokens=max(limit, 1))
        for each, limit in zip(request.params, limits)
    ]
    return dataclasses.replace(request, params=params_B)


def _dialogue(call: Call, llm: LLM, template: Template) -> list[int]:
    if not call.continues:
        return template.encode(call.messages, llm.tokenizer, call.tools)
    return template.encode_begun(call.messages, llm.tokenizer)


def _limit(call: Call, prompt: int, context: int) -> int:
    """Return how many tokens a completion of a prompt may have.

    Raises:
      ApiError: when they do not fit into the context.
    """
    most = context - prompt
    default = most if call.is_chat else min(TEXT_TOKENS, most)
    asked = default if call.max_tokens is None else call.max_tokens
    if most < 1 or asked > most:
        name = call.text_field
        needs = f"the prompt has {prompt} tokens"
        advice = f"shorten {'the dialogue' if call.is_chat else 'it'}"
        if most >= 1:
            name = "max_tokens" if "max_tokens" in call.fields else "max_completion_tokens"
            needs += f" and {name} is {asked}"
            advice += f", or lower {name} to {most}"
        raise ApiError(
            f"{needs}, but the model's context holds {context} tokens; {advice}",
            name,
            code="context_length_exceeded",
        )
    return asked
