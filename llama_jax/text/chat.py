"""Chat messages, and what a chat format does: turn a dialogue into the ids of a prompt.

`text.chat_formats` has the formats known by name, `text.jinja_template` those of a checkpoint.
"""

import abc
import bisect
import dataclasses
import reprlib
import warnings
from collections.abc import Mapping, Sequence

from llama_jax.errors import UserError, did_you_mean
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
    """A chat format."""

    name: str
    source: str  # a Jinja template that writes the same text

    @abc.abstractmethod
    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Return the ids whose continuation is the assistant's answer to the last message.

        Content never becomes a control id.

        Raises:
          UserError: for a dialogue that does not end with a user message, or that the format
            refuses.
        """

    @abc.abstractmethod
    def stops(self, tokenizer: Tokenizer) -> Stops:
        """Return what ends an answer."""


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
    questions = [place for place, message in enumerate(messages) if message.role == "user"]
    exchanges = len(questions) - 1
    if not truncate:
        advice = ", or set truncate to leave out its oldest exchanges" if exchanges else ""
        raise UserError(f"{size}; shorten it{advice}")

    def encode_without(oldest: int) -> list[int]:
        kept = [*messages[:has_system], *messages[questions[oldest] :]]
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
