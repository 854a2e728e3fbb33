"""Examples to fine-tune on, encoded with their loss weights and written to a token folder.

They are held in memory, about 4 bytes a token, because the validation split is chosen among those
that are kept.
"""

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama_jax.data.prepare.corpora import VALIDATION_FRACTION, choose_held_out
from llama_jax.data.prepare.documents import ReadProgress
from llama_jax.data.prepare.records import (
    Dialogue,
    Instruction,
    Located,
    PlainCompletion,
    PlainText,
    Preference,
    RawExample,
    Unusable,
    parse_example,
)
from llama_jax.data.token_folder import (
    DIALOGUES,
    PREFERENCES,
    TokenFolder,
    TokenWriter,
    token_dtype,
)
from llama_jax.errors import UserError, escape_controls, shown
from llama_jax.files import new_folder, progress
from llama_jax.text.chat import BOS, EOS, Answer, Message, Part, Template, encode_parts
from llama_jax.text.chat import TokenizedExample as Tokenized
from llama_jax.text.chat_formats import TEMPLATES, AlpacaFormat
from llama_jax.text.tokenizer import Tokenizer, save_tokenizer

COLOUR, PLAIN = "\x1b[32m", "\x1b[0m"  # of trained tokens on a terminal, green
MARKS = ("{+", "+}")  # around them elsewhere, as in a diff by words
ALPACA = AlpacaFormat()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleOptions:
    """Settings of the encoding of examples."""

    template: Template | None = None  # of dialogues; None: there must be none
    template_for_instructions: bool = False  # else Alpaca's records get Alpaca's own format
    train_on: str = "answers"  # or "last", "all"; see `Template.encode_example`
    sequence_length: int = 0  # positions in a sequence, the most an example may take; 0: no limit
    overlong: str = "drop"  # or "cut": texts from the right; dialogues and pairs are dropped
    validation: float = VALIDATION_FRACTION  # fraction of the examples, in [0, 1)
    bos: bool = True  # BOS before a text
    shard_tokens: int = 100_000_000  # tokens per file


@dataclasses.dataclass
class Report:
    """What became of the records that were read."""

    read: int = 0
    kept: int = 0
    changed: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    dropped: dict[str, int] = dataclasses.field(default_factory=collections.Counter)
    first_dropped: dict[str, str] = dataclasses.field(default_factory=dict)  # by reason

    def lines(self) -> list[str]:
        """Return lines that say what was dropped and changed."""
        lines = [
            f"dropped {count:,} of {self.read:,}: {reason}; first {self.first_dropped[reason]}"
            for reason, count in self.dropped.items()
        ]
        return [*lines, *(f"{what}: {count:,}" for what, count in self.changed.items())]


class _Item(NamedTuple):
    """A kept example: one text, or a chosen and a rejected one."""

    tokens: list[np.ndarray]
    masks: list[np.ndarray]  # uint8
    characters: int
    kind: str

    def digest(self) -> bytes:
        """Return a hash of the tokens and weights."""
        digest = hashlib.blake2b(digest_size=16)
        for tokens, mask in zip(self.tokens, self.masks):
            digest.update(len(tokens).to_bytes(8, "little") + tokens.tobytes() + mask.tobytes())
        return digest.digest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Display:
    """Shows examples while they are prepared: the first ones, and all that are dropped or cut."""

    write: Callable[[str], None]  # a line, or a few
    count: int  # of the first ones
    is_terminal: bool = False  # trained tokens in colour, not between marks


class _Encoder:
    """Encodes examples of every kind."""

    def __init__(self, tokenizer: Tokenizer, options: ExampleOptions) -> None:
        self.tokenizer, self.options = tokenizer, options
        self.used_templates: set[str] = set()

    @functools.cached_property
    def _template(self) -> Template:
        """The chat format, once it is known that this vocabulary can be trained in it."""
        template = self.options.template
        if template is None:
            raise UserError(
                "the data have dialogues, but the tokenizer names no chat format; choose one with"
                f" --chat: {', '.join(TEMPLATES)}, or a .jinja file"
            )
        template.encode_example([Message("user", "x"), Message("assistant", "x")], self.tokenizer)
        return template

    def encode(self, example: RawExample, train_on: str) -> Tokenized:
        """Return the ids and weights of an example that is not a pair.

        Raises:
          UserError: if the vocabulary has no tokens that are needed.
          Unusable: if the chat format refuses the dialogue.
        """
        options, tokenizer = self.options, self.tokenizer
        match example:
            case PlainText(text):
                self._require_eos()
                ids = tokenizer.encode(text, bos=options.bos, eos=True)
                return Tokenized(ids, [1] * len(ids))
            case PlainCompletion(prompt, completion):
                self._require_eos()
                start: list[Part] = [BOS] if options.bos else []
                parts = [*start, prompt, Answer(completion, keeps_prompt=True), EOS]
                ids, numbers = encode_parts(parts, tokenizer)
                return Tokenized(ids, [1] * len(ids) if train_on == "all" else numbers)
            case Instruction(instruction, text, output):
                answer = Message("assistant", output)
                if options.template and options.template_for_instructions:
                    question = f"{instruction}\n\n{text}" if text else instruction
                    messages = [Message("user", question), answer]
                    return self._chat(messages, self._template, train_on)
                self._require_eos()
                messages = [Message("system" if text else "user", instruction)]
                messages += [Message("user", text)] * bool(text)
                return self._chat([*messages, answer], ALPACA, train_on)
            case Dialogue(_, is_prompted):
                train_on = "last" if is_prompted and train_on == "answers" else train_on
                return self._chat(example.messages, self._template, train_on)
        raise TypeError(example)

    def _chat(self, messages: Sequence[Message], template: Template, train_on: str) -> Tokenized:
        try:
            encoded = template.encode_example(messages, self.tokenizer, train_on)
        except UserError as error:
            reason = f"refused by the chat format {template.name}"
            raise Unusable(reason, str(error)) from error
        self.used_templates.add(template.source if template.name == "jinja" else template.name)
        return encoded

    def _require_eos(self) -> None:
        if self.tokenizer.eos_id < 0:
            raise UserError(
                f"{self.tokenizer.path} has no EOS token, which ends an example; give another"
                " tokenizer, or dialogues and a chat format"
            )


def prepare_examples(
    records: Iterable[Located],
    output: Path,
    tokenizer: Tokenizer,
    options: ExampleOptions,
    *,
    source: str,
    state: ReadProgress | None = None,
    size: int = 0,
    display: Display | None = None,
) -> tuple[TokenFolder, Report]:
    """Write records as examples to a new token folder, and return what became of them.

    Args:
      records: see `records.parse_example`; exact duplicates are dropped.
      source: what they are, for messages and metadata.
      state, size: the bytes read so far, and in total, for the progress bar.

    Raises:
      UserError: if a record is damaged or of no known kind, too few examples are left, the
        tokenizer lacks the tokens of the chat format, or the folder cannot be written.
    """
    encoder, report, state = _Encoder(tokenizer, options), Report(), state or ReadProgress()
    items: list[_Item] = []
    with progress("encoding examples", size) as bar:
        for where, item in _items(records, encoder, report, display):
            if items and item.kind != items[0].kind:
                raise UserError(
                    f"{where} and the examples before it are of different kinds, {item.kind} and"
                    f" {items[0].kind}; prepare them by themselves"
                )
            items.append(item)
            bar(state.done)
    least = 2 if options.validation else 1
    if len(items) < least:
        counts = [f"{count:,} {reason}" for reason, count in report.dropped.items()]
        raise UserError(
            f"{len(items)} of the {report.read:,} {source} can be trained on; expected at least"
            f" {least}{'; dropped: ' * bool(counts)}{', '.join(counts)}"
        )
    _write(items, output, encoder, source)
    return TokenFolder.open(output), report


def _write(items: Sequence[_Item], output: Path, encoder: _Encoder, source: str) -> None:
    """Write examples to a new folder, some of them held out for validation."""
    options, tokenizer = encoder.options, encoder.tokenizer
    held_out, _ = choose_held_out(np.ones(len(items), int), options.validation, is_one_file=False)
    templates = encoder.used_templates
    with new_folder(output) as folder:
        save_tokenizer(tokenizer.path.read_bytes(), folder)
        writer = TokenWriter(folder, tokenizer.vocab_size, options.shard_tokens)
        try:
            for item, is_validation in zip(items, held_out):
                split = "validation" if is_validation else "train"
                starts = np.cumsum([0, *(len(tokens) for tokens in item.tokens[:-1])])
                tokens, mask = np.concatenate(item.tokens), np.concatenate(item.masks)
                writer.add(split, tokens, starts, item.characters, mask)
            writer.finish(
                options.bos and tokenizer.bos_id >= 0,
                True,
                source,
                kind=items[0].kind,
                chat_template=templates.pop() if len(templates) == 1 else "",
                longest=max(sum(len(tokens) - 1 for tokens in item.tokens) for item in items),
            )
        finally:
            writer.close()


def _items(
    records: Iterable[Located], encoder: _Encoder, report: Report, display: Display | None
) -> Iterator[tuple[str, _Item]]:
    """Yield the examples that are kept, with their places; count and show the others."""
    show = display.write if display else lambda _: None
    seen: set[bytes] = set()
    for where, record in records:
        report.read += 1
        try:
            example = parse_example(record, where)
            item, cut = _item(example, encoder)
            if item.digest() in seen:
                raise Unusable("a duplicate")
        except Unusable as error:
            report.dropped[error.reason] += 1
            detail = f" ({error.detail})" if error.detail else ""
            report.first_dropped.setdefault(error.reason, where + detail)
            show(f"dropped {where}: {error}")
            continue
        seen.add(item.digest())
        report.kept += 1
        if cut:
            report.changed["examples cut from the right"] += 1
            show(f"cut {where}: {cut}")
        if isinstance(example, Dialogue) and example.was_unanswered:
            report.changed["last questions without an answer, which were left out"] += 1
            show(f"cut {where}: its last question has no answer")
        if display and report.kept <= display.count:
            show(_shown_example(where, item, encoder.tokenizer, display.is_terminal))
        yield where, item


def _item(example: RawExample, encoder: _Encoder) -> tuple[_Item, str]:
    """Return an encoded example, and what was cut off, if anything."""
    options, tokenizer = encoder.options, encoder.tokenizer
    is_pair, cut = isinstance(example, Preference), ""
    texts = [example.chosen, example.rejected] if isinstance(example, Preference) else [example]
    train_on = "answers" if is_pair else options.train_on
    encoded = [encoder.encode(each, train_on) for each in texts]
    most = options.sequence_length
    positions = sum(len(ids) - 1 for ids, _ in encoded)
    if most and positions > most:
        is_text = isinstance(example, PlainText | PlainCompletion | Instruction)
        if options.overlong != "cut" or not is_text:
            raise Unusable(f"longer than a sequence of {most}", f"{positions:,} positions")
        [(ids, weights)] = encoded
        rest = ids[most + 1 :]
        cut = f"{len(rest):,} of {len(ids):,} tokens, {shown(tokenizer.decode(rest))}"
        encoded = [Tokenized(ids[: most + 1], weights[: most + 1])]
    for _, weights in encoded:
        if not any(weights[1:]):
            raise Unusable("no token to train on")
    if is_pair and encoded[0].ids == encoded[1].ids:
        raise Unusable("equal answers")
    dtype = token_dtype(tokenizer.vocab_size)
    item = _Item(
        tokens=[np.array(ids, dtype) for ids, _ in encoded],
        masks=[np.array(weights, bool).astype(np.uint8) for _, weights in encoded],
        characters=sum(map(_characters, texts)),
        kind=PREFERENCES if is_pair else DIALOGUES,
    )
    return item, cut


def _characters(example: RawExample) -> int:
    """Return the characters of an example's texts."""
    if isinstance(example, Dialogue):
        return sum(len(message.content) for message in example.messages)
    values = dataclasses.asdict(example).values()
    return sum(len(value) for value in values if isinstance(value, str))


def _shown_example(where: str, item: _Item, tokenizer: Tokenizer, is_terminal: bool) -> str:
    """Return an example as text with its control tokens, those that are trained marked."""
    names = {token: text for text, token in tokenizer.special_ids.items()}
    start, end = (COLOUR, PLAIN) if is_terminal else MARKS
    lines = []
    for title, tokens, mask in zip(("", "rejected "), item.tokens, item.masks):
        text, decoder, was_trained = "", tokenizer.decoder(), False
        for token, is_trained in zip(tokens.tolist(), mask.tolist()):
            if is_trained != was_trained:
                text += escape_controls(decoder.flush()) + (start if is_trained else end)
            piece = decoder.push([token])
            text += names[token] if token in names else escape_controls(piece)
            was_trained = is_trained
        text += escape_controls(decoder.flush()) + end * was_trained
        trained = f"{int(mask.sum()):,} of {len(tokens):,} tokens trained"
        lines.append(f"---- {title}{where}: {trained}\n{text}")
    return "\n".join(lines)


def summary(folder: TokenFolder, report: Report) -> list[str]:
    """Return lines that describe a folder of examples, and what was left out of it."""
    lines = []
    what = "pairs" if folder.kind == PREFERENCES else "examples"
    for name, split in folder.splits.items():
        count = split.documents // (2 if folder.kind == PREFERENCES else 1)
        trained = sum(int(mask.sum()) for mask in folder.masks(name))
        fraction = f", {trained / split.tokens:.0%} of them trained" if split.tokens else ""
        lines.append(f"{name}: {count:,} {what}, {split.tokens:,} tokens{fraction}")
    needed = f"set data.sequence_length to at least {folder.longest:,}, and data.packing=documents"
    return [*report.lines(), *lines, f"to train on them, {needed}", f"written to {folder.path}"]
