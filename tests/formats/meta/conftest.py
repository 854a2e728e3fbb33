"""Folders in Meta's format that a test may change."""

import shutil

import pytest
from meta_folders import MANY_HEADS, untied

from llama_jax.formats.meta import model as meta


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of one shard, not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "model"
    meta.write(untied("bfloat16"), folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture
def eight(tmp_path):
    """A folder of eight shards."""
    meta.write(untied(**MANY_HEADS), tmp_path / "eight", shards=8)
    return tmp_path / "eight"
