"""What the sides of a dialogue said, checked: their roles, their order, and JSON of them.

Knows no format in which a model is told of them.
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
ORDER = "expected user and assistant in turns, after a system message or none"


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side said.

    Raises:
      UserError: when made of an unknown role, or of content that is no text or no Unicode.
    """

    role: str  # one of ROLES
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
    """The messages of JSON such as `[{"role": "user", "content": "Hello"}]`.

    Items may also be messages already.

    Raises:
      UserError: naming the item and its key.
    """
    if not isinstance(listing, list | tuple):
        raise UserError(
            f"messages={reprlib.repr(listing)} is not a list; expected a list of messages, each"
            ' like {"role": "user", "content": "Hello"}'
        )
    return [_parsed(f"messages[{index}]", item) for index, item in enumerate(listing)]


def _parsed(place: str, item: object) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping):
        raise UserError(f"{place}={reprlib.repr(item)} is no message; expected role and content")
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


def in_order(messages: Sequence[Message]) -> tuple[str | None, list[str], list[str]]:
    """The system message if any, what the user said, and the answers to all but the last."""
    has_system = bool(messages) and messages[0].role == "system"
    turns = messages[has_system:]
    for index, message in enumerate(turns):
        if message.role != ("assistant" if index % 2 else "user"):
            place = f"messages[{index + has_system}].role={message.role!r}"
            raise UserError(f"{place} is out of order; {ORDER}")
    if not turns:
        found = "only a system message" if has_system else "no message"
        raise UserError(f"the dialogue has {found}; expected one of the user at its end")
    if len(turns) % 2 == 0:
        place = f"messages[{len(messages) - 1}], the last, is the assistant's"
        raise UserError(f"{place}; expected the user's, for the assistant to answer")
    contents = [message.content for message in turns]
    return messages[0].content if has_system else None, contents[::2], contents[1::2]


# Dialogues as token ids: the formats in which models learnt to answer.
#
# Llama 2's is id for id what Meta's reference makes; Alpaca's is that of its training. Where the
# ids go, and how an answer's text is cut, is not known here.


@dataclasses.dataclass(frozen=True)
class Stops:
    """What ends an answer: ids, and texts in it."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


class Template(abc.ABC):
    """A chat format.

    Content never becomes a control id, and content that holds one of the format's own tags is
    refused. An answer ends at such a tag too, so what was answered can always be sent back.
    """

    name: ClassVar[str]
    tags: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def prompts(self, system: str | None, users: Sequence[str]) -> list[str]:
        """For each thing that the user said, the text to which the assistant's answer is added."""

    @abc.abstractmethod
    def answered(self, prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a prompt with its answer, which begin with those of the prompt alone."""

    def asked(self, prompt: str, tokenizer: Tokenizer) -> list[int]:
        """The ids of a prompt that awaits its answer."""
        return tokenizer.encode(prompt, bos=True, eos=False)

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """The ids whose continuation is the assistant's answer to the last message.

        They begin with the ids of the dialogue up to any earlier message of the user.

        Raises:
          UserError: for roles out of order, and for content that holds a tag of the format.
        """
        self._refuse_tags(messages)
        system, users, answers = in_order(messages)
        *past, last = self.prompts(system, users)
        ids = []
        for prompt, answer in zip(past, answers):
            ids += self.answered(prompt, answer, tokenizer)
        return ids + self.asked(last, tokenizer)

    def stops(self, tokenizer: Tokenizer) -> Stops:
        """What ends an answer in this format."""
        return Stops(ids=(tokenizer.eos_id,), strings=self.tags)

    def _refuse_tags(self, messages: Sequence[Message]) -> None:
        for index, message in enumerate(messages):
            for tag in self.tags:
                if tag in message.content:
                    raise UserError(
                        f"messages[{index}].content holds {tag!r}, which the {self.name} format"
                        " uses to mark who speaks; remove or respell it"
                    )


class Llama2Template(Template):
    """The format of Llama-2-chat: each exchange between BOS and EOS, the tags plain text.

    As in Meta's reference a system message, even an empty one, is a part of the first exchange,
    and blanks around what user and assistant said are dropped.
    """

    name = "llama2"
    tags = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def prompts(self, system: str | None, users: Sequence[str]) -> list[str]:
        first, *rest = users
        if system is not None:
            first = f"<<SYS>>\n{system}\n<</SYS>>\n\n{first}"
        return [f"[INST] {user.strip()} [/INST]" for user in (first, *rest)]

    def answered(self, prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
        return tokenizer.encode(f"{prompt} {answer.strip()} ", bos=True, eos=True)


class AlpacaTemplate(Template):
    """The format of Stanford Alpaca, which knows an instruction, perhaps an input, and a response.

    What the user says is an instruction. With a system message that is not empty, that one is the
    instruction and what the user says its input. The format has no dialogues: earlier exchanges
    stand before the last as whole examples, each between BOS and EOS, as in training.
    """

    name = "alpaca"
    tags = ("### Instruction:", "### Input:", "### Response:")

    def prompts(self, system: str | None, users: Sequence[str]) -> list[str]:
        return [alpaca_prompt(system, user) if system else alpaca_prompt(user) for user in users]

    def answered(self, prompt: str, answer: str, tokenizer: Tokenizer) -> list[int]:
        # Apart: a piece such as ':"' would span both, but answers follow the prompt's own ids.
        after = _continuing(answer, tokenizer)
        return [*self.asked(prompt, tokenizer), *after, tokenizer.eos_id]


def _continuing(text: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text without the space that SentencePiece puts before it, where possible."""
    texts = ("\n", "\n" + text, text)
    line, both, alone = (tokenizer.encode(part, bos=False, eos=False) for part in texts)
    return both[len(line) :] if both[: len(line)] == line else alone


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The text that Alpaca's response follows directly; an empty input is none."""
    given = ", paired with an input that provides further context" if input else ""
    context = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{given}. Write a response that"
        f" appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{context}"
        "### Response:"
    )


NO_TEMPLATE = "none"  # what a checkpoint tells that learnt none
TEMPLATES: dict[str, Template] = {each.name: each for each in (Llama2Template(), AlpacaTemplate())}


def find_template(name: str) -> Template:
    """The template of a name; `UsageError` with the nearest name if there is none."""
    if not isinstance(name, str):
        raise UsageError(f"template={name!r} is no text; expected one of {', '.join(TEMPLATES)}")
    if name not in TEMPLATES:
        expected = f"expected one of {', '.join(TEMPLATES)}{did_you_mean(name, TEMPLATES)}"
        raise UsageError(f"template={name!r} is unknown; {expected}")
    return TEMPLATES[name]


def resolve_template(told: str) -> Template:
    """The template that a user asked for or a checkpoint tells; of "", which is neither, Llama 2's.

    Raises:
      UserError: for "none", of a model that learnt no chat format.
    """
    if told == NO_TEMPLATE:
        raise UserError(
            f"the checkpoint tells that it learnt no chat format; choose one with template, one of"
            f" {', '.join(TEMPLATES)}, or go on with texts instead"
        )
    return find_template(told or Llama2Template.name)


# Dialogues that outgrow the context: refused, or told without their oldest exchanges.


class TruncationWarning(UserWarning):
    """What a dialogue has lost; shown each time, not once for each line that asks."""


warnings.simplefilter("always", TruncationWarning, append=True)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A dialogue that has room, and what that took."""

    ids: list[int]
    dropped: int  # exchanges, each a message of the user and its answer
    statement: str  # what the user must be told; "" when nothing was dropped


def fit(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer, room: int, truncate: bool
) -> Fitted:
    """The dialogue as it is; or, with `truncate`, without the oldest exchanges that leave no room.

    A system message and the last message always stay.

    Args:
      room: the most ids that the prompt may have, which leaves some of the context to the answer.

    Raises:
      UserError: with both numbers when there is no room; also whatever `template.encode` refuses.
    """
    whole = template.encode(messages, tokenizer)
    if len(whole) <= room:
        return Fitted(whole, 0, "")
    size = f"the dialogue has {len(whole)} tokens, but the context has room for {room}"
    has_system = messages[0].role == "system"
    exchanges = (len(messages) - has_system) // 2
    if not truncate:
        way = ", or have its oldest exchanges left out with truncate" if exchanges else ""
        raise UserError(f"{size}; shorten it{way}")

    def without(oldest: int) -> list[Message]:
        return [*messages[:has_system], *messages[has_system + 2 * oldest :]]

    def size_without(oldest: int) -> int:
        return len(template.encode(without(oldest), tokenizer))

    if (least := size_without(exchanges)) > room:
        raise UserError(
            f"what cannot be left out of the dialogue has {least} tokens, but the context has"
            f" room for {room}; shorten the last message or the system message"
        )
    dropped = bisect.bisect_left(
        range(exchanges), True, lo=1, key=lambda oldest: size_without(oldest) <= room
    )
    which = "exchange was" if dropped == 1 else f"{dropped} exchanges were"
    ids = template.encode(without(dropped), tokenizer)
    return Fitted(ids, dropped, f"{size}; its oldest {which} left out")
