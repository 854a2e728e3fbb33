"""A study from the command to its report, resumed, refused, and the laws its fairness rests on."""

import csv
import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import REPOSITORY, make_text

from llama_jax.data.loader import Batch
from llama_jax.errors import UserError
from llama_jax.model.parameters import named_leaves
from llama_jax.study.data import KEYS, is_query, retrieval_sequences
from llama_jax.study.evaluation import evaluate_text
from llama_jax.study.run import Study, check_study, run_study
from llama_jax.study.settings import DEFAULT, TEXT, VARIANTS, Trial, trial_config
from llama_jax.study.trials import LOSS, scaled_step
from llama_jax.training.objectives import next_token_metrics
from llama_jax.training.step import init_state, make_execution, train_step

TINY = dataclasses.replace(
    DEFAULT,
    vocab_size=330,
    dim=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    batch_size=4,
    steps=4,
    learning_rates=(1e-2,),
    seeds=2,
    validations=2,
    validation_batches=1,
    retrieval_steps=2,
    evaluation_tokens=512,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return str(make_text(tmp_path_factory.mktemp("corpus") / "text.txt", stories=1500))


def study_of(folder, corpus, **changes):
    study = Study(scale=TINY, corpus=corpus, folder=folder, seeds=(0, 1))
    return dataclasses.replace(study, **{"variants": ("absolute",)} | changes)


def trial(variant, rate=1e-2, seed=3):
    return Trial(TEXT, variant, rate, seed)


def rows(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
def test_a_study_resumes_and_reports(tmp_path, corpus, capsys):
    study = study_of(tmp_path / "out", corpus)
    assert run_study(dataclasses.replace(study, seeds=(0,))) == 0
    made = sorted((study.folder / "runs").glob("*/result.json"))
    assert len(made) == 2 and "2 runs, about" in capsys.readouterr().out
    made[0].unlink()  # as if the process had been killed before it was written
    times = [path.stat().st_mtime_ns for path in made[1:]]
    assert run_study(study) == 0
    assert times == [path.stat().st_mtime_ns for path in made[1:]]
    assert "to do     3 runs" in capsys.readouterr().out
    assert len(list((study.folder / "runs").glob("*/result.json"))) == 4

    steps = rows(study.folder / "steps.csv")
    assert len(steps) == 2 * TINY.steps + 2 * TINY.retrieval_steps
    assert all(float(row["perplexity"]) > 1 for row in steps)
    assert {row["seed"] for row in rows(study.folder / "epochs.csv")} == {"0", "1"}
    positions = rows(study.folder / "positions.csv")  # learned positions are read in windows only
    assert {row["reading"] for row in positions if row["multiple"] != "1"} == {"sliding"}
    text, retrieval = rows(study.folder / "results.csv")
    assert text["seeds"] == retrieval["seeds"] == "2"
    assert float(text["best_loss_mean"]) > 0 and float(text["loss_sliding_none_8x_std"]) >= 0
    assert 0 <= float(retrieval["accuracy_1x_mean"]) <= 1
    assert "| absolute |" in (study.folder / "results.md").read_text()
    for name in ("learning", "positions", "retrieval"):
        assert (study.folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variants": ("alibbi",)}, "variant 'alibbi' is unknown; did you mean 'alibi'?"),
        ({"seeds": (2,)}, "seed=2 is out of range; expected 0 to 1 at the scale 'default'"),
        ({"corpus": "shakespear"}, "'shakespear' does not exist; did you mean 'shakespeare'?"),
        ({"corpus": "nothing"}, "expected one of stories, shakespeare, tinystories, or a text"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(tmp_path, corpus, changes, message):
    study = study_of(tmp_path / "out", **{"corpus": corpus} | changes)
    with pytest.raises(UserError) as caught:
        run_study(study)
    assert message in str(caught.value) and not study.folder.exists()


def test_folders_of_something_else_are_refused(tmp_path, corpus):
    study = study_of(tmp_path, corpus)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no study \(it has 'notes.txt'\); choose another"):
        check_study(study)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(UserError, match=r"study.json is damaged"):
        check_study(study)
    with pytest.raises(UserError, match="is a file; expected a folder"):
        check_study(study_of(tmp_path / "notes.txt", corpus))


def test_folder_of_another_study_and_a_short_corpus(tmp_path):
    short = make_text(tmp_path / "short.txt", stories=60)
    study = study_of(tmp_path / "out", str(short))
    with pytest.raises(UserError, match=r"tokens for validation; expected at least 513: name"):
        run_study(study)
    other = dataclasses.replace(TINY, dim=32)
    with pytest.raises(UserError, match=r"holds another study: dim is 16 there and 32 here"):
        check_study(dataclasses.replace(study, scale=other))


def test_door_is_one_line():
    command = [sys.executable, str(REPOSITORY / "study.py"), "--variant", "nope"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith("error: variant 'nope' is unknown") and done.stderr.count("\n") == 1
    )


# ---- the laws of a fair comparison ----


@pytest.mark.slow
def test_variants_start_from_the_same_weights_in_what_they_share(tmp_path):
    found = {}
    for variant in VARIANTS:
        config = trial_config(TINY, tmp_path, trial(variant), 4)
        for name, leaf in named_leaves(init_state(config).trainable).items():
            found.setdefault(name, []).append(np.asarray(leaf))
    own = {name for name, leaves in found.items() if len(leaves) == 1}
    assert own == {"position_embedding", "blocks.attention.slopes"}
    for leaves in found.values():
        assert all(np.array_equal(leaf, leaves[0]) for leaf in leaves)


@pytest.mark.slow
def test_one_program_serves_all_learning_rates(tmp_path):
    base, other = (trial_config(TINY, tmp_path, trial("alibi", rate), 4) for rate in (1e-2, 3e-2))
    tokens_BT = np.random.default_rng(0).integers(0, 330, (4, 65))
    weights_BT = np.ones((4, 64), np.float32)
    batch = Batch(inputs_BT=tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:], weights_BT=weights_BT)
    execution = make_execution(base)
    scaled = jax.jit(lambda s, b: scaled_step(s, b, jnp.float32(3), base, execution))
    plain = jax.jit(lambda s, b: train_step(s, b, other, execution, LOSS))
    ours = theirs = init_state(other)
    for _ in range(3):
        (ours, metrics), (theirs, expected) = scaled(ours, batch), plain(theirs, batch)
    np.testing.assert_allclose(metrics.learning_rate, expected.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    start, pairs = init_state(other).trainable, jax.tree.leaves
    for before, one, two in zip(pairs(start), pairs(ours.trainable), pairs(theirs.trainable)):
        moved = np.abs(np.asarray(two - before)).max()
        assert np.abs(np.asarray(one - two)).max() <= 1e-3 * moved + 1e-7


def test_training_accuracy_is_what_validation_measures(tmp_path):
    config = trial_config(TINY, tmp_path, trial("rope"), 4)
    random, model = np.random.default_rng(0), init_state(config).trainable
    tokens_BT = random.integers(0, 330, (4, 65))
    inputs_BT, weights_BT = tokens_BT[:, :-1], random.random((4, 64), np.float32)
    logits_BTV, _ = model(inputs_BT)
    targets_BT = np.where(random.random((4, 64)) < 0.5, logits_BTV.argmax(-1), tokens_BT[:, 1:])
    batch = Batch(inputs_BT=inputs_BT, targets_BT=targets_BT, weights_BT=weights_BT)
    how = {"config": config, "execution": make_execution(config)}
    _, sums = LOSS(model, None, batch, **how, dropout_key=None)
    expected = next_token_metrics(model, None, batch, **how)
    assert expected["accuracy"] > 0.3 * expected["weights"]
    np.testing.assert_allclose(sums["train_accuracy"], expected["accuracy"], rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], expected["loss"], rtol=1e-5)


def test_answers_of_retrieval_are_values_of_the_first_half():
    random = np.random.default_rng(0)
    tokens_RT = retrieval_sequences(5, 200, 64, 330, random)
    assert (tokens_RT.min(), tokens_RT.max() < 330) >= (170, True)
    rows_A, places_A = np.nonzero(is_query(tokens_RT, 330))
    assert len(places_A) == 5 * KEYS and places_A.min() == 200 - 2 * KEYS
    values_A = tokens_RT[rows_A, places_A + 1]
    assert all(np.sum(tokens_RT[row, :32] == value) == 1 for row, value in zip(rows_A, values_A))
    keys_A = tokens_RT[rows_A, places_A] - (330 - 16 - KEYS)
    assert np.array_equal(keys_A, (values_A - 170) // 8)


@pytest.mark.slow
def test_sliding_windows_are_what_a_model_does_within_its_length(tmp_path):
    """A model whose learned slopes confine it to its neighbours reads both ways alike."""
    config = trial_config(TINY, tmp_path, trial("relative"), 4)
    model = init_state(config).trainable
    model.blocks.attention.slopes.set_value(jnp.full((1, 2), 64.0 * 50))
    tokens = np.random.default_rng(0).integers(0, 330, 520).astype(np.uint16)
    data = type("Data", (), {"arrays": lambda self, split: (tokens,)})()
    records = evaluate_text(model, "relative", data, TINY)
    losses = {(r["multiple"], r["reading"], r["position"]): r["loss"] for r in records}
    assert len(losses) == 2 + 2 * (4 + 8 + 16)
    for (multiple, reading, position), loss in losses.items():
        if reading == "sliding":
            np.testing.assert_allclose(loss, losses[multiple, "full", position], atol=1e-5)
    mean = np.mean([losses[1, "full", position] for position in (0, 32)])
    for multiple in (2, 4, 8):
        found = [losses[multiple, "full", 32 * i] for i in range(2 * multiple)]
        np.testing.assert_allclose(np.mean(found), mean, atol=2e-2)
