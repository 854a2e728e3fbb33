"""A dialogue as a request: told in a chat format, shortened where that is allowed."""

import warnings
from collections.abc import Sequence

from llama_jax.config import require
from llama_jax.generation.request import Request, Wishes
from llama_jax.text.chat import Template
from llama_jax.text.messages import Message
from llama_jax.text.shortening import TruncationWarning, fit
from llama_jax.text.tokenizer import Tokenizer


def request_of_dialogue(
    messages: Sequence[Message],
    template: Template,
    tokenizer: Tokenizer,
    wishes: Wishes,
    stop_ids: tuple[int, ...],
    *,
    context: int,
    truncate: bool,
) -> tuple[Request, int]:
    """The request whose one text is the answer, and how many of the oldest exchanges it lacks.

    The answer is left `max_tokens` of the context, or a quarter of it if that is less. A warning
    says what was left out.

    Raises:
      UserError: as `shortening.fit`.
      UsageError: when more than one answer is wished for.
    """
    require(wishes.n == 1, f"n={wishes.n} does not go with a chat, which gives one answer")
    room = context - min(wishes.max_tokens, context // 4)
    fitted = fit(messages, template, tokenizer, room, truncate)
    if fitted.statement:
        warnings.warn(fitted.statement, TruncationWarning, stacklevel=3)
    ends = template.stops(tokenizer)
    all_ids = (*ends.ids, *stop_ids)
    request = Request([fitted.ids], [""], all_ids, wishes, stop_strings=ends.strings)
    return request, fitted.dropped
