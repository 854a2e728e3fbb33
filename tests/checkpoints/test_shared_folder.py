"""A folder that all processes see, or one line. Real processes: test_distributed."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from llama_jax.checkpoints.run_folder import claimed_by_all
from llama_jax.errors import UserError


@pytest.fixture
def as_process(monkeypatch):
    """A function that makes this process one of two, of which the other never answers."""

    def become(number):
        monkeypatch.setattr(jax, "process_index", lambda: number)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: np.asarray(x)[None])

    return become


def test_process_0_holds_it_and_leaves_no_mark(as_process, tmp_path):
    as_process(0)
    with claimed_by_all(tmp_path / "ckpt"):
        assert [path.name for path in (tmp_path / "ckpt").iterdir()] == [".lock"]


def test_a_folder_of_its_own_is_refused(as_process, tmp_path):
    as_process(1)
    with (
        pytest.raises(UserError, match=r"ckpt is not the folder that process 0 writes to; put"),
        claimed_by_all(tmp_path / "ckpt", patience=0.3),
    ):
        raise AssertionError("claimed")
    assert not (tmp_path / "ckpt").exists()
