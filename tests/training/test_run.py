"""The loop: a tiny run learns, resumes bit by bit, and stops before it is spoilt."""

import dataclasses
import gzip
import json
import math
from pathlib import Path

import jax.numpy as jnp
import pytest
from tiny_run import make_config, make_tokens, quick_runs

from llama_jax.checkpoints import restore as reader
from llama_jax.checkpoints.restore import finished_steps
from llama_jax.data import loader as run_batches
from llama_jax.data.token_folder import TokenFolder
from llama_jax.distributed.preemption import StopSignal
from llama_jax.errors import NonFiniteLossError, OutOfMemoryError, UsageError, UserError
from llama_jax.training import loop as trainer
from llama_jax.training import metrics as reporting
from llama_jax.training import run
from llama_jax.training.loop import Trainer
from llama_jax.training.metrics import read_metrics
from llama_jax.training.profiling import Window
from llama_jax.training.run import fit


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """Runs on one device, whose programs are compiled once for the whole file."""
    with quick_runs(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("data") / "tokens").path


@pytest.fixture
def config(tokens, tmp_path):
    return make_config(tokens, tmp_path / "ckpt")


def checksums(folder, step):
    """What a checkpoint's meta says of every array: equal for equal bits."""
    return json.loads((folder / str(step) / "meta" / "metadata").read_text())["checksums"]


def losses(folder):
    return {step: record["loss"] for step, record in read_metrics(folder).items()}


@pytest.fixture
def stop_at(monkeypatch):
    """Makes runs stop politely, as by SIGTERM, once a step has been followed up."""

    def arrange(step):
        follow_up = Trainer._follow_up

        def and_stop(self, is_last):
            follow_up(self, is_last)
            if self.step == step:
                self.stop.number = 15

        monkeypatch.setattr(Trainer, "_follow_up", and_stop)

    return arrange


def test_a_tiny_model_learns(tokens, tmp_path, capfd):
    config = make_config(
        tokens, tmp_path / "ckpt", optimizer__steps=120, model__dropout=0.0, run__eval_every=40
    )
    assert fit(config) == 0
    records = read_metrics(tmp_path / "ckpt")
    assert records[1]["loss"] == pytest.approx(math.log(320), rel=0.03)
    assert records[120]["validation_loss"] < 1.9
    assert records[120]["perplexity"] == pytest.approx(math.exp(records[120]["validation_loss"]))
    assert capfd.readouterr().err == ""


def test_a_run_in_two_sittings_is_the_run_in_one_bit_by_bit(tokens, tmp_path, stop_at, monkeypatch):
    straight, cut = (make_config(tokens, tmp_path / name) for name in ("straight", "cut"))
    assert straight.model.dropout > 0
    assert fit(straight) == 0
    stop_at(13)
    assert fit(cut) == 143
    assert finished_steps(tmp_path / "cut")[-1] == 13
    monkeypatch.undo()
    assert fit(cut) == 0
    assert checksums(tmp_path / "cut", 20) == checksums(tmp_path / "straight", 20)
    assert losses(tmp_path / "cut") == losses(tmp_path / "straight")
    assert len(losses(tmp_path / "cut")) == 20
    told = [record for record in read_metrics(tmp_path / "cut").values() if "sitting" in record]
    assert [(record["step"], record["sitting"]) for record in told] == [
        *((step, 1) for step in (5, 10, 13)),
        *((step, 2) for step in (15, 20)),
    ]
    assert all(0 < record["goodput"] < 1 and 0 < record["run_goodput"] < 1 for record in told)
    assert told[3]["run_goodput"] != pytest.approx(told[3]["goodput"], rel=0.01)
    assert told[3]["wall_seconds"] < told[4]["wall_seconds"]


def test_instruments_ask_the_device_once_a_report(config, monkeypatch):
    asked = []

    def counted(name):
        function = getattr(reporting, name)
        return lambda *words: asked.append(name) or function(*words)

    for name in ("memory_use", "peak_flops"):
        monkeypatch.setattr(reporting, name, counted(name))
    assert fit(config) == 0
    assert asked == ["peak_flops"] + 4 * ["memory_use"]  # 20 steps, a report every 5


def test_a_profile_has_its_steps_and_no_others(config, tmp_path, capfd):
    assert fit(config, Window(2, 4)) == 0
    line = "profile   steps 3 to 4 in "
    assert line + str(tmp_path / "ckpt" / "profile") in capfd.readouterr().out
    (trace,) = (tmp_path / "ckpt" / "profile").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert {event["args"]["step_num"] for event in events if event.get("name") == "step"} == {
        "3",
        "4",
    }
    assert list(trace.parent.glob("*.xplane.pb"))


def test_running_out_of_memory_is_one_line_with_knobs(config, monkeypatch):
    def compile_too_much(self):
        return jnp.zeros(1 << 50, jnp.uint8).block_until_ready()

    monkeypatch.setattr(Trainer, "_compile", compile_too_much)
    line = (
        r"needed, beyond the limit of [\d.]+ GiB; try --config\.\S+, --config\.\S+ or \S+; python"
    )
    with pytest.raises(OutOfMemoryError, match=line):
        fit(config)


def test_a_checkpoint_that_does_not_fit_in_memory_is_not_called_damaged(config, monkeypatch):
    def read_too_much(*_):
        return jnp.zeros(1 << 50, jnp.uint8).block_until_ready()

    assert fit(config) == 0
    saved = finished_steps(Path(config.run.checkpoint_dir))
    monkeypatch.setattr(reader, "_read_with_orbax", read_too_much)
    with pytest.raises(OutOfMemoryError):
        fit(config)
    assert finished_steps(Path(config.run.checkpoint_dir)) == saved


def test_a_loss_that_is_not_finite_ends_the_run_before_its_update(config, tmp_path, monkeypatch):
    batches = run_batches.training_batches

    def spoilt(*words, start_step=0, **options):
        for step, batch in enumerate(batches(*words, start_step=start_step, **options), start_step):
            if step == 7:  # the eighth step
                batch.weights_BT[0, 0] = math.nan
            yield batch

    monkeypatch.setattr(run_batches, "training_batches", spoilt)
    for _ in range(2):  # the same command again says the same again
        with pytest.raises(NonFiniteLossError, match=r"step 8 has loss nan .* good step is 7"):
            fit(config)
        assert finished_steps(tmp_path / "ckpt")[-1] == 7
        assert list(losses(tmp_path / "ckpt")) == [1, 2, 3, 4, 5, 6, 7]
    monkeypatch.undo()
    assert fit(config) == 0
    assert losses(tmp_path / "ckpt")[20] < losses(tmp_path / "ckpt")[1]


def test_a_run_that_is_spoilt_at_once_has_saved_its_beginning(config, tmp_path, monkeypatch):
    batches = run_batches.training_batches

    def spoilt(*words, **options):
        for batch in batches(*words, **options):
            batch.weights_BT[0, 0] = math.inf
            yield batch

    monkeypatch.setattr(run_batches, "training_batches", spoilt)
    with pytest.raises(NonFiniteLossError, match="good step is 0, saved"):
        fit(config)
    assert finished_steps(tmp_path / "ckpt") == [0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"run__attention": "cudnn", "model__dropout": 0.0}, "run.attention='cudnn' needs an NVI"),
        ({"run__attention": "splash", "model__dropout": 0.0}, "'splash' needs a TPU and this run"),
        ({"run__attention": "blockwise"}, "run.attention='blockwise' cannot drop attention"),
        ({"run__remat": "offload"}, "run.remat='offload' needs memory of kind moon and cpu has"),
        ({"optimizer__accumulation_steps": 3}, "data.batch_size=8 does not divide"),
    ],
)
def test_what_the_devices_cannot_do_is_refused_with_nothing_written(
    tokens, tmp_path, monkeypatch, asked, message
):
    monkeypatch.setattr("llama_jax.training.step.HOST_MEMORY", "moon")
    with pytest.raises(UsageError, match=message):
        fit(make_config(tokens, tmp_path / "ckpt", **asked))
    assert not list(tmp_path.iterdir())


def test_a_validation_loss_of_nan_is_never_the_best(config, tmp_path, monkeypatch):
    told = iter([3.0, math.nan, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "_validate", lambda self: next(told))
    config = make_config(config.data.path, tmp_path / "ckpt", run__eval_every=5, run__keep_last=1)
    assert fit(config) == 0
    assert finished_steps(tmp_path / "ckpt") == [15, 20]
    meta = json.loads((tmp_path / "ckpt" / "20" / "meta" / "metadata").read_text())
    assert meta["best_validation_loss"] == 2.0


def test_the_best_of_an_earlier_sitting_is_kept(config, tmp_path, monkeypatch, stop_at):
    told = iter([1.0, 3.0, 2.0, 2.5])
    monkeypatch.setattr(Trainer, "_validate", lambda self: next(told))
    config = make_config(config.data.path, tmp_path / "ckpt", run__eval_every=5, run__keep_last=1)
    stop_at(7)
    assert fit(config) == 143
    stop_at(-1)
    assert fit(config) == 0
    assert finished_steps(tmp_path / "ckpt") == [5, 20]


def test_a_stop_in_validation_is_heard_there(config, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(StopSignal, "requested", lambda self: bool(said))
    monkeypatch.setattr(StopSignal, "exit_code", 143)
    jitted = run.jit_programs

    def programs(*words):
        made = jitted(*words)
        evaluate = lambda *batch: said.append(1) or made.evaluate(*batch)  # noqa: E731
        return dataclasses.replace(made, evaluate=evaluate)

    monkeypatch.setattr(run, "jit_programs", programs)
    assert fit(config) == 143
    assert len(said) == 1  # one batch of the two
    assert finished_steps(tmp_path / "ckpt")[-1] == 10
    assert "validation_loss" not in read_metrics(tmp_path / "ckpt")[10]


def test_a_full_disk_is_told_once_and_the_first_error_wins(config, tmp_path, monkeypatch):
    def full(self, *_):
        raise UserError("the disk is full")

    monkeypatch.setattr(trainer.CheckpointWriter, "save", full)
    close = trainer.CheckpointWriter.close

    def close_badly(self):
        close(self)
        raise UserError("could not close")

    monkeypatch.setattr(trainer.CheckpointWriter, "close", close_badly)
    with pytest.raises(UserError, match="the disk is full"):
        fit(config)


@pytest.mark.parametrize(
    ("kept", "asked"),
    [
        ("float32", "bfloat16"),
        pytest.param("bfloat16", "float32", marks=pytest.mark.slow),
    ],
)
def test_moments_of_another_dtype_are_refused_by_name(tokens, tmp_path, kept, asked):
    options = {"optimizer__steps": 5, "run__eval_every": 50}
    started = make_config(tokens, tmp_path / "ckpt", optimizer__moments_dtype=kept, **options)
    assert fit(started) == 0
    changed = make_config(tokens, tmp_path / "ckpt", optimizer__moments_dtype=asked, **options)
    message = f"optimizer.moments_dtype is '{kept}' there and '{asked}' here; choose another folder"
    with pytest.raises(UserError, match=message):
        fit(changed)
    assert fit(started) == 0  # the refusal has damaged nothing


def test_other_data_are_refused_unless_accepted(config, tokens, tmp_path):
    config = make_config(tokens, tmp_path / "ckpt", optimizer__steps=5)
    assert fit(config) == 0
    tokenizer = TokenFolder.open(tokens).tokenizer_path
    other = make_tokens(tmp_path / "other", tokenizer=tokenizer, colours=("pink",)).path
    changed = make_config(other, tmp_path / "ckpt", optimizer__steps=7)
    with pytest.raises(UserError, match="are not those that step 5 of"):
        fit(changed)
    assert finished_steps(tmp_path / "ckpt") == [5]
    accepted = make_config(other, tmp_path / "ckpt", optimizer__steps=7, data__allow_change=True)
    assert fit(accepted) == 0
    assert finished_steps(tmp_path / "ckpt")[-1] == 7
