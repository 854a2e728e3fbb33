"""What a run tells: speeds, times, lines and records."""

import json
import math
from pathlib import Path

import pytest

from llama_jax import metrics
from llama_jax.config import ModelConfig
from llama_jax.metrics import (
    Console,
    MetricsFile,
    StepClock,
    flops_per_token,
    peak_flops,
    read_metrics,
    spelled_duration,
)


def test_peaks_are_found_by_the_names_that_devices_have():
    assert peak_flops("TPU v5 lite") == 197e12
    assert peak_flops("TPU v5p") == peak_flops("TPU v5") == 459e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("cpu") == 0


def test_flops_are_those_of_the_formula():
    config = ModelConfig(
        vocab_size=53, dim=24, num_layers=3, num_heads=6, num_kv_heads=2, hidden_dim=40,
        context_length=32,
    )  # fmt: skip
    parameters = 53 * 24 + 3 * (2 * 24 * 24 + 2 * 24 * 8 + 3 * 24 * 40 + 2 * 24) + 24
    assert flops_per_token(config, 11) == 6 * parameters + 12 * 3 * 24 * 11


def test_the_clock_leaves_pauses_out(monkeypatch):
    now = iter([0.0, 10.0, 14.0, 24.0, 24.0, 30.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(now))
    clock = StepClock()  # 0
    with clock:  # 10 to 14
        pass
    assert clock.lap(4) == 5.0  # 24 seconds less 4, over 4 steps
    with clock:  # 24 to 30
        pass
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: 33.0)
    assert clock.lap(1) == 3.0


@pytest.mark.parametrize(
    ("seconds", "spelled"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (184, "3m04s"), (3600, "1h00m"), (90061, "25h01m")],
)
def test_durations_are_spelled_for_people(seconds, spelled):
    assert spelled_duration(seconds) == spelled


def test_records_are_merged_by_step_and_the_later_sitting_wins(tmp_path):
    with MetricsFile(tmp_path, tensorboard=False) as file:
        file.write({"step": 2, "loss": 2.0})
        file.write({"step": 1, "loss": 3.0})
        file.write({"step": 2, "validation_loss": math.nan})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # killed here
    with MetricsFile(tmp_path, tensorboard=False) as file:
        file.write({"step": 2, "loss": 2.5})
    assert read_metrics(tmp_path) == {
        1: {"step": 1, "loss": 3.0},
        2: {"step": 2, "loss": 2.5, "validation_loss": "nan"},
    }
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line


def test_records_are_on_disk_at_once(tmp_path):
    with MetricsFile(tmp_path, tensorboard=False) as file:
        file.write({"step": 1, "loss": 3.0})
        assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 3.0}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_one_warning_and_not_the_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with MetricsFile(tmp_path, tensorboard=False) as file:
        for step in range(3):
            file.write({"step": step, "loss": 1.0})
    line = "warning: metrics.jsonl is not written: No space left on device; training goes on\n"
    assert capsys.readouterr().err == line


def test_without_a_terminal_the_console_says_plain_lines(capsys):
    console = Console(total=9, start=0)
    console.line("hello")
    console.progress(3, "step 3/9  loss 1.0")
    console.close()
    assert capsys.readouterr() == ("hello\nstep 3/9  loss 1.0\n", "")


def test_only_process_0_speaks_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    console = Console(total=9, start=0)
    console.line("hello")
    console.close()
    metrics.warn("hello")
    with MetricsFile(tmp_path, tensorboard=False) as file:
        file.write({"step": 1})
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
