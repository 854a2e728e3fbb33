"""Dialogues that outgrow the context: refused, or told without their oldest exchanges."""

import bisect
import dataclasses
import warnings
from collections.abc import Sequence

from llama_jax.errors import UserError
from llama_jax.text.chat import Template
from llama_jax.text.messages import Message
from llama_jax.text.tokenizer import Tokenizer


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
