"""Multiple-choice tasks: accuracy against scores of the library, task files, and their mistakes."""

import collections
import json

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.evaluation.multiple_choice import (
    Item,
    choice_accuracy,
    read_items,
    shipped_tasks,
)

ITEMS = [
    Item("Tim saw 7 red", ("boats on the blue sea and Anna was glad", "boats", "sea"), n % 3)
    for n in range(5)
]
ITEMS += [Item("Question: Who was glad?\nAnswer:", ("Anna", "Tim and the sea"), n) for n in (0, 1)]
GOOD = {"question": "Who?", "choices": ["Tim", "Anna"], "answer": 1}


def write(path, *items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_accuracy_is_that_of_the_most_likely_choices(llm):
    right, right_normalized = [], []
    for item in ITEMS:
        known = len(llm.tokenizer.encode(item.context, bos=True))
        whole = [f"{item.context} {choice}" for choice in item.choices]
        totals = [sum(score.logprobs[known - 1 :]) for score in llm.score(whole)]
        right.append(np.argmax(totals) == item.answer)
        means = [total / len(choice) for total, choice in zip(totals, item.choices)]
        right_normalized.append(np.argmax(means) == item.answer)
    found = choice_accuracy(llm, ITEMS, batch_size=4)
    assert 0 < np.mean(right) < 1 and right != right_normalized
    expected = {"acc": right, "acc_norm": right_normalized}
    for name, values in expected.items():
        stderr = np.std(values, ddof=1) / np.sqrt(len(values))
        assert (found[name], found[f"{name}_stderr"]) == pytest.approx((np.mean(values), stderr))
    assert (found["items"], found["chance"]) == (7, pytest.approx((5 / 3 + 2 / 2) / 7))


def test_a_context_that_is_too_long_loses_its_start(llm):
    long = Item("Anna was glad of the sea. " * 9 + "Tim", ("saw", "red"), 0)
    assert choice_accuracy(llm, [long])["items"] == 1
    with pytest.raises(UserError, match=r"^a choice has \d+ tokens; expected fewer than 40, the"):
        choice_accuracy(llm, [Item("Tim", ("boats", "sea and " * 40), 0)])


def test_questions_and_contexts_become_prompts(tmp_path):
    context = {"context": "It is ", "choices": [" a ", "b", "c"], "answer": 2, "source": "us"}
    listed = tmp_path / "a.json"
    listed.write_text(json.dumps([GOOD, context]))
    items = read_items(listed)
    assert items == read_items(write(tmp_path / "a.jsonl", GOOD, context))
    assert items[0] == Item("Question: Who?\nAnswer:", ("Tim", "Anna"), 1)
    assert items[1] == Item("It is", ("a", "b", "c"), 2)


def test_the_shipped_task_is_balanced_and_has_no_item_twice():
    assert list(shipped_tasks()) == ["basics"]
    items = read_items(shipped_tasks()["basics"])
    assert len(items) == len({item.context for item in items}) == 48
    assert {len(set(item.choices)) for item in items} == {4}
    assert set(collections.Counter(item.answer for item in items).values()) == {12}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": None}, "neither question nor context; expected one of them, as in {"),
        ({"context": "It is"}, "question and context; expected one of them, as in {"),
        ({"question": " "}, "question=' ' is not text; expected words"),
        ({"choices": None}, "choices=None is wrong; expected two or more texts"),
        ({"choices": ["a"]}, r"choices=\['a'\] is wrong; expected two or more texts"),
        ({"choices": ["a", ""]}, r"choices=\['a', ''\] is wrong; expected two or more texts"),
        ({"answer": None}, "has no answer; expected the index of the right choice, from 0"),
        ({"answer": 2}, "answer=2 is out of range; expected 0 to 1, the index of the right"),
        ({"answer": "1"}, "answer='1' is out of range; expected 0 to 1, the index of the right"),
    ],
)
def test_items_that_are_wrong_are_named(changes, message, tmp_path):
    item = {key: value for key, value in (GOOD | changes).items() if value is not None}
    with pytest.raises(UserError, match=rf"a\.jsonl:2.*{message}"):
        read_items(write(tmp_path / "a.jsonl", GOOD, item))


def test_files_without_items_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl has no items; expected one {.*} a line$"):
        read_items(write(tmp_path / "a.jsonl"))
    with pytest.raises(UserError, match=r"b\.jsonl does not exist; expected a task file"):
        read_items(tmp_path / "b.jsonl")
