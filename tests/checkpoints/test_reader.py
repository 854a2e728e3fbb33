"""Checkpoints read: what was saved is what comes back, bit by bit, or one line."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_checkpoints import WANTED, abstract, assert_is, data_files, make_trees, newest

from llama_jax.checkpoints.layout import read_json
from llama_jax.checkpoints.restore import restore
from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.errors import UserError


def test_what_is_saved_comes_back_bit_by_bit(good, capfd):
    restored, lines = newest(good)
    assert_is(restored, 9)
    assert_is(restore(good / "5", WANTED), 5)
    assert restored.meta["data"] == "fingerprint"
    assert lines == [] and capfd.readouterr() == ("", "")


def test_only_what_is_asked_for_is_read(good):
    restored = restore(good / "9", {"model": WANTED["model"]})
    assert list(restored.trees) == ["model"]


@pytest.mark.parametrize("item", ["model", "optimizer"])
def test_a_single_flipped_bit_is_noticed(folder, item):
    files = data_files(folder / "9", item)
    assert files
    largest = max(files, key=lambda path: path.stat().st_size)
    content, noticed = largest.read_bytes(), 0
    for place in range(7, len(content), len(content) // 6):
        flipped = bytearray(content)
        flipped[place] ^= 1
        largest.write_bytes(flipped)
        restored, lines = newest(folder)
        assert_is(restored, 9 if not lines else 5)  # some bytes of the file mean nothing
        noticed += len(lines)
        assert all(f"{folder}/9 is damaged" in line and "falling back" in line for line in lines)
    assert noticed >= 3
    assert (folder / "9").is_dir()  # readers change nothing


def test_another_shape_or_name_is_refused_in_one_line(good):
    here = WANTED["optimizer"]["m"].sharding
    m = jax.ShapeDtypeStruct((4, 64), "float32", sharding=here)
    less = {name: leaf for name, leaf in WANTED["model"].items() if name != "half"}
    for wanted, says in (
        ({"model": WANTED["model"] | {"more": m}}, "model.more is missing in the .* and .4, 64."),
        ({"model": less}, "model.half is .7. in the checkpoint and missing in the config's model"),
        ({"optimizer": WANTED["optimizer"] | {"m": m}}, "optimizer.m is .3, 64. in .* and .4, 64."),
    ):
        with pytest.raises(UserError, match=f"9 does not fit its config.json: {says}") as error:
            restore(good / "9", wanted)
        assert "\n" not in str(error.value)


def test_a_flipped_bit_in_the_metadata_is_noticed(folder):
    """No key or value is lost or changed by it, whichever bit it is."""
    path = folder / "9" / "meta" / "metadata"
    content, expected = path.read_bytes(), newest(folder)[0].meta
    outcomes = []
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_json(path.parent)
        except ValueError:
            outcomes.append("refused")
        else:
            outcomes.append("harmless")
            assert expected.items() <= found.items()
    path.write_bytes(content)
    assert outcomes.count("refused") > 0.9 * len(outcomes)


def test_another_mesh_gets_the_same_bits(good):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wanted = dict(WANTED["model"])
    place = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    wanted = abstract({"model": wanted}, NamedSharding(mesh, PartitionSpec()))
    shape = wanted["model"]["a"]["w"]
    wanted["model"]["a"]["w"] = jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)
    found = restore(good / "9", wanted).trees["model"]
    assert found["a"]["w"].sharding == place
    for old, new in zip(jax.tree.leaves(make_trees(9)["model"]), jax.tree.leaves(found)):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
