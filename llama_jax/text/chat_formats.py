"""The chat formats known by name, encoded id for id as their authors do.

Llama 2's gives the ids of Meta's reference implementation, Alpaca's those of its training code;
the others give those of `apply_chat_template` of transformers for their published templates.
"""

import abc
from collections.abc import Iterator, Sequence
from pathlib import Path

from llama_jax.errors import UsageError, UserError, did_you_mean
from llama_jax.text.chat import (
    BOS,
    EOS,
    Answer,
    Control,
    Message,
    Part,
    Stops,
    Template,
    Tools,
    encode_parts,
    split_dialogue,
)
from llama_jax.text.jinja_template import jinja_template, require_no_tools
from llama_jax.text.tokenizer import Tokenizer


class NamedFormat(Template):
    """A format that writes a dialogue as text and control tokens.

    Content with a tag of the format, which is not a control token, is refused. An answer ends at
    such a tag too, so that every answer can be sent back in the next prompt.
    """

    tags: tuple[str, ...] = ()  # plain text
    controls: tuple[str, ...] = ()  # tags if the vocabulary has no such tokens
    end = ""  # the control token after an answer, if not EOS

    @abc.abstractmethod
    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        """Yield what the ids of a dialogue are made of, answered or not; its roles are in order.

        A control token follows each `Answer`.
        """

    def encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, tools: Tools = ()
    ) -> list[int]:
        """Return the ids of a prompt, which begin with those for any earlier user message.

        Raises:
          UserError: for roles out of order, for content with a tag of the format, and for tools.
        """
        require_no_tools(tools)
        return self._encode(messages, tokenizer, is_answered=False)[0]

    def encode_begun(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        split_dialogue(messages, is_answered=True)
        *before, last = messages
        if not last.content.strip():
            return self.encode(before, tokenizer)
        begun = Message(last.role, last.content.rstrip())
        ids, _ = self._encode([*before, begun], tokenizer, is_answered=True, end=False)
        while not tokenizer.piece_text(ids[-1]).strip():  # that a format puts after an answer
            ids.pop()
        return ids

    def _encode_answered(
        self, messages: Sequence[Message], tokenizer: Tokenizer, last_only: bool
    ) -> tuple[list[int], list[int]]:
        needed = self.controls if self.end else ()
        missing = [text for text in needed if text not in tokenizer.special_ids]
        if missing or (not self.end and tokenizer.eos_id < 0):
            raise UserError(
                f"the {self.name} format cannot be trained with {tokenizer.path}, which has no"
                f" control token {' and no '.join(missing) or 'EOS'}; choose another chat format"
            )
        return self._encode(messages, tokenizer, is_answered=True)

    def _encode(
        self, messages: Sequence[Message], tokenizer: Tokenizer, is_answered: bool, end: bool = True
    ) -> tuple[list[int], list[int]]:
        for index, message in enumerate(messages):
            for tag in self._plain_tags(tokenizer):
                if tag in message.content:
                    raise UserError(
                        f"messages[{index}].content has {tag!r}, which the {self.name} template"
                        " uses to mark who speaks; remove it or spell it differently"
                    )
        split_dialogue(messages, is_answered)
        parts = list(self.parts(messages))
        if not end:  # what follows the answer is still to come
            last = max(place for place, part in enumerate(parts) if isinstance(part, Answer))
            parts = parts[: last + 1]
        return encode_parts(parts, tokenizer, is_answered)

    def stops(self, tokenizer: Tokenizer) -> Stops:
        ids = (tokenizer.special_ids.get(self.end, -1), tokenizer.eos_id)
        return Stops(tuple(token for token in ids if token >= 0), self._plain_tags(tokenizer))

    def _plain_tags(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return *self.tags, *(each for each in self.controls if each not in tokenizer.special_ids)


# ---- Jinja templates that write the same ----

ORDER = "the roles must alternate user/assistant/user/assistant, after an optional system message"
MESSAGES = (  # each as `message`, after the variable `system`
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% set content = message['content'] %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('" + ORDER + "') }}{% endif %}"
)


def _source(user: str, assistant: str, before: str = "", after: str = "") -> str:
    """Return a template of what precedes and follows a dialogue, and each of its messages is."""
    either = f"{{% if message['role'] == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}"
    return f"{before}{MESSAGES}{either}{{% endfor %}}{after}"


def _each_role(message: str, before: str, after: str) -> str:
    """Return a template in which a message is the same whoever wrote it."""
    prompt = f"{{% if add_generation_prompt %}}{after}{{% endif %}}"
    return f"{before}{{% for message in messages %}}{message}{{% endfor %}}{prompt}"


# ---- formats ----


def _split(messages: Sequence[Message]) -> tuple[str | None, list[str], list[str]]:
    return split_dialogue(messages, is_answered=messages[-1].role == "assistant")


def _content(message: Message) -> str | Answer:
    return Answer(message.content) if message.role == "assistant" else message.content


class Llama2Format(NamedFormat):
    """The format of Llama-2-chat: each exchange between BOS and EOS, the tags as plain text.

    As in Meta's reference, a system message (even an empty one) is a part of the first exchange,
    and whitespace around the messages of user and assistant is dropped.
    """

    name = "llama2"
    tags = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
    source = _source(
        "{% if loop.first and system is defined %}"
        "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}{% endif %}"
        "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}",
        "{{ ' ' + content.strip() + ' ' + eos_token }}",
    )

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        system, users, answers = _split(messages)
        if system is not None:
            users[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{users[0]}"
        prompts = [f"[INST] {user.strip()} [/INST]" for user in users]
        for prompt, answer in zip(prompts, answers):
            yield from (BOS, prompt, Answer(f" {answer.strip()} "), EOS)
        if len(prompts) > len(answers):
            yield from (BOS, prompts[-1])


class AlpacaFormat(NamedFormat):
    """The format of Stanford Alpaca: an instruction, an optional input, and a response.

    A user message is an instruction. With a system message that is not empty, that is the
    instruction and the user message its input. The format has no dialogues: earlier exchanges
    precede the last as complete examples, each between BOS and EOS, as in training.
    """

    name = "alpaca"
    tags = ("### Instruction:", "### Input:", "### Response:")

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        system, users, answers = _split(messages)
        prompts = [alpaca_prompt(system, each) if system else alpaca_prompt(each) for each in users]
        for prompt, answer in zip(prompts, answers):
            yield from (BOS, prompt, Answer(answer, keeps_prompt=True), EOS)
        if len(prompts) > len(answers):
            yield from (BOS, prompts[-1])


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the text that Alpaca's response follows directly; without an input if it is empty."""
    paired = ", paired with an input that provides further context" if input else ""
    context = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that"
        f" appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n{context}"
        "### Response:"
    )


def _alpaca_source() -> str:
    alone = repr(alpaca_prompt("{}")).replace("{}", "' + content + '")
    paired = repr(alpaca_prompt("{}", "[]")).replace("{}", "' + system + '")
    paired = paired.replace("[]", "' + content + '")
    user = f"{{% if system %}}{{{{ {paired} }}}}{{% else %}}{{{{ {alone} }}}}{{% endif %}}"
    return _source("{{ bos_token }}" + user, "{{ content + eos_token }}")


AlpacaFormat.source = _alpaca_source()


class ChatMLFormat(NamedFormat):
    """ChatML of OpenAI, which many models use: each message between two control tokens."""

    name = "chatml"
    controls = ("<|im_start|>", "<|im_end|>")
    end = "<|im_end|>"
    source = _each_role(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}",
        "",
        "{{ '<|im_start|>assistant\\n' }}",
    )

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        start, end = map(Control, self.controls)
        for each in messages:
            yield from (start, f"{each.role}\n", _content(each), end, "\n")
        if messages[-1].role != "assistant":
            yield from (start, "assistant\n")


class Llama3Format(NamedFormat):
    """The format of Llama 3 Instruct: control tokens around the role and after the message."""

    name = "llama3"
    controls = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    end = "<|eot_id|>"
    source = _each_role(
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] | trim + '<|eot_id|>' }}",
        "{{ bos_token }}",
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
    )

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        start, header_end, end = map(Control, self.controls)
        yield BOS
        for each in messages:
            content = _content(Message(each.role, each.content.strip()))
            yield from (start, each.role, header_end, "\n\n", content, end)
        if messages[-1].role != "assistant":
            yield from (start, "assistant", header_end, "\n\n")


class MistralFormat(NamedFormat):
    """The format of Mistral 7B Instruct: BOS once, EOS after each answer.

    A system message precedes the first user message, two line ends between them.
    """

    name = "mistral"
    controls = ("[INST]", "[/INST]")
    source = _source(
        "{% if loop.first and system is defined %}"
        "{% set content = system + '\\n\\n' + content %}{% endif %}"
        "{{ '[INST] ' + content + ' [/INST]' }}",
        "{{ ' ' + content + eos_token }}",
        "{{ bos_token }}",
    )

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        system, users, answers = _split(messages)
        if system is not None:
            users[0] = f"{system}\n\n{users[0]}"
        start, end = map(Control, self.controls)
        yield BOS
        for user, answer in zip(users, answers):
            yield from (start, f" {user} ", end, Answer(f" {answer}"), EOS)
        if len(users) > len(answers):
            yield from (start, f" {users[-1]} ", end)


class ZephyrFormat(NamedFormat):
    """The format of Zephyr and TinyLlama Chat: the role as plain text, EOS after each message."""

    name = "zephyr"
    controls = ("<|system|>", "<|user|>", "<|assistant|>")
    source = _each_role(
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}",
        "",
        "{{ '<|assistant|>\\n' }}",
    )

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        for each in messages:
            yield from (Control(f"<|{each.role}|>"), "\n", _content(each), EOS, "\n")
        if messages[-1].role != "assistant":
            yield from (Control("<|assistant|>"), "\n")


class VicunaFormat(NamedFormat):
    """The format of Vicuna 1.1 and later, as FastChat writes it: plain text, EOS after answers."""

    name = "vicuna"
    tags = ("USER:", "ASSISTANT:")
    SYSTEM = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
        " gives helpful, detailed, and polite answers to the user's questions."
    )
    source = _source(
        "{% if loop.first %}{{ (system if system is defined else default) + ' ' }}{% endif %}"
        "{{ 'USER: ' + content + ' ASSISTANT:' }}",
        "{{ ' ' + content + eos_token }}",
        f'{{{{ bos_token }}}}{{% set default = "{SYSTEM}" %}}',
    )

    def parts(self, messages: Sequence[Message]) -> Iterator[Part]:
        system, users, answers = _split(messages)
        yield from (BOS, f"{self.SYSTEM if system is None else system} ")
        for user, answer in zip(users, answers):
            yield from (f"USER: {user} ASSISTANT:", Answer(f" {answer}"), EOS)
        if len(users) > len(answers):
            yield f"USER: {users[-1]} ASSISTANT:"


NO_TEMPLATE = "none"  # recorded in a checkpoint of a model without a chat format
FORMATS: tuple[NamedFormat, ...] = (
    Llama2Format(),
    AlpacaFormat(),
    ChatMLFormat(),
    Llama3Format(),
    MistralFormat(),
    ZephyrFormat(),
    VicunaFormat(),
)
TEMPLATES = {each.name: each for each in FORMATS}


def find_template(name: str, argument: str = "template=") -> Template:
    """Return the template of a name, or of a Jinja source.

    Args:
      argument: what messages call the name.

    Raises:
      UsageError: with the nearest name if there is none.
      UserError: for a Jinja template that does not parse.
    """
    expected = f"expected one of {', '.join(TEMPLATES)}, or a Jinja template"
    if not isinstance(name, str):
        raise UsageError(f"{argument}{name!r} is not text; {expected}")
    if name in TEMPLATES:
        return TEMPLATES[name]
    if "{{" in name or "{%" in name:
        return jinja_template(name)
    hint = did_you_mean(name, TEMPLATES)
    raise UsageError(f"{argument}{name!r:.60} is unknown; {expected}{hint}")


def read_template(word: str, argument: str = "template=") -> str:
    """Return what a flag means: a name of a format, or the source in a file ending with .jinja.

    Raises:
      UsageError: for an unknown name.
      UserError: when the file cannot be read, or its template does not parse.
    """
    if word.endswith(".jinja"):
        try:
            word = Path(word).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8"
            raise UserError(f"{argument}{word} cannot be read: {reason}") from error
        return template_name(word)
    if word:
        find_template(word, argument)
    return word


def template_name(source: str) -> str:
    """Return what a checkpoint records for a Jinja template: a name if it is one of ours.

    Raises:
      UserError: if it does not parse.
    """
    jinja_template(source)
    return next((name for name, each in TEMPLATES.items() if each.source == source), source)


def resolve_template(name: str) -> Template:
    """Return the template that a user or a checkpoint names, by default ("") Llama 2's.

    Raises:
      UserError: for "none", the template of a model that was trained on no chat format; and as
        `find_template` does.
    """
    if name == NO_TEMPLATE:
        raise UserError(
            "the checkpoint's model was trained on no chat format; choose a template, one of"
            f" {', '.join(TEMPLATES)}, or complete texts instead"
        )
    return find_template(name or Llama2Format.name)
