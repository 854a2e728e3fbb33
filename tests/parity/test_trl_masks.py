"""Ids and labels of fine-tuning against TRL's: its own trainer, and the rule that it documents."""

import os
import random

import pytest
from test_chat_templates import PUBLISHED

from llama_jax.data.prepare.examples import ExampleOptions, prepare_examples
from llama_jax.text.chat_formats import TEMPLATES, find_template

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
FORMATS = ["chatml", "llama2", "mistral"]
WORDS = ["Hello", "there", "you?", "naïve", "日本", "🙂", "1234", "x=1;", "-", "*", "```", "\n\n"]
IGNORED = -100
GENERATION = (  # ChatML with the block by which TRL finds the answers of a dialogue
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "x"


def dialogues(count=50):
    """Return records with a prompt of one to three exchanges, and the answer to it."""
    rng = random.Random(7)
    records = []
    for _ in range(count):
        turns = 2 * rng.randint(0, 2) + 1
        roles = ("user", "assistant")
        prompt = [{"role": roles[n % 2], "content": text(rng)} for n in range(turns)]
        prompt = [{"role": "system", "content": text(rng)}] * rng.randint(0, 1) + prompt
        records.append(
            {"prompt": prompt, "completion": [{"role": "assistant", "content": text(rng)}]}
        )
    return records


def our_labels(records, tokenizer, tmp_path, **options):
    """Return (ids, labels) of each example in a folder that `prepare_examples` writes."""
    located = [(f"x:{number}", record) for number, record in enumerate(records)]
    options = ExampleOptions(validation=0, **options)
    folder, report = prepare_examples(
        located, tmp_path / "out", tokenizer, options, source="examples"
    )
    assert report.kept == len(records)
    [ids], [mask], starts = (
        folder.arrays("train"),
        folder.masks("train"),
        folder.document_starts("train"),
    )
    pairs = [
        (ids[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(starts, [*starts[1:], len(ids)])
    ]
    return [
        (ids, [token if kept else IGNORED for token, kept in zip(ids, mask)]) for ids, mask in pairs
    ]


def documented(records, tokenizer, template):
    """Return what TRL documents: the completion begins where the prompt's ids end."""
    found = []
    for record in records:
        prompt, whole = (
            tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=ask, return_dict=False
            )
            for messages, ask in (
                (record["prompt"], True),
                (record["prompt"] + record["completion"], False),
            )
        )
        assert whole[: len(prompt)] == prompt
        found.append((whole, [IGNORED] * len(prompt) + whole[len(prompt) :]))
    return found


def by_trl(records, tokenizer, tmp_path, **options):
    """Return the ids and labels of the data set that TRL's trainer makes."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        max_length=None,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **options,
    )
    tokenizer.pad_token = tokenizer.eos_token
    trainer = trl.SFTTrainer(
        model=transformers.LlamaForCausalLM(config),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(records),
    )
    rows = trainer.train_dataset
    return list(zip(rows["input_ids"], rows["labels"]))


def without_what_follows_the_end(examples, ends):
    """Return examples in which nothing after the last end token is trained, as in ours."""
    found = []
    for ids, labels in examples:
        last = max(place for place, token in enumerate(labels) if token in ends)
        found.append((ids, labels[: last + 1] + [IGNORED] * (len(ids) - last - 1)))
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reference", [documented, by_trl])
def test_ids_and_labels_of_answers_are_those_of_trl(both, tmp_path, name, reference):
    ours, theirs = both
    records = dialogues()
    if reference is by_trl:
        theirs.chat_template = PUBLISHED[name]
        expected = by_trl(records, theirs, tmp_path, completion_only_loss=True)
    else:
        expected = documented(records, theirs, PUBLISHED[name])
    found = our_labels(records, ours, tmp_path, template=TEMPLATES[name])
    assert len(found) == 50
    ends = TEMPLATES[name].stops(ours).ids
    assert found == without_what_follows_the_end(expected, ends)
    if name != "chatml":  # which writes a line end after the end token
        assert found == expected


def test_labels_of_all_answers_are_those_of_trl(both, tmp_path):
    ours, theirs = both
    records = [{"messages": each["prompt"] + each["completion"]} for each in dialogues()]
    theirs.chat_template = GENERATION
    expected = by_trl(records, theirs, tmp_path, assistant_only_loss=True)
    for template in (find_template("chatml"), find_template(GENERATION)):
        folder = tmp_path / template.name
        folder.mkdir()
        assert our_labels(records, ours, folder, template=template) == expected


def test_ids_and_labels_of_plain_completions_are_those_of_trl(both, tmp_path):
    ours, theirs = both
    rng = random.Random(3)
    records = [{"prompt": text(rng), "completion": " " + text(rng)} for _ in range(50)]
    bos = theirs("x").input_ids[0] == ours.bos_id
    expected = by_trl(records, theirs, tmp_path, completion_only_loss=True)
    assert our_labels(records, ours, tmp_path, bos=bos) == expected
