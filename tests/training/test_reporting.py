"""What is reported of a portion of steps: records, a line, and the step that was not finite."""

import jax
import jax.numpy as jnp
import pytest
from tiny_run import make_config

from llama_jax.hardware.accelerators import MemoryUse
from llama_jax.model.parameters import flops_per_token
from llama_jax.training import metrics as goodput
from llama_jax.training import metrics as reporting
from llama_jax.training.metrics import Earlier, Reporter, StepClock
from llama_jax.training.step import StepMetrics


class Written(list):
    """Stands for the metrics file and for the console."""

    write = list.append

    def progress(self, step, fields):
        self.append("  ".join(fields))


@pytest.fixture
def now(monkeypatch):
    time = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: time[0])
    return time


def reporter(now, **changes):
    """A reporter of the third session, 10 seconds after it began, with its records and lines."""
    config = make_config("tokens", "ckpt", **changes)
    records, lines = Written(), Written()
    clock = StepClock(now[0], Earlier(sessions=2, wall=50.0, steps=30.0))
    now[0] += 10
    clock.start()
    return Reporter(config, jax.devices()[:2], records, lines, clock), records, lines


def metrics_of(loss, healthy=True):
    return StepMetrics(*map(jnp.float32, (loss, 0.5, 3e-4)), jnp.bool(healthy), {})


def test_every_step_has_a_record_and_the_last_of_them_speed_and_memory(now, monkeypatch):
    monkeypatch.setattr(reporting, "memory_use", lambda _: MemoryUse(2 * 10**9, 3 * 10**9, 0))
    subject, records, lines = reporter(now, run__peak_flops=1e8)
    for loss in (4.0, 2.0):
        subject.add(metrics_of(loss))
    now[0] += 8
    assert subject.report(7) is None
    basis = {"learning_rate": pytest.approx(3e-4), "gradient_norm": 0.5, "seconds": 4.0}
    assert records[0] == {"step": 6, "loss": 4.0} | basis
    rate, config = 8 * 16 / 4.0, make_config("tokens", "ckpt")
    assert records[1] == {"step": 7, "loss": 2.0} | basis | {
        "tokens_per_second": rate,
        "mfu": pytest.approx(rate * flops_per_token(config.model, 16) / 2e8),  # two devices
        "memory_gb": 2.0,
        "peak_memory_gb": 3.0,
        "goodput": pytest.approx(8 / 18),
        "run_goodput": pytest.approx(38 / 68),
        "wall_seconds": 18.0,
        "session": 3,
    }
    share = f"{records[1]['mfu']:.1%}"
    assert lines == [
        "step  7/20  loss 3.0000  lr 3.00e-04  norm 0.50  32 tok/s  4000 ms/step"
        f"  mfu {share}  mem 3.0 GB  goodput 44%  left 52s"
    ]
    assert subject.report(7) is None and len(records) == 2  # nothing more to tell


def test_what_is_not_known_is_left_out(now, monkeypatch):
    monkeypatch.setattr(reporting, "memory_use", lambda _: None)
    subject, records, lines = reporter(now)
    subject.add(metrics_of(4.0))
    now[0] += 8
    subject.report(1)
    assert not {"mfu", "memory_gb", "peak_memory_gb"} & records[0].keys()
    assert "mfu" not in lines[0] and "mem" not in lines[0]


def test_the_first_step_that_was_not_finite_ends_the_records(now):
    subject, records, lines = reporter(now)
    for loss, healthy in ((4.0, True), (jnp.nan, False), (jnp.nan, False)):
        subject.add(metrics_of(loss, healthy))
    number, metrics = subject.report(9)
    assert number == 8 and not metrics.healthy
    assert [record["step"] for record in records] == [7] and lines == []
