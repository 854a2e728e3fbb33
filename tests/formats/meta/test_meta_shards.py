"""Shards that are missing, too many, or of different models."""

import shutil

import numpy as np
import pytest
from meta_folders import refused, rewrite, untied
from tiny_weights import same

from llama_jax.formats.meta import model as meta


def test_a_single_file_of_any_name(folder):
    expected = untied("bfloat16")
    (folder / "consolidated.00.pth").rename(folder / "mine.pth")
    same(meta.read(folder / "mine.pth"), expected)
    same(meta.read(folder), expected)
    (folder / "params.json").rename(folder / "mine.json")
    same(meta.read(folder / "mine.pth"), expected)
    shutil.copy(folder / "mine.pth", folder / "yours.pth")
    refused(folder, "2 .pth files")
    refused(folder / "yours.pth", "params.json is missing")


@pytest.mark.parametrize("lost", [[0], [1], [7], [3, 5], [4, 5, 6, 7]])
def test_missing_shards_are_named(eight, lost):
    for number in lost:
        (eight / f"consolidated.{number:02}.pth").unlink()
    refused(eight, "8 shards", *[f"consolidated.{number:02}.pth" for number in lost], "missing")


def test_one_shard_of_many_is_not_a_model(eight):
    refused(eight / "consolidated.00.pth", "8 shards", "folder")


def test_a_shard_too_many_is_named(folder):
    shutil.copy(folder / "consolidated.00.pth", folder / "consolidated.01.pth")
    refused(folder, "say 1 shards", "consolidated.01.pth is not of them")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.update({"norm.weight": a["norm.weight"][:95]}), "norm.weight"),
        (lambda a: a.update({"layers.1.attention.wk.weight": np.ones((5, 96))}), "wk"),
        (lambda a: a.update({"output.weight": a["output.weight"].astype(np.float16)}), "float16"),
        (lambda a: a.pop("layers.2.ffn_norm.weight"), "missing"),
        (lambda a: a.update({"extra.weight": np.ones(2, np.float32)}), "extra.weight"),
    ],
)
def test_shards_of_different_models_are_refused(eight, change, word):
    rewrite(eight / "consolidated.05.pth", change)
    refused(eight, "consolidated.05.pth", word)


def test_flattened_matrices_are_refused(eight):
    flat = {"layers.1.attention.wo.weight": np.ones(96, np.float32)}
    for path in eight.glob("*.pth"):
        rewrite(path, lambda arrays: arrays.update(flat))
    refused(eight, "layers.1.attention.wo.weight is [96], expected [96, 96]")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.update({"norm.weight": np.ones(25, np.float32)}), "[25], expected [24]"),
        (lambda a: a.update({"norm.weight": np.ones(24, np.float64)}), "float64"),
        (lambda a: a.update({"norm.weight": np.ones((), np.float32)}), "[], expected [24]"),
        (
            lambda a: a.pop("layers.1.attention.wo.weight"),
            "layers.1.attention.wo.weight is missing",
        ),
        (lambda a: a.pop("tok_embeddings.weight"), "tok_embeddings.weight is missing"),
        (lambda a: a.pop("layers.0.attention.wq.weight"), "Meta's own names"),
        (lambda a: a.pop("layers.0.feed_forward.w1.weight"), "w1.weight is missing"),
        (lambda a: a.update({"model.x": np.ones(2, np.float32)}), "model.x is unknown"),
        (lambda a: a.update({"layers.9.x": np.ones(2, np.float32)}), "n_layers=3"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones(24)}), "Meta's own names"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones((0, 24))}), "[0, 24]"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones((9, 24))}), "[9, 24]"),
        (lambda a: a.update({"layers.0.attention.wq.weight": np.ones((8, 24))}), "[8, 24]"),
        (lambda a: a.update({"tok_embeddings.weight": np.ones((0, 24), np.float32)}), "rows"),
        (lambda a: a.update({"tok_embeddings.weight": np.ones((), np.float32)}), "expected [283"),
        (lambda a: a.update({"output.weight": np.ones((9, 24), np.float32)}), "[9, 24], expected"),
        (lambda a: a.clear(), "Meta's own names"),
    ],
)
def test_tensors_that_disagree_with_params_are_refused(folder, change, word):
    rewrite(folder / "consolidated.00.pth", change)
    refused(folder, word)


@pytest.mark.parametrize("content", [b"", b"<html>", b"version https://git-lfs.github.com/"])
def test_files_that_are_no_shards_are_refused(folder, content):
    (folder / "consolidated.00.pth").write_bytes(content)
    refused(folder, "consolidated.00.pth")


def test_folders_without_models_are_refused(tmp_path):
    refused(tmp_path, "no consolidated.00.pth")
    refused(tmp_path / "absent", "does not exist")


@pytest.mark.parametrize("name", ["consolidated.00.pth", "params.json", "tokenizer.model"])
def test_links_that_leave_the_folder_are_refused(folder, tmp_path, name):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    refused(folder, name, "is a link that leaves its folder")
    (tmp_path / "outside").rename(folder / "inside")
    (folder / name).unlink()
    (folder / name).symlink_to("inside")
    same(meta.read(folder), untied("bfloat16"))


def test_links_in_the_hubs_cache_are_followed(folder, tmp_path):
    cache = tmp_path / "models--meta-llama--x"
    original = cache / "snapshots" / "0123abcd" / "original"
    original.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (original / file.name).symlink_to(cache / "blobs" / str(number))
    same(meta.read(original), untied("bfloat16"))
