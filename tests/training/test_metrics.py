"""What a run reports: durations, lines and records."""

import io
import json
import math
from contextlib import closing
from pathlib import Path

import pytest

from llama_jax.training import metrics
from llama_jax.training.metrics import Console, MetricsFile, format_duration, read_metrics


@pytest.mark.parametrize(
    ("seconds", "formatted"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (184, "3m04s"), (3600, "1h00m"), (90061, "25h01m")],
)
def test_durations_are_formatted(seconds, formatted):
    assert format_duration(seconds) == formatted


def test_records_are_merged_by_step_and_the_later_session_wins(tmp_path):
    with closing(MetricsFile(tmp_path)) as file:
        file.write({"step": 2, "loss": 2.0})
        file.write({"step": 1, "loss": 3.0})
        file.write({"step": 2, "validation_loss": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed here
    with closing(MetricsFile(tmp_path)) as file:
        file.write({"step": 2, "loss": 2.5})
    assert read_metrics(tmp_path) == {
        1: {"step": 1, "loss": 3.0},
        2: {"step": 2, "loss": 2.5, "validation_loss": "nan"},
    }
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_records_are_on_disk_at_once(tmp_path):
    with closing(MetricsFile(tmp_path)) as file:
        file.write({"step": 1, "loss": 3.0})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 3.0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_one_warning_and_not_the_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with closing(MetricsFile(tmp_path)) as file:
        for step in range(3):
            file.write({"step": step, "loss": 1.0})
    reason = "metrics.jsonl cannot be written (No space left on device)"
    assert capsys.readouterr().err == f"warning: {reason}; training goes on without it\n"


def test_without_a_terminal_the_console_says_plain_lines(capsys):
    console = Console(total=9, start=0)
    console.line("hello")
    console.progress(3, ["step 3/9", "loss 1.0"])
    console.close()
    assert capsys.readouterr() == ("hello\nstep 3/9  loss 1.0\n", "")


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (140, "loss 1.0  lr 1.00e-03  norm 0.5  1,000 tok/s  mem 0.9 GB  goodput 83%  left 5s"),
        (80, "loss 1.0  lr 1.00e-03  norm 0.5  1,000 tok/s  left 5s"),
        (40, "loss 1.0  left 5s"),
    ],
)
def test_line_behind_the_bar_fits_the_terminal_and_names_the_step_once(monkeypatch, columns, shown):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(metrics.sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    fields = "lr 1.00e-03", "norm 0.5", "1,000 tok/s", "mem 0.9 GB", "goodput 83%", "left 5s"
    console = Console(total=400, start=0)
    console.progress(10, ["step  10/400", "loss 1.0", *fields])
    console.close()
    line = terminal.getvalue().split("\r")[-1].rstrip()
    assert line.endswith(f" 10/400  {shown}") and line.count("10/400") == 1


def test_only_process_0_speaks_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    console = Console(total=9, start=0)
    console.line("hello")
    console.close()
    metrics.warn("hello")
    with closing(MetricsFile(tmp_path)) as file:
        file.write({"step": 1})
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_line_that_the_terminal_cannot_encode_is_escaped(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(metrics.sys, "stdout", output)
    Console(total=9, start=0).line("café ✓")
    assert output.buffer.getvalue() == b"caf\\xe9 \\u2713\n"


def test_closed_standard_output_is_a_warning(monkeypatch, capsys):
    output = io.StringIO()
    output.close()
    monkeypatch.setattr(metrics.sys, "stdout", output)
    console = Console(total=9, start=0)
    console.line("hello")
    console.line("hello again")
    assert capsys.readouterr().err.count("warning: standard output cannot be written") == 1
