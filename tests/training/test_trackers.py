"""TensorBoard and Weights & Biases get the numbers of a run, and never end it."""

import dataclasses
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
from tiny_run import make_config

from llama_jax.errors import UsageError
from llama_jax.training.metrics import MetricsFile
from llama_jax.training.trackers import require_packages


class FakeWandb:
    """The part of the package that is used; it records what it gets."""

    Settings = dict

    def __init__(self):
        self.runs = []

    def init(self, **words):
        self.runs.append(SimpleNamespace(words=words, rows=[], finished=False))
        return self

    def define_metric(self, *names, step_metric):
        assert (names, step_metric) == (("*",), "step")

    def log(self, row):
        self.runs[-1].rows.append(row)

    def finish(self):
        self.runs[-1].finished = True


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def write(folder, config, *records):
    with closing(MetricsFile(folder, config)) as file:
        for record in records:
            file.write(record)


def test_tensorboard_gets_every_number_that_is_measured(tmp_path, monkeypatch):
    class SummaryWriter:
        def __init__(self, folder):
            assert folder == str(tmp_path / "tensorboard")

        def add_scalar(self, *scalar):
            scalars.append(scalar)

        def close(self):
            scalars.append("closed")

    scalars = []
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    config = make_config("tokens", tmp_path, run__tensorboard=True)
    write(tmp_path, config, {"step": 3, "loss": 2.0, "goodput": 0.5, "session": 1})
    assert scalars == [("loss", 2.0, 3), ("goodput", 0.5, 3), "closed"]


def test_wandb_gets_the_same_with_the_config_and_continues_its_run(tmp_path, wandb):
    config = make_config("tokens", tmp_path, run__wandb=True)
    write(tmp_path, config, {"step": 3, "loss": 2.0, "session": 1}, {"step": 4, "changed": {}})
    write(tmp_path, config, {"step": 3, "loss": 1.5})
    first, second = wandb.runs
    assert first.rows == [{"step": 3, "loss": 2.0}] and first.finished
    assert second.rows == [{"step": 3, "loss": 1.5}]
    assert first.words["config"] == dataclasses.asdict(config)
    assert second.words["id"] == first.words["id"]
    assert (first.words["resume"], second.words["resume"]) == (None, "allow")
    assert (first.words["project"], first.words["name"]) == ("llama_jax", tmp_path.name)


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_a_failing_tracker_is_one_warning(tmp_path, wandb, monkeypatch, capsys, place):
    def fail(*_, **__):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(wandb, place, fail)
    config = make_config("tokens", tmp_path, run__wandb=True)
    write(tmp_path, config, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    line = "warning: run.wandb has failed (no network); training goes on without it\n"
    assert capsys.readouterr().err == line


def test_a_missing_package_is_reported_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    require_packages(make_config("tokens", tmp_path).run)
    with pytest.raises(UsageError) as error:
        require_packages(make_config("tokens", tmp_path, run__wandb=True).run)
    install = 'install it with: pip install "llama_jax[wandb]"'
    assert str(error.value) == f"run.wandb needs the package wandb; {install}"


@pytest.mark.parity
def test_wandb_itself_writes_a_run_offline_and_goes_on_with_it(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = make_config("tokens", tmp_path, run__wandb=True)
    write(tmp_path, config, {"step": 3, "loss": 2.0})
    write(tmp_path, config, {"step": 2, "loss": 2.5}, {"step": 2, "validation_loss": 2.25})
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1  # a name has the run's id
    first, second = (file.read_bytes() for file in files)
    for content, name in ((first, b"num_kv_heads"), (first, b"loss"), (second, b"validation_loss")):
        assert name in content
