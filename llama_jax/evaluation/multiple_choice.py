"""Multiple-choice tasks in local files: the choice that a model finds most likely is its answer.

A file has an object a line (.jsonl) or a list of them (.json), one of

    {"question": "What is frozen water called?", "choices": ["Steam", "Ice"], "answer": 1}
    {"context": "Ice is made of frozen", "choices": ["water", "sand"], "answer": 0}

A question is put into the words of `QUESTION`; a context is continued as it is. A choice follows
after a space.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.prepare.documents import ReadOptions, ReadProgress, read_objects
from llama_jax.distributed.mesh import on_mesh
from llama_jax.errors import UserError, shown
from llama_jax.inference.scoring import MAX_BATCH, Window, score_windows
from llama_jax.llm import LLM

SHIPPED = Path(__file__).parent / "tasks"
QUESTION = "Question: {}\nAnswer:"
KINDS = ("question", "context")
FORM = '{"question": "…", "choices": ["…", "…"], "answer": 0}'


def shipped_tasks() -> dict[str, Path]:
    """Return the files of the tasks that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.jsonl"))}


@dataclasses.dataclass(frozen=True)
class Item:
    """A question with its choices."""

    context: str
    choices: tuple[str, ...]
    answer: int  # index of the right choice


def read_items(path: Path) -> list[Item]:
    """Return the items of a file.

    Raises:
      UserError: naming the item and what is wrong with it, or for a file without items.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; expected a task file, one {FORM} a line")
    objects = read_objects(path, ReadOptions(), ReadProgress())
    items = [_parse_item(where, value) for where, value in objects]
    if not items:
        raise UserError(f"{path} has no items; expected one {FORM} a line")
    return items


def _parse_item(where: str, value: Any) -> Item:
    kinds = [kind for kind in KINDS if kind in value] if isinstance(value, dict) else []
    if len(kinds) != 1:
        found = " and ".join(kinds) or "neither question nor context"
        raise UserError(f"{where} has {found}; expected one of them, as in {FORM}")
    [kind] = kinds
    text, choices, answer = value[kind], value.get("choices"), value.get("answer")
    if not (isinstance(text, str) and text.strip()):
        raise UserError(f"{where}: {kind}={shown(text)} is not text; expected words")
    listed = choices if isinstance(choices, list) else []
    if len(listed) < 2 or not all(isinstance(each, str) and each.strip() for each in listed):
        raise UserError(f"{where}: choices={shown(choices)} is wrong; expected two or more texts")
    if "answer" not in value:
        raise UserError(f"{where} has no answer; expected the index of the right choice, from 0")
    if isinstance(answer, float) and answer.is_integer():  # as the reader returns integers
        answer = int(answer)
    if type(answer) is not int or not 0 <= answer < len(listed):
        expected = f"0 to {len(listed) - 1}, the index of the right choice"
        raise UserError(f"{where}: answer={shown(answer)} is out of range; expected {expected}")
    text = QUESTION.format(text.strip()) if kind == "question" else text.rstrip()
    return Item(text, tuple(choice.strip() for choice in listed), answer)


def choice_accuracy(
    llm: LLM, items: Sequence[Item], batch_size: int = MAX_BATCH
) -> dict[str, float]:
    """Return how often a model finds the right choice the most likely one.

    Names and values are those of lm-evaluation-harness.

    Returns:
      `items`: their number.
      `acc`, `acc_stderr`: the accuracy by the choices' summed log-probabilities, and its standard
        error as the mean of a sample of questions.
      `acc_norm`, `acc_norm_stderr`: by log-probabilities divided by the number of characters, since
        longer choices are less likely.
      `chance`: the accuracy of a random choice.

    Raises:
      UserError: for a choice that is not shorter than the context.
    """
    windows = [
        choice_window(llm, item.context, f" {choice}") for item in items for choice in item.choices
    ]
    with on_mesh(llm.engine.mesh):
        scores = iter(score_windows(llm.engine.model, windows, batch_size))
    right, right_normalized = [], []
    for item in items:
        total_N = np.array([next(scores).logprobs.sum() for _ in item.choices])
        length_N = np.array([len(choice) for choice in item.choices])
        right.append(np.argmax(total_N) == item.answer)
        right_normalized.append(np.argmax(total_N / length_N) == item.answer)
    return {
        "items": len(items),
        **_mean("acc", right),
        **_mean("acc_norm", right_normalized),
        "chance": float(np.mean([1 / len(item.choices) for item in items])),
    }


def choice_window(llm: LLM, context: str, choice: str) -> Window:
    """Return the window in which a choice is scored, given a context that it continues."""
    known = len(llm.tokenizer.encode(context, bos=llm.bos))
    ids = llm.tokenizer.encode(context + choice, bos=llm.bos)
    return fit_window(ids, known, llm.context_length)


def fit_window(ids: Sequence[int], known: int, context: int) -> Window:
    """Return a window of the last tokens that fit the context, of which `known` are only read.

    Raises:
      UserError: when nothing is left to read before the scored tokens.
    """
    left_out = max(len(ids) - context, 0)
    if known - left_out < 1:
        raise UserError(
            f"a choice has {len(ids) - known} tokens; expected fewer than {context}, the model's"
            " context"
        )
    return Window(ids[left_out:], known - left_out)


def _mean(name: str, values: Sequence[bool]) -> dict[str, float]:
    mean = float(np.mean(values))
    stderr = math.sqrt(mean * (1 - mean) / max(len(values) - 1, 1))
    return {name: mean, f"{name}_stderr": stderr}
