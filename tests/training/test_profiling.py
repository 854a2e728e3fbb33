"""Windows of steps, and when a trace of them begins and ends."""

import pytest

from llama_jax.errors import UsageError
from llama_jax.training import profiling
from llama_jax.training.profiling import Profiler, Window, parse_window


def test_a_window_is_two_numbers_of_steps_made():
    assert parse_window("0:1", 20) == Window(0, 1)
    assert parse_window("10:20", 20) == Window(10, 20)
    assert str(Window(10, 13)) == "steps 11 to 13"
    assert str(Window(10, 11)) == "step 11"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' cannot be parsed; expected START:STOP"),
        ("5", "'5' cannot be parsed"),
        ("5:6:7", "'5:6:7' cannot be parsed"),
        ("five:6", "'five:6' cannot be parsed"),
        (":6", "':6' cannot be parsed"),
        ("-1:3", "'-1:3' cannot be parsed"),
        ("1.5:3", "'1.5:3' cannot be parsed"),
        ("1:²", "'1:²' cannot be parsed"),
        ("6:6", "'6:6' is empty"),
        ("7:6", "'7:6' is empty"),
        ("7:21", "'7:21' goes beyond the run of optimizer.steps=20; end it at 20 or before"),
    ],
)
def test_a_window_that_is_none_is_refused(text, says):
    with pytest.raises(UsageError) as error:
        parse_window(text, 20)
    assert says in str(error.value) and str(error.value).startswith("--profile ")


@pytest.fixture
def calls(monkeypatch):
    """What the profiler of JAX is called for."""
    calls = []
    monkeypatch.setattr(profiling.jax.profiler, "start_trace", lambda *_, **__: calls.append("on"))
    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", lambda: calls.append("off"))
    return calls


def walk(window, folder, steps, calls):
    """Take a session's steps; return the lines printed."""
    said = []
    profiler = Profiler(window, folder, said.append)
    profiler.skip_to(steps.start)
    for made in steps:
        for _ in range(2):  # before the step and, as the next one's number, after the last
            if profiler.is_due(made):
                profiler.toggle(made)
        calls.append(made + 1)
    if profiler.is_due(steps.stop):
        profiler.toggle(steps.stop)
    profiler.close(steps.stop)
    return said


@pytest.mark.parametrize(
    ("window", "steps", "expected", "says"),
    [
        (Window(1, 3), range(5), [1, "on", 2, 3, "off", 4, 5], "steps 2 to 3 in "),
        (Window(0, 1), range(2), ["on", 1, "off", 2], "step 1 in "),
        (Window(3, 5), range(5), [1, 2, 3, "on", 4, 5, "off"], "steps 4 to 5 in "),
        (Window(1, 4), range(2, 5), ["on", 3, 4, "off", 5], "steps 3 to 4 in "),  # resumed within
        (Window(1, 9), range(3), [1, "on", 2, 3, "off"], "steps 2 to 3 in "),  # stopped within
        (Window(1, 3), range(3, 5), [4, 5], "steps 2 to 3 were made in an earlier session"),
    ],
)
def test_the_steps_of_the_window_are_traced_and_no_others(
    tmp_path, calls, window, steps, expected, says
):
    said = walk(window, tmp_path, steps, calls)
    assert calls == expected
    assert len(said) == 1 and says in said[0]


def test_without_a_window_or_on_another_process_nothing_is_traced(tmp_path, calls, monkeypatch):
    assert walk(None, tmp_path, range(3), calls) == []
    monkeypatch.setattr(profiling.jax, "process_index", lambda: 1)
    assert walk(Window(1, 2), tmp_path, range(3), calls) == []
    assert "on" not in calls


def test_a_trace_that_cannot_be_written_costs_a_line_and_not_the_run(
    tmp_path, calls, monkeypatch, capsys
):
    def full():
        raise OSError("No space left on device\nand more")

    monkeypatch.setattr(profiling.jax.profiler, "stop_trace", full)
    assert walk(Window(1, 3), tmp_path, range(5), calls) == []
    line = "warning: the profile of steps 2 to 3 could not be written: No space left on device\n"
    assert capsys.readouterr().err == line
