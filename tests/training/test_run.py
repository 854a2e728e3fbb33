"""The loop of a run: it learns, resumes bit by bit, and stops before a step that is not finite."""

import dataclasses
import gzip
import json
import math
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from tiny_run import fit, make_config, make_tokens, quick_runs

from llama_jax.checkpoints import restore as reader
from llama_jax.checkpoints.restore import finished_steps
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.data.token_folder import TokenFolder
from llama_jax.errors import NonFiniteLossError, OutOfMemoryError, UsageError, UserError
from llama_jax.training import run
from llama_jax.training.metrics import read_metrics
from llama_jax.training.profiling import Window
from llama_jax.training.session import open_session


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Runs on one device, whose programs are compiled once for the whole file."""
    with quick_runs(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens").path


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    """Work in a temporary folder, so that configs are equal and share their programs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(tokens):
    return make_config(tokens, "ckpt")


def checksums(folder, step):
    """What a checkpoint's meta says of every array: equal for equal bits."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["checksums"]


def losses(folder):
    return {step: record["loss"] for step, record in read_metrics(folder).items()}


def train(config, on_batch=None, **changes):
    """Train a session with some of its parts replaced.

    Args:
      changes: parts of the session, `evaluate`, or `run`: settings of that section of the config.
      on_batch: called with the number of each step and its batch, on the host, before the step.
    """
    with open_session(config, devices=jax.devices()[:1]) as session:
        if on_batch is not None:
            changes["batches"] = lambda step: observed(session.batches(step), step, on_batch)
        if "run" in changes:
            settings = dataclasses.replace(config.run, **changes.pop("run"))
            changes["config"] = dataclasses.replace(config, run=settings)
        if "evaluate" in changes:
            evaluate = changes.pop("evaluate")
            changes["programs"] = dataclasses.replace(session.programs, evaluate=evaluate)
        return run.train(dataclasses.replace(session, **changes))


def observed(batches, start, on_batch):
    for step, batch in enumerate(batches, start + 1):
        batch = jax.tree.map(lambda array: jax.device_get(array).copy(), batch)
        on_batch(step, batch)
        yield batch


def stop_at(last):
    """Return an `on_batch` that sends SIGTERM during step `last`."""

    def on_batch(step, _):
        if step == last:
            signal.raise_signal(signal.SIGTERM)

    return on_batch


def validation_losses(values):
    """Return an `evaluate` program that gives these mean losses of validations of two batches."""
    values = iter([value for value in values for _ in range(2)])
    return lambda *_: {"loss": jnp.float32(next(values)), "weights": jnp.float32(1.0)}


@pytest.mark.slow
def test_tiny_model_learns(tokens, tmp_path, capfd):
    config = make_config(
        tokens, "ckpt", optimizer__steps=120, model__dropout=0.0, run__eval_every=40
    )
    assert fit(config) == 0
    records = read_metrics(tmp_path / "ckpt")
    assert records[1]["loss"] == pytest.approx(math.log(320), rel=0.03)
    assert records[120]["validation_loss"] < 1.9
    assert records[120]["perplexity"] == pytest.approx(math.exp(records[120]["validation_loss"]))
    assert capfd.readouterr().err == ""


@pytest.mark.as_used
def test_resumed_run_equals_uninterrupted_run_bit_by_bit(config, tmp_path):
    assert config.model.dropout > 0
    assert fit(config) == 0
    Path("ckpt").rename("straight")
    assert train(config, stop_at(13)) == 143
    assert finished_steps(tmp_path / "ckpt")[-1] == 13
    assert fit(config) == 0
    assert checksums(tmp_path / "ckpt", 20) == checksums(tmp_path / "straight", 20)
    found = losses(tmp_path / "ckpt")
    assert found == losses(tmp_path / "straight")
    assert len(found) == 20
    assert found[1] == pytest.approx(math.log(320), rel=0.03) and found[20] < 0.8 * found[1]
    reports = [record for record in read_metrics(tmp_path / "ckpt").values() if "session" in record]
    assert [(record["step"], record["session"]) for record in reports] == [
        *((step, 1) for step in (5, 10, 13)),
        *((step, 2) for step in (15, 20)),
    ]
    assert all(0 < record["goodput"] < 1 and 0 < record["run_goodput"] < 1 for record in reports)
    assert reports[3]["run_goodput"] != pytest.approx(reports[3]["goodput"], rel=0.01)
    assert reports[3]["wall_seconds"] < reports[4]["wall_seconds"]


@pytest.mark.slow
def test_profile_has_exactly_its_steps(config, tmp_path, capfd):
    assert fit(config, Window(2, 4)) == 0
    line = "profile   steps 3 to 4 in "
    assert line + "ckpt/profile" in capfd.readouterr().out
    (trace,) = (tmp_path / "ckpt" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "step"} == {
        "3",
        "4",
    }
    assert list(trace.parent.glob("*.xplane.pb"))


def test_running_out_of_memory_is_one_line_with_advice(config):
    def allocate_too_much(*_):
        jnp.zeros(1 << 50, jnp.uint8).block_until_ready()

    line = (
        r"needed, beyond the limit of [\d.]+ GiB; try --config\.\S+, --config\.\S+ or \S+; python"
    )
    with pytest.raises(OutOfMemoryError, match=line):
        train(config, evaluate=allocate_too_much)


def test_out_of_memory_while_restoring_is_not_called_damage(config, monkeypatch):
    def read_too_much(*_):
        return jnp.zeros(1 << 50, jnp.uint8).block_until_ready()

    assert fit(config) == 0
    saved = finished_steps(Path(config.run.checkpoint_dir))
    monkeypatch.setattr(reader, "_read_with_orbax", read_too_much)
    with pytest.raises(OutOfMemoryError):
        fit(config)
    assert finished_steps(Path(config.run.checkpoint_dir)) == saved


def test_non_finite_loss_stops_the_run_before_its_update(config, tmp_path):
    def nan_at_8(step, batch):
        if step == 8:
            batch.weights_BT[0, 0] = math.nan

    for _ in range(2):  # the same command again reports the same again
        with pytest.raises(
            NonFiniteLossError, match=r"step 8 has loss nan .*, with step 7 saved in"
        ):
            train(config, nan_at_8)
        assert finished_steps(tmp_path / "ckpt")[-1] == 7
        assert list(losses(tmp_path / "ckpt")) == [1, 2, 3, 4, 5, 6, 7]
    assert fit(config) == 0
    assert losses(tmp_path / "ckpt")[20] < losses(tmp_path / "ckpt")[1]


def test_non_finite_first_step_saves_the_initial_state(config, tmp_path):
    def infinite(_, batch):
        batch.weights_BT[0, 0] = math.inf

    with pytest.raises(NonFiniteLossError, match="with step 0 saved in"):
        train(config, infinite)
    assert finished_steps(tmp_path / "ckpt") == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run__attention": "cudnn", "model__dropout": 0.0}, "run.attention='cudnn' needs an NVI"),
        ({"run__attention": "splash", "model__dropout": 0.0}, "'splash' needs a TPU and this run"),
        ({"run__attention": "blockwise"}, "run.attention='blockwise' cannot drop attention"),
        ({"run__remat": "offload"}, "run.remat='offload' needs memory of kind moon and cpu has"),
        ({"optimizer__accumulation_steps": 3}, "data.batch_size=8 does not divide"),
    ],
)
def test_unsupported_settings_are_refused_before_anything_is_written(
    tokens, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr("llama_jax.training.step.HOST_MEMORY", "moon")
    with pytest.raises(UsageError, match=message):
        fit(make_config(tokens, "ckpt", **changes))
    assert not list(tmp_path.iterdir())


OFTEN_VALIDATED = {"eval_every": 5, "keep_last": 1}


def test_validation_loss_of_nan_is_never_the_best(config, tmp_path):
    evaluate = validation_losses([3.0, math.nan, 2.0, 2.5])
    assert train(config, evaluate=evaluate, run=OFTEN_VALIDATED) == 0
    assert finished_steps(tmp_path / "ckpt") == [15, 20]
    meta = json.loads((tmp_path / "ckpt" / "20" / "meta" / "metadata").read_text())
    assert meta["best_validation_loss"] == 2.0


@pytest.mark.slow
def test_best_checkpoint_of_an_earlier_session_is_kept(config, tmp_path):
    for losses, on_batch, code in (([1.0], stop_at(7), 143), ([3.0, 2.0, 2.5], None, 0)):
        evaluate = validation_losses(losses)
        assert train(config, on_batch, evaluate=evaluate, run=OFTEN_VALIDATED) == code
    assert finished_steps(tmp_path / "ckpt") == [5, 20]


def test_stop_signal_ends_a_validation(config, tmp_path):
    calls = []

    def evaluate(*_):
        calls.append(1)
        signal.raise_signal(signal.SIGTERM)
        return {"loss": jnp.float32(1.0), "weights": jnp.float32(1.0)}

    assert train(config, evaluate=evaluate) == 143
    assert len(calls) == 1  # one batch of the two
    assert finished_steps(tmp_path / "ckpt")[-1] == 10
    assert "validation_loss" not in read_metrics(tmp_path / "ckpt")[10]


def test_first_error_is_reported_when_closing_fails_too(config, monkeypatch):
    def full(self, *_):
        raise UserError("the disk is full")

    monkeypatch.setattr(CheckpointWriter, "save", full)
    close = CheckpointWriter.close

    def close_badly(self):
        close(self)
        raise UserError("could not close")

    monkeypatch.setattr(CheckpointWriter, "close", close_badly)
    with pytest.raises(UserError, match="the disk is full"):
        fit(config)


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_failed_background_save_stops_the_run(config, tmp_path, capfd):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit_files(step, _):  # files of more than 10 kB fail, as on a full disk
        if step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        time.sleep(0.05)  # a step of a real run takes longer than it takes a save to fail

    try:
        with pytest.raises(UserError, match="checkpoint of step 5 could not be saved") as error:
            train(config, limit_files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert finished_steps(tmp_path / "ckpt") == []
    assert "step 15" not in capfd.readouterr().out


def test_learning_rate_may_change_on_resume_and_the_change_is_recorded(config, tmp_path, capfd):
    assert train(config, stop_at(7)) == 143
    slower = make_config(
        config.data.path, "ckpt", optimizer__learning_rate=1e-3, optimizer__clip_norm=0.5
    )
    assert fit(slower) == 0
    line = "changed   optimizer.learning_rate from 0.01 to 0.001 after step 7"
    assert line in capfd.readouterr().out
    records = read_metrics(tmp_path / "ckpt")
    changed = {"optimizer.learning_rate": [0.01, 0.001], "optimizer.clip_norm": [1.0, 0.5]}
    assert records[7]["changed"] == changed
    assert records[8]["learning_rate"] < 1.1e-3


# What only informs never costs training.


def failing_tokenizer(error):
    def decoder(*_, **__):
        raise error

    return SimpleNamespace(decoder=decoder)


def test_failing_sample_and_plot_are_warnings(config, tmp_path, capfd):
    folder = tmp_path / "ckpt"

    def block_plot(*_):
        (folder / "loss.png").mkdir(exist_ok=True)

    tokenizer = failing_tokenizer(RuntimeError("no such piece"))
    long_ago = time.perf_counter() - 60
    settings = {"sample_tokens": 4}
    assert train(config, block_plot, tokenizer=tokenizer, run=settings, opened=long_ago) == 0
    assert finished_steps(folder)[-1] == 20
    warnings = capfd.readouterr().err
    assert "warning: no sample at step 10: RuntimeError('no such piece')" in warnings
    assert warnings.count("warning: the loss plot could not be drawn: IsADirectoryError") == 1


def test_losses_are_drawn_while_training(config, tmp_path):
    steps = []

    def look(step, _):
        if (tmp_path / "ckpt" / "loss.png").exists():
            steps.append(step)

    assert train(config, look, opened=time.perf_counter() - 60) == 0
    assert steps[0] == 6  # after the save at step 5


def test_checkpoint_is_written_before_the_sample(config, tmp_path):
    with pytest.raises(OutOfMemoryError):
        train(config, tokenizer=failing_tokenizer(MemoryError()), run={"sample_tokens": 4})
    assert finished_steps(tmp_path / "ckpt")[-1] == 10  # that of the first validation


def test_sample_prompt_longer_than_the_context_is_refused_at_the_start(config, tmp_path):
    prompt = "The red boat sails home. " * 20
    config = make_config(config.data.path, "new", run__sample_prompt=prompt, run__sample_tokens=4)
    with pytest.raises(UsageError, match=r"run.sample_prompt has \d+ tokens and .*=32; expected f"):
        fit(config)


def test_folder_that_is_removed_stops_the_run_at_the_next_save(config, tmp_path):
    def remove(step, _):
        if step == 7:
            shutil.rmtree(tmp_path / "ckpt")

    with pytest.raises(UserError, match="ckpt does not exist any more; a checkpoint cannot"):
        train(config, remove, run={"save_every": 50})
    assert (
        not list((tmp_path / "ckpt").glob("*")) or not (tmp_path / "ckpt" / "config.json").exists()
    )


def test_damaged_metrics_are_skipped_and_counted(config, tmp_path, capfd):
    assert train(config, stop_at(13)) == 143
    metrics = tmp_path / "ckpt" / "metrics.jsonl"
    foreign = [
        b"hello",
        b"[1]",
        b'{"step": "x"}',
        b'{"step": 5, "loss": []}',
        b"\xff\xfe{",
        b"[" * 9999,
    ]
    metrics.write_bytes(b"\n".join([*foreign, metrics.read_bytes()]))
    capfd.readouterr()
    assert fit(config) == 0
    assert "warning: skipped 6 damaged lines of " in capfd.readouterr().err
    assert list(losses(tmp_path / "ckpt")) == list(range(1, 21))
    assert (tmp_path / "ckpt" / "loss.png").stat().st_size > 1000


def test_other_dtype_of_moments_is_refused(tokens):
    old, new = "float32", "bfloat16"
    started = make_config(tokens, "ckpt", optimizer__moments_dtype=old)
    assert train(started, stop_at(5)) == 143
    changed = make_config(tokens, "ckpt", optimizer__moments_dtype=new)
    message = f"optimizer.moments_dtype is '{old}' there and '{new}' here; choose another folder"
    with pytest.raises(UserError, match=message):
        fit(changed)
    assert fit(started) == 0  # the refusal has damaged nothing


def test_other_data_is_refused_unless_accepted(config, tokens, tmp_path):
    assert train(config, stop_at(5)) == 143
    tokenizer = TokenFolder.open(tokens).tokenizer_path
    other = make_tokens(tmp_path / "other", tokenizer=tokenizer, colours=("pink",)).path
    with pytest.raises(UserError, match=r"does not hold the data that step 5 of"):
        fit(make_config(other, "ckpt"))
    assert finished_steps(tmp_path / "ckpt") == [5]
    accepted = make_config(other, "ckpt", data__allow_change=True)
    assert train(accepted, stop_at(7)) == 143
    assert finished_steps(tmp_path / "ckpt")[-1] == 7
