"""Jinja chat templates, as checkpoints from Hugging Face bring them."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llama_jax.errors import UserError
from llama_jax.text.chat import Message, Stops, Template, Tools, encode_answer
from llama_jax.text.jinja_sandbox import Sandbox
from llama_jax.text.tokenizer import Tokenizer
from llama_jax.text.tools import TOOL_ROLE, ToolMessage

SECONDS = 10.0  # for one dialogue; usual templates take a few milliseconds
NONCHARACTERS = range(0xFDD0, 0xFDF0)  # never part of a text, says Unicode
PROBE = "Hello"


class JinjaTemplate(Template):
    """A chat template in Jinja, with the variables and functions that transformers provides.

    Its text becomes the ids that `apply_chat_template` of transformers returns: control tokens
    where the template writes them, and everything between them encoded separately. A control token
    in the content of a message stays plain text.
    """

    name = "jinja"

    def __init__(self, source: str, seconds: float = SECONDS) -> None:
        """Compile a template; `seconds` limits the time of each rendering.

        Raises:
          UserError: if it is not a template.
        """
        self.source = source
        self._has_tools = re.search(r"\btools\b", source) is not None
        self._sandbox = Sandbox(seconds)
        self._template = self._sandbox.compile_template(source)

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()
    ) -> list[int]:
        if not messages or messages[-1].role not in ("user", TOOL_ROLE):
            found = "no message" if not messages else f"a last message of {messages[-1].role}'s"
            raise UserError(f"the dialogue has {found}; expected a user message at its end")
        if not self._has_tools:
            require_no_tools(tools)
        shield = _Shield(tokenizer, [messages, tools])
        text = self.render(shield.messages(messages), tokenizer, tools=shield.value(tools))
        return _encode_text(text, tokenizer, shield.mark)[0]

    def encode_begun(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise UserError("the dialogue does not end with an answer; expected one to go on with")
        shield = _Shield(tokenizer, messages)
        shielded, mark = shield.messages(messages), shield.mark
        prompt = self.render(shielded[:-1], tokenizer)
        begun = shielded[-1].content.strip()
        text = self.render(shielded, tokenizer, answers=False)
        start = text.find(begun, len(prompt))
        if not text.startswith(prompt) or start < 0:
            raise UserError(
                "the last message cannot be continued: the chat template does not write it right"
                " after its prompt; choose another chat format"
            )
        text = text[: start + len(begun)]
        return _encode_text(text, tokenizer, mark, [len(prompt), len(text)])[0]

    def _encode_answered(
        self, messages: Sequence[Message], tokenizer: Tokenizer, last_only: bool
    ) -> tuple[list[int], list[int]]:
        shield = _Shield(tokenizer, messages)
        shielded, mark = shield.messages(messages), shield.mark
        text = self.render(shielded, tokenizer, answers=False)
        spans: list[tuple[int, int]] = []  # of the answers in the text, with what follows each
        last = len(messages) - 1
        for index, message in enumerate(messages):
            if message.role == "assistant" and (index == last or not last_only):
                prompt = self.render(shielded[:index], tokenizer)
                upto = self.render(shielded[: index + 1], tokenizer, answers=False)
                if not (text.startswith(upto) and upto.startswith(prompt)):
                    raise UserError(
                        f"messages[{index}] cannot be trained on: the chat template does not write"
                        " it right after its prompt; train on the last answer only, or choose"
                        " another chat format"
                    )
                spans.append((len(prompt), len(upto)))
        ids, counts = _encode_text(text, tokenizer, mark, [each for span in spans for each in span])
        numbers, stops = [0] * len(ids), self.stops(tokenizer).ids
        for number, (start, end) in enumerate(zip(counts[::2], counts[1::2]), start=1):
            stop = next((place for place in range(start, end) if ids[place] in stops), end - 1)
            numbers[start : stop + 1] = [number] * (stop + 1 - start)
        if not any(number == len(spans) and token in stops for token, number in zip(ids, numbers)):
            if tokenizer.eos_id < 0:
                raise UserError(
                    f"the chat template writes no control token of {tokenizer.path} after an"
                    " answer, where a model could learn to stop; choose another chat format"
                )
            ids, numbers = [*ids, tokenizer.eos_id], [*numbers, len(spans)]
        return ids, numbers

    def stops(self, tokenizer: Tokenizer) -> Stops:
        """Return EOS, and the control token that the template writes after an answer."""
        ids = [tokenizer.eos_id] if tokenizer.eos_id >= 0 else []
        with contextlib.suppress(UserError):
            answered = [Message("user", "x"), Message("assistant", PROBE)]
            text = self.render(answered, tokenizer, answers=False).rpartition(PROBE)[2].lstrip()
            ids += [token for end, token in tokenizer.special_ids.items() if text.startswith(end)]
        return Stops(ids=tuple(dict.fromkeys(ids)), strings=())

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        answers: bool = True,
        tools: Tools = (),
    ) -> str:
        """Return the text of a dialogue, up to where the assistant answers if `answers`.

        Raises:
          UserError: with the template's own words if it refuses the dialogue; if it fails, does
            something that the sandbox forbids, or takes too long.
        """
        names = {token: text for text, token in tokenizer.special_ids.items()}
        variables = {
            "messages": [_variables(each) for each in messages],
            "bos_token": names.get(tokenizer.bos_id, ""),
            "eos_token": names.get(tokenizer.eos_id, ""),
            "add_generation_prompt": answers,
            "tools": tools or None,
            "documents": None,
        }
        return self._sandbox.render_bounded(self._template, variables)


@functools.lru_cache(maxsize=8)
def jinja_template(source: str) -> JinjaTemplate:
    """Return the template with this source; the last few are kept compiled."""
    return JinjaTemplate(source)


def _controls(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the control tokens that a template can write."""
    return {text: token for text, token in tokenizer.special_ids.items() if len(text) > 1}


def require_no_tools(tools: Tools) -> None:
    """Raise `UserError` for tools, if there are any, in a chat format without a place for them."""
    if tools:
        raise UserError(
            "tools have no place in the model's chat format; leave them out, or use a model whose"
            " chat template has them"
        )


def _variables(message: Message) -> dict[str, Any]:
    """Return a message as templates see it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if isinstance(message, ToolMessage) and message.tool_calls:
        found["tool_calls"] = message.tool_calls
    return found


class _Shield:
    """Keeps what users write apart from control tokens.

    A mark stands after the first character of each control token that a text spells.
    """

    def __init__(self, tokenizer: Tokenizer, values: Any):
        """Choose a mark that is in none of the texts of `values`, which may be nested."""
        controls = _controls(tokenizer)
        self.mark = _unused_character("".join(_texts(values)))
        self._starts = controls and re.compile(f"(?=(?:{_either(controls)})).", re.DOTALL)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages in which no control token occurs."""
        return [dataclasses.replace(each, **self.value(_variables(each))) for each in messages]

    def value(self, value: Any) -> Any:
        """Return a text, or a collection with texts in it, in which no control token occurs."""
        if isinstance(value, str) and self._starts:
            return self._starts.sub(lambda found: found[0] + self.mark, value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(item) for key, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterable[str]:
    """Yield the texts in a value: in messages, mappings and sequences."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Message):
        yield from _texts(_variables(value))
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _encode_text(
    text: str, tokenizer: Tokenizer, mark: str, positions: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Return the ids of a rendered text, and how many precede each position in it.

    Args:
      positions: starts and ends of the answers, in turn; the last answer keeps the ids before it.
    """
    controls = _controls(tokenizer)
    ids: list[int] = []
    counts = dict.fromkeys(positions, 0)
    start = 0
    for part in re.split(f"({_either(controls)})", text) if controls else [text]:
        end = start + len(part)
        cuts = [each - start for each in positions if start <= each < end]
        if part in controls:
            tokens = [controls[part]]
            counts |= {start + cut: len(ids) for cut in cuts}
        else:
            tokens = tokenizer.encode(part.replace(mark, "")) if part and not cuts else []
            for cut in cuts:
                before, after = (each.replace(mark, "") for each in (part[:cut], part[cut:]))
                is_last = start + cut == positions[-2]
                tokens, count = encode_answer(before, after, tokenizer, is_exact=is_last)
                counts[start + cut] = len(ids) + count
        ids += tokens
        start = end
    counts |= {start: len(ids)}
    return ids, [counts[each] for each in positions]


def _either(texts: Iterable[str]) -> str:
    """Return a regular expression of any of the texts, the longest that fits."""
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


def _unused_character(text: str) -> str:
    for number in NONCHARACTERS:
        if chr(number) not in text:
            return chr(number)
    raise UserError("the messages have all characters U+FDD0 to U+FDEF; remove them")
