"""Small checkpoints, shared by several tests."""

import jax
import jax.numpy as jnp
import numpy as np

from llama_jax.checkpoints.restore import restore_newest
from llama_jax.checkpoints.save import CheckpointWriter

META = {"data": "fingerprint"}


def make_trees(step, size=64):
    """A model and an optimizer state with arrays of every kind, different at each step."""
    random = np.random.default_rng(step)
    model = {
        "a": {"w": random.standard_normal((size, 24), np.float32), "b": np.float32([np.nan, -0.0])},
        "half": jnp.asarray(random.standard_normal(7), jnp.bfloat16),
        "flags": random.integers(0, 2, 9).astype(bool),
    }
    optimizer = {"count": np.int32(step), "m": random.standard_normal((3, size), np.float32)}
    return jax.tree.map(jnp.asarray, {"model": model, "optimizer": optimizer})


def abstract(trees, sharding=None):
    here = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), trees)


WANTED = abstract(make_trees(0))


def save(folder, losses, keep_last=3):
    """Save checkpoints: `losses` has their validation losses by step."""
    folder.mkdir(exist_ok=True)
    writer = CheckpointWriter(folder, keep_last)
    for step, loss in losses.items():
        trees = make_trees(step)
        writer.save(step, trees["model"], trees["optimizer"], META, loss)
    writer.close()


def assert_is(restored, step):
    """Compare with what was saved at a step, to the bit."""
    assert restored.step == step
    expected, found = (jax.tree.leaves(tree) for tree in (make_trees(step), restored.trees))
    assert len(expected) == len(found) == 6
    for old, new in zip(expected, found):
        assert old.dtype == new.dtype and old.shape == new.shape
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()


def newest(folder, **options):
    """Return the newest intact checkpoint and the lines reported."""
    lines = []
    restored = restore_newest(folder, WANTED, lines.append, **options)
    assert all("\n" not in line for line in lines)
    return restored, lines


def data_files(folder, item):
    """The files that hold the elements of an item's arrays."""
    return sorted(
        path for path in (folder / item).rglob("*") if path.is_file() and "/d/" in str(path)
    )
