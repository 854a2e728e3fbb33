"""Examples to fine-tune on, recognised by the keys of their records.

Records are objects of JSON and JSON Lines files, rows of Parquet files, or what a Python function
of the user yields.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_jax.data.prepare.documents import (
    ReadOptions,
    ReadProgress,
    find_text_files,
    read_objects,
)
from llama_jax.errors import UserError, first_line, shown
from llama_jax.text.chat import Message, split_dialogue

PARQUET = ".parquet"
RECORD_SUFFIXES = (".json", ".jsonl", PARQUET)
DEFAULT_FUNCTION = "examples"
MOST_KEYS_SHOWN = 8
KNOWN_KEYS = (
    "`messages`, `conversations`, `prompt` and `completion`, `instruction` and `output`, `text`, or"
    " `chosen` and `rejected`"
)
ROLES = {"human": "user", "gpt": "assistant"}  # of ShareGPT, besides the usual ones
Located = tuple[str, object]  # where a record stands, and the record


@dataclasses.dataclass(frozen=True)
class PlainText:
    """A text to train on as in pretraining."""

    text: str


@dataclasses.dataclass(frozen=True)
class PlainCompletion:
    """A text that follows another, without a chat format."""

    prompt: str
    completion: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction as in Alpaca's data, with its output."""

    instruction: str
    input: str
    output: str


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A dialogue that ends with an answer."""

    messages: tuple[Message, ...]
    is_prompted: bool = False  # all but the last message are a prompt, not trained on
    was_unanswered: bool = False  # a last question without an answer was left out


@dataclasses.dataclass(frozen=True)
class Preference:
    """Two answers to one prompt."""

    chosen: Dialogue | PlainCompletion
    rejected: Dialogue | PlainCompletion


RawExample = PlainText | PlainCompletion | Instruction | Dialogue | Preference


class Unusable(Exception):
    """An example that is dropped and counted.

    `reason` follows "dropped 3 with"; `detail` says more of this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


# ---- records of files and functions ----


def find_records(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return the files with records among some paths; errors as for `find_text_files`."""
    return find_text_files(paths, RECORD_SUFFIXES)[0]


def read_records(files: Sequence[Path], state: ReadProgress) -> Iterator[Located]:
    """Yield the records of files, in order.

    Raises:
      UserError: with the position of a record that is damaged, or for Parquet without pyarrow.
    """
    for file in files:
        if file.suffix.lower() == PARQUET:
            yield from _parquet_rows(file, state)
        else:
            yield from read_objects(file, ReadOptions(), state)


def _parquet_rows(file: Path, state: ReadProgress) -> Iterator[Located]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{file} needs pyarrow; pip install pyarrow, or convert to JSON") from error
    count = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    count += 1
                    yield f"{file}: row {count}", row
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's are kinds of these
        raise UserError(f"{file} is not a Parquet file: {first_line(error)}; copy it") from error
    state.done += file.stat().st_size


def function_records(place: str) -> Iterator[Located]:
    """Yield what a function in a Python file yields; `place` is "file.py:function".

    Raises:
      UserError: if there is no such function, or it fails.
    """
    function, name = _load_function(place)
    count = 0
    try:
        for record in function():
            count += 1
            yield f"{name}, example {count}", record
    except UserError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{name} failed after {count} examples: {failure}; fix it") from error


def _load_function(place: str) -> tuple[Callable[[], Any], str]:
    file, _, name = place.partition(":")
    name = name or DEFAULT_FUNCTION
    path = Path(file).expanduser()
    if path.suffix != ".py" or not path.is_file():
        raise UserError(f"--dataset {shown(place)} is no Python file; expected file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--dataset {path} cannot be imported; expected a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        failure = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--dataset {path} cannot be imported: {failure}; fix it") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"--dataset {path} has no function {name!r}; define it, or name another")
    return function, f"{path}:{name}"


# ---- what a record is an example of ----


def is_example(record: object) -> bool:
    """Return whether a record is recognised as an example that is more than a text."""
    keys = set(record) if isinstance(record, Mapping) else set()
    pairs = ({"prompt", "completion"}, {"instruction", "output"}, {"chosen", "rejected"})
    return bool(keys & {"messages", "conversations"}) or any(pair <= keys for pair in pairs)


def parse_example(record: object, where: str) -> RawExample:
    """Return the example that a record holds.

    Raises:
      UserError: if its keys are of no known kind, or a value has another type than expected.
      Unusable: if there is nothing to train on, or its roles are out of order.
    """
    if not isinstance(record, Mapping):
        raise UserError(
            f"{where} is {shown(record)}; expected an object with the keys {KNOWN_KEYS}"
        )
    if {"chosen", "rejected"} <= set(record):
        return _preference(record, where)
    if "messages" in record:
        return _dialogue(_messages(record, "messages", where))
    if "conversations" in record:
        return _dialogue(_messages(record, "conversations", where))
    if {"prompt", "completion"} <= set(record):
        return _completion(record, "completion", where)
    if {"instruction", "output"} <= set(record):
        texts = [_text(record, key, where) for key in ("instruction", "input", "output")]
        _require_answer(texts[-1])
        return Instruction(*texts)
    if "text" in record:
        text = _text(record, "text", where)
        if not text.strip():
            raise Unusable("an empty text")
        return PlainText(text)
    keys = ", ".join(repr(str(key)) for key in list(record)[:MOST_KEYS_SHOWN])
    found = f"the keys {keys}" if keys else "no keys"
    raise UserError(f"{where} has {found}; expected {KNOWN_KEYS}")


def _text(record: Mapping[Any, Any], key: str, where: str) -> str:
    text = record.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UserError(f"{where}: {key}={shown(text)} is not text; expected a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable(
            "a text that has a lone surrogate", f"{key}, character {error.start}"
        ) from None
    return text


def _require_answer(text: str) -> None:
    if not text.strip():
        raise Unusable("an empty answer")


def _messages(record: Mapping[Any, Any], key: str, where: str) -> list[Message]:
    """Return the messages in a list of role and content, or of ShareGPT's from and value."""
    items = record[key]
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise UserError(f"{where}: {key}={shown(items)} is no list; expected a list of messages")
    messages = []
    for index, item in enumerate(items):
        place = f"{where}: {key}[{index}]"
        if not isinstance(item, Mapping):
            raise UserError(f"{place}={shown(item)} is no message; expected role and content")
        role = item.get("role", item.get("from", ""))
        content: Any = item.get("content", item.get("value"))
        try:
            messages.append(
                Message(ROLES.get(role, role) if isinstance(role, str) else role, content)
            )
        except UserError as error:
            raise Unusable("a message that is not understood", f"{key}[{index}].{error}") from error
    system = _text(record, "system", where)
    if system and not (messages and messages[0].role == "system"):
        messages.insert(0, Message("system", system))
    return messages


def _dialogue(messages: list[Message], is_prompted: bool = False) -> Dialogue:
    """Return a dialogue without a last question that has no answer."""
    answered = messages
    while answered and answered[-1].role != "assistant":
        answered = answered[:-1]
    if not answered:
        raise Unusable("no answer")
    try:
        _, _, answers = split_dialogue(answered, is_answered=True)
    except UserError as error:
        raise Unusable("roles out of order", str(error)) from error
    for answer in answers:
        _require_answer(answer)
    return Dialogue(tuple(answered), is_prompted, was_unanswered=answered != messages)


def _completion(record: Mapping[Any, Any], key: str, where: str) -> Dialogue | PlainCompletion:
    """Return what follows `prompt`, both of them texts or lists of messages."""
    if isinstance(record.get("prompt"), str) and isinstance(record[key], str | None):
        completion = _text(record, key, where)
        _require_answer(completion)
        return PlainCompletion(_text(record, "prompt", where), completion)
    prompt = record.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    answer = record[key]
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    before = _messages({**record, "prompt": prompt}, "prompt", where)
    after = _messages({key: answer}, key, where)
    if len(after) != 1:
        raise Unusable(f"a {key} of several messages", f"{len(after)} messages; expected one")
    return _dialogue([*before, *after], is_prompted=True)


def _common_words(first: str, second: str) -> int:
    """Return the position before the last word that two texts have in common at their start."""
    same = next((n for n, (a, b) in enumerate(zip(first, second)) if a != b), None)
    common = first[: min(len(first), len(second)) if same is None else same]
    return len(common.rstrip()) if common[-1:].isspace() else max(0, common.rfind(" "))


def _preference(record: Mapping[Any, Any], where: str) -> Preference:
    """Return a chosen and a rejected answer; the prompt may also be the start of both."""
    values = [record["chosen"], record["rejected"]]
    if all(isinstance(value, str) for value in values):
        texts = [_text(record, key, where) for key in ("chosen", "rejected")]
        if "prompt" not in record:
            end = _common_words(*texts)
            record = {"prompt": texts[0][:end]}
            record |= {"chosen": texts[0][end:], "rejected": texts[1][end:]}
        if texts[0] == texts[1]:
            raise Unusable("equal answers")
        pair = [_completion(record, key, where) for key in ("chosen", "rejected")]
        return Preference(*pair)
    lists = [_messages(record, key, where) for key in ("chosen", "rejected")]
    if "prompt" in record and all(len(messages) == 1 for messages in lists):
        dialogues = [_completion(record, key, where) for key in ("chosen", "rejected")]
    else:  # the prompt is inside
        dialogues = [_dialogue(messages, is_prompted=True) for messages in lists]
    chosen, rejected = dialogues
    assert isinstance(chosen, Dialogue) and isinstance(rejected, Dialogue)
    if chosen.messages[:-1] != rejected.messages[:-1]:
        raise Unusable("answers to different prompts")
    if chosen.messages == rejected.messages:
        raise Unusable("equal answers")
    return Preference(chosen, rejected)
