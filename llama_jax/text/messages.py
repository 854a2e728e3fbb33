"""What the sides of a dialogue said, checked: their roles, their order, and JSON of them.

Knows no format in which a model is told of them.
"""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence

from llama_jax.errors import UserError, nearest

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
            hint = nearest(self.role, ROLES) if isinstance(self.role, str) else ""
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
            hint = nearest(str(key), KEYS)
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
