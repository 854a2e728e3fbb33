import json
import os

import numpy as np
import pytest

from llama_jax.errors import UserError
from llama_jax.formats.huggingface import safetensors as safetensors_file
from llama_jax.formats.huggingface.safetensors import INDEX, read_folder, write_folder
from llama_jax.formats.torch.writer import Writer
from llama_jax.formats.weights import Tensor, find_file


def tensors(*names):
    """A distinct tensor of 12 bytes for each name."""
    arrays = {name: np.arange(3, dtype=np.float32) + ord(name[0]) for name in names}
    return {n: Tensor(a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()}


def put(folder, shards, places=...):
    """A folder of shards by number, and an index: `places`, or what the shards hold."""
    folder.mkdir(exist_ok=True)
    for number, names in shards.items():
        safetensors_file.write(folder / f"model-{number}.safetensors", tensors(*names))
    if places is ...:
        places = {name: f"model-{n}.safetensors" for n, names in shards.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def put_torch(path, *names):
    """A file as torch.save writes it."""
    lazy = tensors(*names)
    with Writer(
        path, {name: (tensor.shape, tensor.dtype) for name, tensor in lazy.items()}
    ) as file:
        for tensor in lazy.values():
            file.add(tensor.read())


def refused(folder, reason):
    with pytest.raises(UserError, match=reason) as caught:
        read_folder(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_one_file_or_shards_hold_the_same(tmp_path):
    write_folder(tmp_path, tensors("a", "b", "c"), 36, lambda done: None)
    (tmp_path / "sharded").mkdir()
    done = []
    write_folder(tmp_path / "sharded", tensors("a", "b", "c"), 35, done.append)
    assert done == [12, 24, 36]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.safetensors", "sharded"]
    index = json.loads((tmp_path / "sharded" / INDEX).read_text())
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    assert index["weight_map"] == {"a": first, "b": first, "c": second}
    assert index["metadata"] == {"total_size": 36}
    assert len(list((tmp_path / "sharded").iterdir())) == 3
    for folder in (tmp_path, tmp_path / "sharded"):
        found = read_folder(folder)
        assert sorted(found) == ["a", "b", "c"]
        assert found["c"].read().tolist() == [99, 100, 101]


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    write_folder(tmp_path, tensors("a", "b"), 1, lambda done: None)
    assert len(read_folder(tmp_path)) == len(list(tmp_path.glob("*.safetensors"))) == 2


def test_tensors_missing_in_the_index_are_read_too(tmp_path):
    put(tmp_path, {1: "ab", 2: "c"}, {"a": "model-1.safetensors", "c": "model-2.safetensors"})
    assert sorted(read_folder(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name",
    [
        "../other/model-1.safetensors",
        "/etc/passwd",
        "sub/model-1.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "a\n.safetensors",
        "a\\b.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
        "config.json",
        "model-1.safetensors.py",
        "model-1.safetensors/../../other/model-1.safetensors",
        None,
        3,
        ["model-1.safetensors"],
    ],
)
def test_an_index_with_paths_is_refused(name, tmp_path):
    put(tmp_path / "other", {1: "a"})
    put(tmp_path / "model", {1: "a"}, {"a": name})
    (tmp_path / "model" / "sub").mkdir()
    safetensors_file.write(tmp_path / "model" / "sub" / "model-1.safetensors", tensors("a"))
    refused(tmp_path / "model", "expected the bare name of a .safetensors file")


@pytest.mark.parametrize("places", [None, [], {}, "a", ["a"]])
def test_an_index_without_a_map_is_refused(places, tmp_path):
    refused(put(tmp_path / "model", {1: "a"}, places), "weight_map is ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected a JSON object"),
        ("", "empty"),
        ("<html>", "web page"),
    ],
)
def test_an_index_that_is_no_object_is_refused(text, reason, tmp_path):
    put(tmp_path / "model", {1: "a"})
    (tmp_path / "model" / INDEX).write_text(text)
    refused(tmp_path / "model", reason)


def test_a_missing_shard_is_named(tmp_path):
    folder = put(tmp_path / "model", {1: "a", 2: "b", 3: "c"})
    (folder / "model-2.safetensors").unlink()
    refused(folder, r"lacks 'model-2.safetensors' of the 3 shards")


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    places = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    refused(put(tmp_path / "model", {1: "a", 2: "bc"}, places), r"model-1.safetensors lacks 'b'")


def test_a_tensor_in_two_shards_is_named(tmp_path):
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    refused(put(tmp_path / "model", {1: "a", 2: "ab"}, places), "both hold 'a'")


def test_an_index_of_very_many_shards_is_refused(tmp_path):
    places = {str(number): f"{number}.safetensors" for number in range(10_001)}
    refused(put(tmp_path / "model", {1: "a"}, places), "names 10,001 files")


def test_files_of_torch_are_read_where_there_is_no_safetensors(tmp_path):
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")
    put_torch(tmp_path / "pytorch_model.bin", *"ab")
    assert sorted(read_folder(tmp_path)) == ["a", "b"]
    safetensors_file.write(tmp_path / "model.safetensors", tensors("c"))
    assert sorted(read_folder(tmp_path)) == ["c"]


def test_shards_of_torch_have_an_index_too(tmp_path):
    places = {}
    for number, names in {1: "ab", 2: "c"}.items():
        name = f"pytorch_model-{number:05}-of-00002.bin"
        put_torch(tmp_path / name, *names)
        places |= dict.fromkeys(names, name)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert sorted(read_folder(tmp_path)) == ["a", "b", "c"]
    index.write_text(json.dumps({"weight_map": places | {"c": "model.safetensors"}}))
    refused(tmp_path, "expected the bare name of a .bin file")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside.safetensors"
    safetensors_file.write(outside, tensors("a"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(outside)
    refused(folder, "is a link that leaves its folder")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "nothing")
    refused(folder, "is not a file")


def test_a_link_within_the_folder_and_a_linked_folder_are_fine(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors_file.write(folder / "real.safetensors", tensors("a"))
    (folder / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "alias").symlink_to(folder)
    assert list(read_folder(tmp_path / "alias")) == ["a"]


def cache(root, model="models--x--y"):
    """A model as huggingface_hub keeps it: links from a snapshot into blobs."""
    blobs, snapshot = root / model / "blobs", root / model / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    safetensors_file.write(blobs / "feed", tensors("a"))
    (snapshot / "model.safetensors").symlink_to("../../blobs/feed")
    return snapshot


def test_links_in_the_hubs_cache_are_followed(tmp_path):
    assert list(read_folder(cache(tmp_path))) == ["a"]


def test_links_to_other_blobs_are_refused(tmp_path):
    snapshot = cache(tmp_path)
    other = cache(tmp_path, "models--x--z")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other / "model.safetensors")
    refused(snapshot, "leaves its folder")
    (snapshot / "model.safetensors").unlink()
    safetensors_file.write(snapshot.parent.parent / "refs", tensors("a"))
    (snapshot / "model.safetensors").symlink_to("../../refs")
    refused(snapshot, "leaves its folder")
    refused(cache(tmp_path, "somewhere"), "leaves its folder")


def test_folders_and_pipes_are_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "is not a file")
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="is not a file"):
        find_file(tmp_path, "config.json")
    assert find_file(tmp_path, "tokenizer.model") is None
