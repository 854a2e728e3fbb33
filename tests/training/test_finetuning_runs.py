"""Runs that start from a checkpoint: resumed to the bit, small checkpoints, the right base."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from tiny_run import fit, make_config, make_tokens, quick_runs

from llama_jax.checkpoints.load import load, load_for_inference
from llama_jax.data.datasets import open_dataset
from llama_jax.data.prepare.examples import ExampleOptions, prepare_examples
from llama_jax.data.token_folder import TokenFolder
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.convert import Conversion, Options, convert
from llama_jax.llm import LLM
from llama_jax.quantization import QuantizationConfig
from llama_jax.text.chat_formats import TEMPLATES
from llama_jax.text.tokenizer import load_tokenizer
from llama_jax.training.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Runs on one device, whose programs are compiled once for the whole file."""
    with quick_runs(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens").path


@pytest.fixture(scope="module")
def base(tokens, tmp_path_factory):
    """A model that has learned something, in float32."""
    folder = tmp_path_factory.mktemp("base") / "ckpt"
    fit(make_config(tokens, folder, model__dropout=0.0))
    return folder


def tuned(tokens, base, folder, **changes):
    """The config of a run that tunes `base`; rank 3 unless `changes` has another `lora__rank`."""
    settings = {
        "run__init_from": str(base),
        "lora__rank": 3,
        "lora__dropout": 0.1,
        "optimizer__steps": 10,
        "optimizer__warmup_steps": 0,
        "model__dropout": 0.0,
        "data__packing": "documents",
    }
    # The source of adapters has to be set before their rank.
    return make_config(tokens, folder, **settings | changes)


@pytest.fixture(scope="module")
def adapters(tokens, base, tmp_path_factory):
    """A finished run that trained adapters of `base`."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    fit(tuned(tokens, base, folder))
    return folder


def checksums(folder, step):
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["checksums"]


KINDS = {
    "lora": {},
    "all": {"lora__rank": 0, "lora__dropout": 0.0, "model__dropout": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)  # NF4 bases: `tests/faults`
def test_resumed_is_uninterrupted_to_the_bit(tokens, base, tmp_path, kind):
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    assert fit(tuned(tokens, base, straight, **KINDS[kind])) == 0
    assert fit(tuned(tokens, base, parted, **KINDS[kind])) == 0
    shutil.rmtree(parted / "10")  # back to step 5
    assert fit(tuned(tokens, base, parted, **KINDS[kind])) == 0
    assert checksums(straight, 10) == checksums(parted, 10)
    losses = [record["loss"] for record in read_metrics(straight).values() if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_checkpoint_of_adapters_is_small_and_names_its_base(base, adapters):
    meta = json.loads((adapters / "10" / "meta" / "metadata").read_text())
    assert meta["base"] == load(base).fingerprint
    names = set(meta["checksums"]["model"])
    assert "blocks.attention.wq.a" in names and "embedding" not in names
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(load(base).model))
    files = [path for path in (adapters / "10" / "model").rglob("*") if path.is_file()]
    item = sum(path.stat().st_size for path in files)
    assert item < stored


def test_a_loaded_run_is_the_base_with_its_adapters(base, adapters):
    def logits(loaded):
        return jax.jit(lambda model: model(np.arange(24).reshape(2, 12))[0])(loaded.model)

    adapted = logits(load(adapters))
    np.testing.assert_allclose(logits(load_for_inference(adapters)), adapted, atol=1e-5)
    assert np.abs(adapted - logits(load(base))).max() > 1e-2


@pytest.mark.slow
def test_adapters_are_exchanged_on_a_loaded_base(tokens, base, tmp_path):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        fit(tuned(tokens, base, folder, run__seed=seed))
    llm, texts = LLM(base), ["The red boat", "number 7 sails"]
    plain = llm.score(texts)
    for folder in (*folders, folders[0]):
        llm.use_adapter(folder)
        assert f"adapter={str(folder)!r}" in repr(llm)
        for found, expected in zip(llm.score(texts), LLM(folder).score(texts)):
            assert found.total == pytest.approx(expected.total, abs=1e-4)
        assert abs(llm.score(texts)[0].total - plain[0].total) > 1e-3
    with pytest.raises(UsageError, match="holds a model; expected the folder of a run"):
        llm.use_adapter(base)


def test_another_base_is_refused(tokens, base, adapters, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    shutil.rmtree(other / "20")  # so that it is the model of an earlier step
    with pytest.raises(UserError, match="trained for another model"):
        load(adapters, base=str(other))
    with pytest.raises(UserError, match=r"is not the model that step 10 of .* was trained on"):
        fit(tuned(tokens, other, adapters, optimizer__steps=12))


@pytest.mark.slow
def test_all_weights_too_go_on_from_the_model_they_started_from(tokens, base, tmp_path):
    folder, other = tmp_path / "sft", tmp_path / "other"
    fit(tuned(tokens, base, folder, **KINDS["all"]))
    fit(make_config(tokens, other, model__dropout=0.0, run__seed=5))
    for start in (str(other), ""):
        changes = KINDS["all"] | {"run__init_from": start, "optimizer__steps": 12}
        with pytest.raises(UserError, match=r"is not the model that step 10 of .* was trained on"):
            fit(tuned(tokens, base, folder, **changes))
    with pytest.raises(UsageError, match=r"is in run\.checkpoint_dir"):
        fit(tuned(tokens, base, base, **KINDS["all"]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model__dim": 48}, "model.dim=48 is not that of"),
        ({"model__position": "alibi"}, "model.position=alibi is not that of .*, which is rope"),
        ({"lora__targets": "wq,attn"}, "lora.targets has 'attn', which matches nothing"),
        ({"lora__targets": "output"}, "the embedding is the output matrix"),
        ({"lora__rank": 25}, "lora.rank=25 is more than the"),
        ({"lora__base": "stored-int8"}, "lora.base='stored-int8' does not fit"),
        ({"run__init_from": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_does_not_fit_the_base_is_one_line(tokens, base, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        fit(tuned(tokens, base, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


# ---- data of fine-tuning ----

ENDS = ("sails home", "sinks", "waits", "turns")


def prepared(tokens, path, records):
    """Examples as tokens of the tokenizer that the base was trained with."""
    tokenizer = load_tokenizer(tokens / "tokenizer.model")
    located = [(f"x:{number}", record) for number, record in enumerate(records)]
    options = ExampleOptions(template=TEMPLATES["llama2"], validation=0.1)
    return prepare_examples(located, path, tokenizer, options, source="boats")[0].path


@pytest.fixture(scope="module")
def pairs(tokens, tmp_path_factory):
    answers = [f"The boat number {n} {ENDS[n % 4]}." for n in range(40)]
    records = [
        {"prompt": f"Boat {n}? ", "chosen": answer, "rejected": answer.replace("boat", "goat")}
        for n, answer in enumerate(answers)
    ]
    return prepared(tokens, tmp_path_factory.mktemp("pairs") / "pairs", records)


@pytest.fixture(scope="module")
def dialogues(tokens, tmp_path_factory):
    records = [
        {"messages": [{"role": role, "content": text} for role, text in pair]}
        for pair in (
            (("user", f"Boat {n}?"), ("assistant", f"It {ENDS[n % 2]}.")) for n in range(60)
        )
    ]
    return prepared(tokens, tmp_path_factory.mktemp("dialogues") / "dialogues", records)


LONG = {"model__context_length": 128, "data__sequence_length": 96}


@pytest.mark.slow
def test_dpo_resumed_is_uninterrupted_and_prefers_the_chosen_answers(pairs, base, tmp_path):
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    changes = LONG | {"optimizer__loss": "dpo", "optimizer__learning_rate": 3e-3}
    assert fit(tuned(pairs, base, straight, **changes)) == 0
    assert fit(tuned(pairs, base, parted, **changes)) == 0
    shutil.rmtree(parted / "10")
    assert fit(tuned(pairs, base, parted, **changes)) == 0
    assert checksums(straight, 10) == checksums(parted, 10)
    records = list(read_metrics(straight).values())
    assert records[1]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[10]["margin"] > 0 and records[10]["validation_loss"] < math.log(2)


@pytest.mark.slow
def test_a_run_on_dialogues_answers_in_their_format_and_stops(dialogues, base, tmp_path, capfd):
    folder = tmp_path / "chat"
    changes = LONG | {
        "optimizer__steps": 200,
        "optimizer__learning_rate": 2e-2,
        "lora__rank": 8,
        "lora__dropout": 0.0,
        "run__eval_every": 200,
        "run__save_every": 200,
        "run__sample_tokens": 20,
        "run__sample_prompt": "Boat 8?",
    }
    assert fit(tuned(dialogues, base, folder, **changes)) == 0
    out = capfd.readouterr().out
    assert "step 0  validation loss" in out and f"--ckpt {folder} --chat" in out
    llm = LLM(folder)
    asked = [[{"role": "user", "content": f"Boat {n}?"}] for n in range(30)]
    answers = [llm.chat(messages, temperature=0, max_tokens=20) for messages in asked]
    assert sum(answer.finish_reason == "stop" for answer in answers) >= 29
    records = read_metrics(folder)
    assert records[200]["validation_loss"] < 0.7 * records[0]["validation_loss"]


def test_epochs_set_the_steps_and_are_validated(dialogues, base, tmp_path):
    changes = {"optimizer__epochs": 1.5, "run__eval_epochs": True, "run__eval_every": 100}
    assert fit(tuned(dialogues, base, tmp_path / "run", **LONG, **changes)) == 0
    records = read_metrics(tmp_path / "run")
    examples = len(open_dataset(TokenFolder.open(dialogues), "train", 96, "documents"))
    epoch = -(-examples // 8)
    assert max(records) == round(1.5 * epoch)
    validated = [step for step, record in records.items() if "validation_loss" in record]
    assert validated == [0, epoch, max(records)]


@pytest.mark.slow
def test_sources_are_validated_one_by_one(dialogues, tokens, base, tmp_path, capfd):
    sources = f"{dialogues}:0.75,{tokens}:0.25"
    assert fit(tuned(tokens, base, tmp_path / "run", **LONG, data__sources=sources)) == 0
    out = capfd.readouterr().out
    assert f"data      75.0% from {dialogues}" in out and f"data      25.0% from {tokens}" in out
    found = read_metrics(tmp_path / "run")[10]
    losses = [found[f"validation_loss/{folder}"] for folder in (dialogues, tokens)]
    assert min(losses) < found["validation_loss"] < max(losses)
    assert found[f"validation_perplexity/{tokens}"] == pytest.approx(math.exp(losses[1]))


def test_data_that_do_not_fit_the_loss_are_refused(pairs, dialogues, base, tmp_path):
    for data, loss in ((pairs, "next_token"), (dialogues, "dpo")):
        config = tuned(data, base, tmp_path / "run", **LONG, optimizer__loss=loss)
        with pytest.raises(UsageError, match=rf"optimizer.loss='{loss}' does not fit"):
            fit(config)


# ---- bases as they are stored ----


@pytest.mark.parametrize(
    ("kind", "base_kind"),
    [
        ("bfloat16", "compute"),
        pytest.param("int8", "stored-int8", marks=pytest.mark.slow),
        pytest.param("int4", "stored-int4-64", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_training_starts_from_any_checkpoint(tokens, base, tmp_path, kind, base_kind):
    """Stored in half precision or quantized; a resumed run and a loaded one have the same base."""
    is_quantized = kind.startswith("int")
    options = Options(
        dtype="" if is_quantized else kind,
        quantization=QuantizationConfig(kind, 64) if is_quantized else None,
    )
    stored, folder = tmp_path / "stored", tmp_path / "run"
    convert(Conversion(source="ckpt", input=base, target="ckpt", output=stored, options=options))
    config = tuned(tokens, stored, folder, lora__base=base_kind)
    assert fit(config) == 0
    validated = read_metrics(folder)[10]["validation_loss"]
    shutil.rmtree(folder / "10")
    assert fit(config) == 0
    assert read_metrics(folder)[10]["validation_loss"] == validated
    assert validated < read_metrics(folder)[0]["validation_loss"]
    if is_quantized:
        with pytest.raises(UsageError, match="is stored as int"):
            fit(tuned(tokens, stored, tmp_path / "all", lora__rank=0, lora__dropout=0.0))
        with pytest.raises(UsageError, match=f"expected '{base_kind}'"):
            fit(tuned(tokens, stored, tmp_path / "other"))
