"""Chat messages, and the templates that turn a dialogue into the ids of a prompt.

Llama 2's template gives exactly the ids of Meta's reference implementation, Alpaca's those of its
training code.
"""

import abc
import bisect
import dataclasses
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from typing import ClassVar

from llama_jax.errors import UsageError, UserError, did_you_mean
from llama_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
KEYS = ("role", "content")

# ---- messages ----


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a dialogue.

    Raises:
      UserError: for an unknown role, or content that is not text or has a lone surrogate.
    """

    role: str  # one of `ROLES`
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            hint = did_you_mean(self.role, ROLES) if isinstance(self.role, str) else ""
            role = reprlib.repr(self.role)
            raise UserError(f"role={role} is unknown; expected one of {', '.join(ROLES)}{hint}")
        if not isinstance(self.content, str):
            raise UserError(f"content={reprlib.repr(self.content)} is not text; expected a text")
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            lone = f"U+{ord(self.content[error.start]):04X}, at character {error.start}"
            raise UserError(f"content has a lone surrogate, {lone}; remove it") from error


def parse_messages(listing: object) -> list[Message]:
    """Return the messages of JSON such as `[{"role": "user", "content": "Hello"}]`.

    Items may also be `Message` objects.

    Raises:
      UserError: with the item and the key that are wrong.
    """
    if not isinstance(listing, list | tuple):
        raise UserError(
            f"messages={reprlib.repr(listing)} is not a list; expected a list of messages, each"
            ' like {"role": "user", "content": "Hello"}'
        )
    return [_parse_message(f"messages[{index}]", item) for index, item in enumerate(listing)]


def _parse_message(place: str, item: object) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        raise UserError(f"{place}={reprlib.repr(item)} is not a message; expected role and content")
    for key in item:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS)
            raise UserError(f"{place} has an unknown key {reprlib.repr(key)}{hint}")
    for key in KEYS:
        if key not in item:
            raise UserError(f"{place} has no {key}; expected role and content")
    try:
        return Message(item["role"], item["content"])
    except UserError as error:
        raise UserError(f"{place}.{error}") from error


def split_dialogue(messages: Sequence[Message]) -> tuple[str | None, list[str], list[str]]:
    """Return the system message or None, the user messages, and the answers to all but the last.

    Raises:
      UserError: unless user and assistant alternate, after an optional system message, and the
        last message is the user's.
    """
    has_system = bool(messages) and messages[0].role == "system"
    turns = messages[has_system:]
    for index, message in enumerate(turns):
        if message.role != ("assistant" if index % 2 else "user"):
            place = f"messages[{index + has_system}].role={message.role!r}"
            order = "expected user and assistant alternately, after an optional system message"
            raise UserError(f"{place} is out of order; {order}")
    if not turns:
        found = "only a system message" if has_system else "no message"
        raise UserError(f"the dialogue has {found}; expected a user message at its end")
    if len(turns) % 2 == 0:
        place = f"messages[{len(messages) - 1}], the last, is the assistant's"
        raise UserError(f"{place}; expected a user message, for the assistant to answer")
    contents = [message.content for message in turns]
    return messages[0].content if has_system else None, contents[::2], contents[1::2]


# ---- templates ----


@dataclasses.dataclass(frozen=True)
class Stops:
    """The token ids and the strings that end an answer."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


class Template(abc.ABC):
    """A chat format.

    Content never becomes a control id, and content with one of the template's own tags is refused.
    An answer ends at such a tag too, so that every answer can be sent back in the next prompt.
    """

    name: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def prompts(self, system: str | None, users: Sequence[str]) -> list[str]:
        """Return for each user message the text that the assistant's answer follows."""

    @abc.abstractmethod
    def encode_exchange(self, prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of a prompt and its answer; they begin with those of the prompt."""

    def encode_prompt(self, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """Return the ids of a prompt that is to be answered."""
        return tokenizer.encode(prompt, bos=True, eos=False)

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Return the ids whose continuation is the assistant's answer to the last message.

        They begin with the ids of the dialogue up to any earlier user message.

        Raises:
          UserError: for roles out of order, and for content with a tag of the template.
        """
        for index, message in enumerate(messages):
            for tag in self.tags:
                if tag in message.content:
                    raise UserError(
                        f"messages[{index}].content has {tag!r}, which the {self.name} template"
                        " uses to mark who speaks; remove it or spell it differently"
                    )
        system, users, answers = split_dialogue(messages)
        *past, last = self.prompts(system, users)
        ids = []
        for prompt, answer in zip(past, answers):
            ids += self.encode_exchange(prompt, answer, tokenizer)
        return ids + self.encode_prompt(last, tokenizer)

    def stops(self, tokenizer: Tokenizer) -> Stops:
        """Return what ends an answer."""
        return Stops(ids=(tokenizer.eos_id,), strings=self.tags)


class Llama2Template(Template):
    """The template of Llama-2-chat: each exchange between BOS and EOS, the tags as plain text.

    As in Meta's reference, a system message (even an empty one) is a part of the first exchange,
    and whitespace around the messages of user and assistant is dropped.
    """

    name = "llama2"
    tags = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def prompts(self, system: str | None, users: Sequence[str]) -> list[str]:
        first, *rest = users
        if system is not None:
            first = f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}"
        return [f"[INST] {user.strip()} [/INST]" for user in (first, *rest)]

    def encode_exchange(self, prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(f"{prompt} {answer.strip()} ", bos=True, eos=True)


class AlpacaTemplate(Template):
    """The template of Stanford Alpaca: an instruction, an optional input, and a response.

    A user message is an instruction. With a system message that is not empty, that is the
    instruction and the user message its input. The format has no dialogues: earlier exchanges
    precede the last as complete examples, each between BOS and EOS, as in training.
    """

    name = "alpaca"
    tags = ("### Instruction:", "### Input:", "### Response:")

    def prompts(self, system: str | None, users: Sequence[str]) -> list[str]:
        return [alpaca_prompt(system, user) if system else alpaca_prompt(user) for user in users]

    def encode_exchange(self, prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
        # Encoded separately: a piece such as ':"' would span both, and the ids of the prompt, after
        # which the answer was generated, would change.
        after = _encode_without_space(answer, tokenizer)
        return [*self.encode_prompt(prompt, tokenizer), *after, tokenizer.eos_id]


def _encode_without_space(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a text without the space that SentencePiece adds, where possible."""
    texts = ("\n", "\n" + text, text)
    line, both, alone = (tokenizer.encode(part, bos=False, eos=False) for part in texts)
    return both[len(line) :] if both[: len(line)] == line else alone


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the text that Alpaca's response follows directly; without an input if it is empty."""
    paired = ", paired with an input that provides further context" if input else ""
    context = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that"
        f" appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{context}"
        "### Response:"
    )


NO_TEMPLATE = "none"  # recorded in a checkpoint of a model without a chat format
TEMPLATES: dict[str, Template] = {each.name: each for each in (Llama2Template(), AlpacaTemplate())}


def find_template(name: str) -> Template:
    """Return the template of a name; `UsageError` with the nearest name if there is none."""
    expected = f"expected one of {', '.join(TEMPLATES)}"
    if not isinstance(name, str):
        raise UsageError(f"template={name!r} is not text; {expected}")
    if name not in TEMPLATES:
        hint = did_you_mean(name, TEMPLATES)
        raise UsageError(f"template={name!r} is unknown; {expected}{hint}")
    return TEMPLATES[name]


def resolve_template(name: str) -> Template:
    """Return the template that a user or a checkpoint names, by default ("") Llama 2's.

    Raises:
      UserError: for "none", the template of a model that was trained on no chat format.
    """
    if name == NO_TEMPLATE:
        raise UserError(
            "the checkpoint's model was trained on no chat format; choose a template, one of"
            f" {', '.join(TEMPLATES)}, or complete texts instead"
        )
    return find_template(name or Llama2Template.name)


# ---- dialogues longer than the context ----


class TruncationWarning(UserWarning):
    """Exchanges of a dialogue were left out; shown every time, not once per line of code."""


warnings.simplefilter("always", TruncationWarning, append=True)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A dialogue that fits into the context."""

    ids: list[int]
    dropped: int  # exchanges left out, each a user message and its answer
    statement: str  # the warning about them; "" if there are none


def fit(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer, room: int, truncate: bool
) -> Fitted:
    """Encode a dialogue; with `truncate`, without the oldest exchanges that do not fit.

    The system message and the last message always stay.

    Args:
      room: maximal number of ids, which leaves a part of the context to the answer.

    Raises:
      UserError: if the dialogue does not fit, or `template.encode` refuses it.
    """
    ids = template.encode(messages, tokenizer)
    if len(ids) <= room:
        return Fitted(ids, 0, "")
    size = f"the dialogue has {len(ids)} tokens, but the context has room for {room}"
    has_system = messages[0].role == "system"
    exchanges = (len(messages) - has_system) // 2
    if not truncate:
        advice = ", or set truncate to leave out its oldest exchanges" if exchanges else ""
        raise UserError(f"{size}; shorten it{advice}")

    def encode_without(oldest: int) -> list[int]:
        kept = [*messages[:has_system], *messages[has_system + 2 * oldest :]]
        return template.encode(kept, tokenizer)

    if (least := len(encode_without(exchanges))) > room:
        raise UserError(
            f"the part of the dialogue that cannot be left out has {least} tokens, but the context"
            f" has room for {room}; shorten the last message or the system message"
        )
    dropped = bisect.bisect_left(
        range(exchanges), True, lo=1, key=lambda oldest: len(encode_without(oldest)) <= room
    )
    which = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
    return Fitted(encode_without(dropped), dropped, f"{size}; its oldest {which} left out")
