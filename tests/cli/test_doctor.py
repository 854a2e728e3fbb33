"""`llama-jax doctor`: what it finds here, and where something is broken."""

import importlib.metadata

import jax
import pytest

from llama_jax.cli import doctor

LABELS = ["llama_jax", "python", "packages", "devices", "cache", "extras", "advice"]


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """A call that returns the exit code, and the text of each line by its label."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))

    def run():
        code = doctor.main([])
        lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert list(lines) == LABELS
        return code, lines

    return run


def test_what_is_here_is_reported(report, tmp_path):
    code, lines = report()
    assert code == 0
    assert f"jax {jax.__version__}, " in lines["packages"]
    assert lines["devices"] == f"{jax.device_count()} × cpu"
    assert lines["cache"] == f"{tmp_path / 'cache'}, still empty"
    present, absent = lines["extras"].split("; not installed: ")
    every = [*present.split(", "), *absent.split(", ")]
    assert "test" in present.split(", ") and len(set(every)) == len(every) > 10
    assert lines["advice"].startswith("all is in place")


def test_the_cache_is_measured(report, tmp_path):
    (tmp_path / "cache" / "models" / "small").mkdir(parents=True)
    (tmp_path / "cache" / "models" / "small" / "file").write_bytes(bytes(3_000_000))
    assert report()[1]["cache"] == f"{tmp_path / 'cache'}: models 3 MB"


def test_a_backend_that_does_not_start_is_a_line(report, monkeypatch):
    def devices():
        raise RuntimeError("Unable to initialize backend 'tpu': no accelerator\nmore")

    monkeypatch.setattr(jax, "devices", devices)
    code, lines = report()
    assert code == 1
    assert lines["devices"] == "RuntimeError: Unable to initialize backend 'tpu': no accelerator"
    assert lines["advice"] == "mend the line 'devices' first"


def test_a_package_that_is_too_old_is_a_line(report, monkeypatch):
    version = importlib.metadata.version
    old = {"optax": "0.0.1"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old.get(name) or version(name))
    code, lines = report()
    assert code == 1
    assert lines["packages"].startswith("optax is 0.0.1; expected >=0.2.8: run pip install")


def test_a_cache_that_cannot_be_written_is_a_line(report, tmp_path):
    (tmp_path / "cache").write_text("a file")
    code, lines = report()
    assert (code, lines["advice"]) == (1, "mend the line 'cache' first")
    assert "cannot be written; set LLAMA_JAX_CACHE to another folder" in lines["cache"]
