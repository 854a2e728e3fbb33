"""Tasks of lm-evaluation-harness from local files, against our own measures of the same items."""

import json

import numpy as np
import pytest

from llama_jax.data.prepare.documents import Chunk
from llama_jax.errors import UserError
from llama_jax.evaluation.multiple_choice import choice_accuracy, read_items, shipped_tasks
from llama_jax.evaluation.perplexity import text_perplexity
from llama_jax.llm import LLM
from llama_jax.text.chat import parse_messages

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402

from llama_jax.evaluation import harness  # noqa: E402

TASKS = {
    "local_choices": """
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "local_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: bits_per_byte}]
""",
    "local_answers": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 9}
metric_list: [{metric: exact_match, ignore_case: true}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the shipped items as a data set, and tasks that use it."""
    place = tmp_path_factory.mktemp("tasks")
    items = read_items(shipped_tasks()["basics"])
    rows = [
        {"prompt": item.context, "choices": item.choices, "answer": item.answer} for item in items
    ]
    (place / "items.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        files = f"dataset_kwargs: {{data_files: {{test: {place / 'items.json'}}}}}"
        head = f"task: {name}\ndataset_path: json\ntest_split: test\n{files}"
        (place / f"{name}.yaml").write_text(head + text)
    lost = (place / "local_text.yaml").read_text().replace("items.json", "lost.json")
    (place / "lost.yaml").write_text(lost.replace("task: local_text", "task: lost"))
    return place


@pytest.fixture(scope="module")
def manager(folder):
    """The index of all tasks, which takes the harness seconds to make."""
    return harness.task_manager([*TASKS, "lost"], ["basics"], str(folder))


@pytest.fixture
def evaluate(llm, manager, monkeypatch, tmp_path):
    """Run tasks of that folder and return their figures."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))

    def run(*names, llm=llm, **options):
        return harness.evaluate(llm, names, manager, harness.HarnessOptions(**options))

    return run


def request(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_choices_have_the_accuracy_that_our_own_task_has(llm, evaluate):
    found = evaluate("local_choices", batch_size=5)["local_choices"]
    own = choice_accuracy(llm, read_items(shipped_tasks()["basics"]))
    assert set(found) == set(own) - {"chance"}
    for name in found:
        assert found[name] == pytest.approx(own[name], abs=1e-6), name


def test_texts_have_the_bits_per_byte_of_our_own_measure(llm, evaluate):
    found = evaluate("local_text", limit=7)["local_text"]
    items = read_items(shipped_tasks()["basics"])[:7]
    own = text_perplexity(llm, [Chunk(item.context, True, True) for item in items])
    assert found["bits_per_byte"] == pytest.approx(own.bits_per_byte, rel=1e-5)
    assert found["items"] == len(items)


def test_long_texts_are_scored_in_windows_and_short_ones_from_their_first_token(llm, without_bos):
    long = "Tim saw 7 red boats. " * 20
    requests = [request("loglikelihood_rolling", text) for text in (long.strip(), "Anna")]
    rolled = harness.HarnessModel(llm).loglikelihood_rolling(requests)
    own = [text_perplexity(llm, [Chunk(each.args[0], True, True)]).logprob for each in requests]
    np.testing.assert_allclose(rolled, own, rtol=1e-5)
    [plain] = harness.HarnessModel(without_bos).loglikelihood_rolling(requests[1:])
    tokenizer = without_bos.tokenizer
    [score] = without_bos.score([[tokenizer.eos_id, *tokenizer.encode("Anna")]])
    assert plain == pytest.approx(score.total, rel=1e-5)


def test_there_is_one_bos_where_the_model_wants_one(llm, without_bos):
    bos = llm.tokenizer.bos_id
    seen = []

    class Seen(harness.HarnessModel):
        def _loglikelihood_tokens(self, requests, **options):
            seen.extend(known + scored for _, known, scored in requests)
            return super()._loglikelihood_tokens(requests, **options)

    pairs = [("Tim saw", " boats"), ("", "Tim saw"), ("Tim ", "saw")]
    for model in (llm, without_bos):
        Seen(model).loglikelihood([request("loglikelihood", *pair) for pair in pairs], True)
    assert [ids.count(bos) for ids in seen] == [1, 1, 1, 0, 0, 0]
    assert [ids[0] for ids in seen[:3]] == [bos] * 3


def test_a_continuation_is_greedy_if_the_model_would_write_it(llm):
    made = llm.complete("Tim saw", temperature=0, max_tokens=3)
    model = harness.HarnessModel(llm)
    known = llm.tokenizer.encode("Tim saw", bos=True)
    other = (*made.token_ids[:2], (made.token_ids[2] + 1) % llm.tokenizer.vocab_size)
    requests = [(None, known, list(made.token_ids)), (None, known, list(other))]
    greedy, changed = model._loglikelihood_tokens(requests)
    assert (greedy[1], changed[1]) == (True, False) and greedy[0] > changed[0]


def test_generation_is_greedy_and_stops_as_the_task_says(llm, evaluate):
    assert set(evaluate("local_answers", limit=3)["local_answers"]) == {
        "exact_match",
        "exact_match_stderr",
        "items",
    }
    prompts = ["Tim saw 7", "Anna", "Tim saw 7 red boats on the blue sea and Anna " * 9]
    options = [{"until": ["a", ""], "max_gen_toks": 9}, {"until": "e"}, {"max_gen_toks": 5}]
    requests = [request("generate_until", *pair) for pair in zip(prompts, options)]
    found = harness.HarnessModel(llm, batch_size=2).generate_until(requests)
    greedy = {"temperature": 0, "top_p": 1.0}
    assert found[0] == llm.complete(prompts[0], stop=["a"], max_tokens=9, **greedy).text
    assert found[1] == llm.complete(prompts[1], stop=["e"], max_tokens=256, **greedy).text
    last = llm.tokenizer.encode(prompts[2], bos=True)[-35:]
    [expected] = llm.complete([last], max_tokens=5, **greedy)
    assert found[2] == expected.text


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"temperature": 0.5, "do_sample": False}, {}),
        ({"do_sample": True, "top_k": 3}, {"temperature": 1.0, "top_k": 3}),
        ({"max_gen_toks": 7, "until": ["b", "b", ""]}, {"max_tokens": 7, "stop": ["b"]}),
    ],
)
def test_sampling_is_what_the_task_sets(options, changes):
    default = {**harness.GREEDY, "max_tokens": 256, "stop": []}
    assert harness.sampling_options(options) == default | changes


def test_chat_prompts_have_the_ids_of_the_chat_format(checkpoint, evaluate):
    llm = LLM(checkpoint, template="chatml")
    model = harness.HarnessModel(llm)
    history = [{"role": "user", "content": "Tim </s> saw"}]
    text = model.apply_chat_template(history)
    ids = llm.template.encode(parse_messages(history), llm.tokenizer)
    assert model.tok_encode(text) == ids
    assert text.endswith("<|im_start|>assistant\n")
    known, scored = model._encode_pair(text, "boats")
    assert (known, scored) == (ids, llm.tokenizer.encode("boats"))
    found = evaluate("local_choices", llm=llm, limit=2, apply_chat_template=True)
    assert found["local_choices"]["items"] == 2


def test_unknown_tasks_and_data_are_one_line(evaluate, folder):
    with pytest.raises(UserError, match=r"^task 'local_choice' is unknown; .* 'local_choices'"):
        harness.task_manager(["local_choice"], ["basics"], str(folder))
    with pytest.raises(UserError, match=r"^--include_path=nowhere is no folder"):
        harness.task_manager(["x"], [], "nowhere")
    with pytest.raises(UserError, match=r"^lost cannot be loaded: "):
        evaluate("lost")
