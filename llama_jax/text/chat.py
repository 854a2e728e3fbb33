"""Chat messages, and what a chat format does: turn a dialogue into ids, to answer or to train on.

`text.chat_formats` has the formats known by name, `text.jinja_template` those of a checkpoint.
"""

import abc
import bisect
import dataclasses
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llama_jax.errors import UsageError, UserError, did_you_mean, shown
from llama_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
KEYS = ("role", "content")
Tools = Sequence[Mapping[str, Any]]
TRAIN_ON = ("answers", "last", "all")  # tokens of a dialogue that a model is trained on

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


def split_dialogue(
    messages: Sequence[Message], is_answered: bool = False
) -> tuple[str | None, list[str], list[str]]:
    """Return the system message or None, the user messages, and the answers to all but the last.

    With `is_answered`, the last user message has an answer too.

    Raises:
      UserError: unless user and assistant alternate, after an optional system message, and the
        last message is the user's, or with `is_answered` the assistant's.
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
    if len(turns) % 2 == is_answered:
        place = f"messages[{len(messages) - 1}], the last, is the {turns[-1].role}'s"
        expected = "a user message, for the assistant to answer"
        if is_answered:
            expected = "an answer of the assistant's"
        raise UserError(f"{place}; expected {expected}")
    contents = [message.content for message in turns]
    return messages[0].content if has_system else None, contents[::2], contents[1::2]


# ---- templates ----


@dataclasses.dataclass(frozen=True)
class Stops:
    """The token ids and the strings that end an answer."""

    ids: tuple[int, ...]
    strings: tuple[str, ...]


class TokenizedExample(NamedTuple):
    """The ids of an example, and which of them a model is trained to predict."""

    ids: list[int]
    weights: list[int]  # of each id in the loss: 1, or 0 for what is only read


class Template(abc.ABC):
    """A chat format."""

    name: str
    source: str  # a Jinja template that writes the same text

    @abc.abstractmethod
    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()
    ) -> list[int]:
        """Return the ids whose continuation is the assistant's answer to the last message.

        Content never becomes a control id.

        Args:
          tools: functions that the assistant may call, as OpenAI's protocol describes them.

        Raises:
          UserError: for a dialogue that does not end with a user message, or that the format
            refuses; for tools, if it has no place for them.
        """

    @abc.abstractmethod
    def encode_begun(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Return the ids whose continuation goes on with the last message, an answer.

        Whitespace at its end is left out: in most vocabularies it is a part of the next word.

        Raises:
          UserError: for a dialogue that does not end with an answer, or that the format refuses.
        """

    def encode_example(
        self, messages: Sequence[Message], tokenizer: Tokenizer, train_on: str = "answers"
    ) -> TokenizedExample:
        """Return the ids of a dialogue that ends with an answer, and what to train on.

        The ids begin with those that `encode` gives for the messages before the last answer, and
        go on as the format writes the answer and what follows it.

        Args:
          train_on: "answers": each answer and the token that ends it, so that a model learns to
            stop; "last": the last answer only; "all": every token.

        Raises:
          UserError: for a dialogue that does not end with an answer, that the format refuses, or
            whose answers nothing ends in this vocabulary.
        """
        if train_on not in TRAIN_ON:
            expected = ", ".join(map(repr, TRAIN_ON))
            raise UsageError(f"train_on={shown(train_on)} is unknown; expected one of {expected}")
        if not messages or messages[-1].role != "assistant":
            found = f"a last message of {messages[-1].role}'s" if messages else "no message"
            raise UserError(f"the dialogue has {found}; expected the assistant's answer at its end")
        ids, answers = self._encode_answered(messages, tokenizer, last_only=train_on != "answers")
        if train_on == "all":
            return TokenizedExample(ids, [1] * len(ids))
        last = max(answers, default=0)
        trained = {last} if train_on == "last" else {*range(1, last + 1)}
        return TokenizedExample(ids, [int(number in trained) for number in answers])

    @abc.abstractmethod
    def _encode_answered(
        self, messages: Sequence[Message], tokenizer: Tokenizer, last_only: bool
    ) -> tuple[list[int], list[int]]:
        """Return the ids of an answered dialogue, and the number of the answer that each is of.

        Answers count from 1, and include the token that ends them; 0 is no answer. With
        `last_only`, earlier ones may be left out.
        """

    @abc.abstractmethod
    def stops(self, tokenizer: Tokenizer) -> Stops:
        """Return what ends an answer."""


# ---- ids of a dialogue ----


@dataclasses.dataclass(frozen=True)
class Control:
    """A control token of a format; plain text for a vocabulary without such a token."""

    text: str


@dataclasses.dataclass(frozen=True)
class Answer:
    """Text that the model generates after the text before it."""

    text: str
    keeps_prompt: bool = False  # the ids before it are those without it; see `encode_answer`


BOS, EOS = Control("<bos>"), Control("<eos>")  # whatever their text is in a vocabulary
Part = str | Control | Answer


def encode_parts(
    parts: Sequence[Part], tokenizer: Tokenizer, is_answered: bool = False
) -> tuple[list[int], list[int]]:
    """Return the ids of parts, and for each the number of the answer it is of, from 1; 0: none.

    Texts that follow each other directly are encoded as one; with `is_answered`, the last answer
    keeps the ids of its prompt. The control token after an answer is a part of it.
    """
    ids, numbers = list[int](), list[int]()
    before, text, count, is_answer, is_exact = "", "", 0, False, False
    answers = sum(isinstance(part, Answer) for part in parts)
    own = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id}
    for part in (*parts, None):
        if isinstance(part, Answer):
            before, text = before + text, part.text
            count, is_answer = count + 1, True
            is_exact = part.keeps_prompt or (is_answered and count == answers)
        elif isinstance(part, str):
            text += part
        elif part is not None and part not in own and part.text not in tokenizer.special_ids:
            text += part.text
        else:
            tokens, start = encode_answer(before, text, tokenizer, is_exact)
            ids += tokens
            if part is not None:
                control = own[part] if part in own else tokenizer.special_ids[part.text]
                ids += [control] * (control != -1)
            numbers += [0] * start if is_answer else []
            numbers += [count * is_answer] * (len(ids) - len(numbers))
            before, text, is_answer, is_exact = "", "", False, False
    return ids, numbers


def encode_answer(
    before: str, answer: str, tokenizer: Tokenizer, is_exact: bool
) -> tuple[list[int], int]:
    """Return the ids of two texts, one after the other, and how many are of the first.

    A piece such as ':"' may span both. With `is_exact` there is none: the ids of the first text,
    after which a model generates the second, are those that it has by itself.
    """

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, bos=False, eos=False) if text else []

    joined, prompt = encode(before + answer), encode(before)
    if joined[: len(prompt)] == prompt:
        return joined, len(prompt)
    if is_exact:  # after a line end, SentencePiece adds no space
        line, both = encode("\n"), encode("\n" + answer)
        within = both[len(line) :] if both[: len(line)] == line else encode(answer)
        return prompt + within, len(prompt)
    decoder, length, count = tokenizer.decoder(), 0, 0
    while length < len(before) and count < len(joined):
        length, count = length + len(decoder.push(joined[count : count + 1])), count + 1
    return joined, count


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
