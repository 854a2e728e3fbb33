"""The door plan.py as a user meets it."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_jax.cli import plan

REPOSITORY = Path(__file__).resolve().parents[2]


def refused(words, capsys):
    """The exit code and the one line on stderr."""
    from llama_jax.cli import main as cli

    argv, sys.argv = sys.argv, ["plan.py", *words]
    try:
        with pytest.raises(SystemExit) as left:
            cli.run(plan.main)
    finally:
        sys.argv = argv
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return left.value.code, err


def test_a_laptop_learns_at_once_whether_a_run_fits():
    words = ["--config", "configs/7b.py", "--target", "v5p-64", "--fast"]
    command = [sys.executable, "plan.py", *words, "--config.optimizer.accumulation_steps=32"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("v5p-64: 32 × TPU v5p, slice 2x4x4\n")
    assert "32 microbatches of 1 per chip" in done.stdout and "\nfits: " in done.stdout


def test_sampling_is_planned_too(capsys):
    words = ["--target=v5e-8", "--mode=decode", "--batch=8", "--quantize=int8", "--fast"]
    assert plan.main(["--config=configs/15m.py", *words]) == 0
    assert "8 sequences × 256 tokens; weights int8" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_lists_flags(capsys):
    assert plan.main(["--config=configs/demo.py", "--target=v6e-4", "--search", "--fast"]) == 0
    assert "--config.run.remat=block" in capsys.readouterr().out


@pytest.fixture
def planned(capsys):
    """A function that returns what a plan of the demo prints."""

    def printed(*words):
        assert plan.main(["--config=configs/demo.py", "--target=v6e-8", "--fast", *words]) == 0
        return capsys.readouterr().out

    return printed


def test_figures_as_json(planned):
    trained = json.loads(planned("--json"))
    assert (trained["fits"], trained["devices"], trained["compiled"]) == (True, 8, False)
    sizes = trained["bytes"]
    total = sum(sizes[kind] for kind in ("parameters", "optimizer", "activations", "temporary"))
    assert sizes["total"] == pytest.approx(total)
    decoded = json.loads(planned("--json", "--mode=decode"))
    assert decoded["bytes"].keys() == {"weights", "cache", "temporary", "total", "usable"}


@pytest.mark.slow
def test_figures_as_json_are_those_of_the_text(planned):
    total = json.loads(planned("--json"))["bytes"]["total"]
    assert f"{total / 2**30:.4f}" in planned()


@pytest.mark.slow
def test_a_search_as_json(capsys):
    words = ["--config=configs/demo.py", "--target=v6e-4", "--fast", "--json", "--search"]
    assert plan.main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["flags"].startswith("--config.") and found[0]["seconds"] > 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--fast"], "--target is missing"),
        (["--target", "v5x-8", "--fast"], "did you mean"),
        (["v5e-8"], "'v5e-8' is not understood; did you mean --target v5e-8?"),
        (["--target", "v5e-8", "--fsat"], "'--fsat' is not understood"),
        (["--target", "v5e-8", "--fast", "--config.mesh.tensor=3"], "do not multiply to 8 devices"),
        (["--target", "v5e-8", "--fast", "--config.mesh.fsdp=8", "--config.mesh.data=1",
          "--config.data.batch_size=4"], "does not divide"),
        (["--target", "v5e-8", "--fast", "--config", "configs/9b.py"], "is not a file"),
        (["--target", "v5e-1", "--fast", "--mode", "decode", "--context", "9000"], "out of range"),
        (["--target", "v5e-1", "--mode", "guess"], "invalid choice"),
        (["--target", "H200-1", "--fast", "--config.run.attention=splash"], "splash"),
        (["--target", "v5e-1", "--fast", "--batch", "8"], "--batch is for decoding"),
        (["--target", "v5e-1", "--search", "--mode", "decode"], "--search is for training"),
        (["--table", "--bogus", "3", "--target", "nothing"], "leave out '--bogus'"),
        (["--table", "--config", "configs/7b.py"], "leave out '--config'"),
        (["--fast", "--table"], "leave out '--fast'"),
        (["--table", "--search"], "leave out '--search'"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line(words, complaint, capsys):
    code, line = refused(words, capsys)
    assert code == 2 and complaint in line


@pytest.mark.parametrize("mode", [["--search"], ["--mode=decode"], []])
def test_without_libtpu_the_plan_is_an_estimate_and_one_line_says_so(mode, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert plan.main(["--config=configs/demo.py", "--target=v5e-1", *mode]) == 0
    out, warning = capsys.readouterr()
    assert "estimated" in out and "compiled" not in out
    assert warning.startswith("warning: the TPU compiler is not installed")
    assert warning.count("\n") == 1 and "pip install '.[plan]'" in warning


@pytest.mark.slow
def test_advice_for_a_large_quantized_model_is_traced_once(capsys):
    """Each further batch, context and dtype that is tried takes arithmetic only."""
    words = ["--target=v5e-8", "--mode=decode", "--batch=64", "--quantize=int8", "--fast"]
    start = time.perf_counter()
    assert plan.main(["--config=configs/70b.py", *words]) == 0
    assert time.perf_counter() - start < 30  # was minutes; 3 s on a quiet machine
    out = capsys.readouterr().out
    assert "does not fit" in out and "largest batch that fits" in out
