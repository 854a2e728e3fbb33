"""Seconds a step, and the part of wall time that went into steps."""

import json

import pytest

from llama_jax.training import metrics as goodput
from llama_jax.training.metrics import Earlier, StepClock, earlier_sessions, read_records


@pytest.fixture
def now(monkeypatch):
    """The time, which stands still until it is set."""
    time = [0.0]
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: time[0])
    return time


def spend(now, seconds):
    now[0] += seconds


NOTHING = Earlier()


def a_session(now, earlier=NOTHING):
    """10 s of restoring and compiling, 24 s of 4 steps, 4 s of validation, 2 s of one step."""
    clock = StepClock(now[0], earlier)
    spend(now, 10)
    clock.start()
    spend(now, 24)
    assert clock.lap(4) == 6
    with clock:
        spend(now, 4)
    spend(now, 2)
    assert clock.lap(1) == 2
    return clock


def test_the_share_of_time_in_steps_leaves_out_everything_else(now):
    clock = a_session(now)
    assert (clock.wall, clock.session) == (40, 1)
    assert clock.goodput == clock.run_goodput == pytest.approx(26 / 40)
    assert clock.summary == "65%"
    spend(now, 12)
    assert clock.goodput == pytest.approx(26 / 52)


def test_earlier_sessions_count_for_the_run_and_not_for_this_one(now):
    spend(now, 1000)  # since the computer was started
    clock = a_session(now, Earlier(sessions=2, wall=60, steps=24))
    assert clock.session == 3
    assert clock.goodput == pytest.approx(26 / 40)
    assert clock.run_goodput == pytest.approx(50 / 100)
    assert clock.summary == "65% (50% over 3 sessions)"


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_sessions_before_took_is_read_from_their_records(tmp_path):
    metrics = write(
        tmp_path / "metrics.jsonl",
        {"step": 1, "loss": 1.0, "seconds": 2.0},
        {"step": 2, "loss": 1.0, "seconds": 2.0, "session": 1, "wall_seconds": 30.0},
        {"step": 2, "validation_loss": 1.0},
        {"step": 3, "loss": 1.0, "seconds": 3.0, "sitting": 1, "wall_seconds": 40.0},
        # killed after step 3, and only step 1 was saved
        {"step": 2, "loss": 1.0, "seconds": 5.0, "session": 2, "wall_seconds": 50.0},
        {"step": 3, "loss": 1.0, "seconds": 7.0, "session": 2, "wall_seconds": 60.0},
    )
    assert earlier_sessions(read_records(metrics)[0], step=3) == Earlier(2, 100.0, 2.0 + 5.0 + 7.0)
    assert earlier_sessions(read_records(metrics)[0], step=2) == Earlier(
        2, 100.0, 7.0
    )  # 3 is made again
    with metrics.open("a") as file:
        file.write('{"step": 4, "seconds": 9.0, "sit')
    assert earlier_sessions(read_records(metrics)[0], step=9) == Earlier(2, 100.0, 2.0 + 5.0 + 7.0)


def test_a_run_without_such_records_begins_its_count_now(tmp_path):
    assert earlier_sessions(read_records(tmp_path / "absent")[0], 0) == Earlier()
    old = write(tmp_path / "metrics.jsonl", {"step": 1, "loss": 1.0, "seconds": 2.0})
    assert earlier_sessions(read_records(old)[0], 1) == Earlier()
