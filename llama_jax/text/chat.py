"""Dialogues as token ids: the formats in which models learnt to answer.

Llama 2's is id for id what Meta's reference makes; Alpaca's is that of its training. Where the
ids go, and how an answer's text is cut, is not known here.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from llama_jax.errors import UsageError, UserError, nearest
from llama_jax.text.messages import Message, in_order
from llama_jax.text.tokenizer import Tokenizer


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
        expected = f"expected one of {', '.join(TEMPLATES)}{nearest(name, TEMPLATES)}"
        raise UsageError(f"template={name!r} is unknown; {expected}")
    return TEMPLATES[name]


def template_of(told: str) -> Template:
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
