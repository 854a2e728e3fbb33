"""A folder of checkpoints to read, and a copy of it to damage."""

import shutil

import pytest
from tiny_checkpoints import save


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder with the steps 5 and 9, not to be changed."""
    folder = tmp_path_factory.mktemp("good") / "ckpt"
    save(folder, {5: 2.0, 9: 3.0})
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of `good`."""
    return shutil.copytree(good, tmp_path / "ckpt")
