"""Jinja chat templates, as checkpoints from Hugging Face bring them."""

import contextlib
import functools
import re
from collections.abc import Iterable, Sequence

from llama_jax.errors import UserError
from llama_jax.text.chat import Message, Stops, Template, encode_answer
from llama_jax.text.jinja_sandbox import Sandbox
from llama_jax.text.tokenizer import Tokenizer

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
        self._sandbox = Sandbox(seconds)
        self._template = self._sandbox.compile_template(source)

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        if not messages or messages[-1].role != "user":
            found = "no message" if not messages else f"a last message of {messages[-1].role}'s"
            raise UserError(f"the dialogue has {found}; expected a user message at its end")
        shielded, mark = _shield(messages, tokenizer)
        return _encode_text(self.render(shielded, tokenizer), tokenizer, mark)[0]

    def encode_begun(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        if len(messages) < 2 or messages[-1].role != "assistant":
            raise UserError("the dialogue does not end with an answer; expected one to go on with")
        shielded, mark = _shield(messages, tokenizer)
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
        shielded, mark = _shield(messages, tokenizer)
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
        self, messages: Sequence[Message], tokenizer: Tokenizer, answers: bool = True
    ) -> str:
        """Return the text of a dialogue, up to where the assistant answers if `answers`.

        Raises:
          UserError: with the template's own words if it refuses the dialogue; if it fails, does
            something that the sandbox forbids, or takes too long.
        """
        names = {token: text for text, token in tokenizer.special_ids.items()}
        variables = {
            "messages": [{"role": each.role, "content": each.content} for each in messages],
            "bos_token": names.get(tokenizer.bos_id, ""),
            "eos_token": names.get(tokenizer.eos_id, ""),
            "add_generation_prompt": answers,
            "tools": None,
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


def _shield(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[Message], str]:
    """Return messages in which no control token occurs, and the mark that keeps them apart.

    It stands after the first character of each control token that the content spells.
    """
    controls = _controls(tokenizer)
    mark = _unused_character("".join(message.content for message in messages))
    if not controls:
        return list(messages), mark
    starts = re.compile(f"(?=(?:{_either(controls)})).", re.DOTALL)
    shielded = [
        Message(each.role, starts.sub(lambda found: found[0] + mark, each.content))
        for each in messages
    ]
    return shielded, mark


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
