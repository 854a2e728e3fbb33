"""Our own checkpoints as a format: what is written is read, here and by `load`."""

import json
import shutil
import weakref
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_weights import SIZES, same, tiny_weights

from llama_jax.checkpoints import load as loading
from llama_jax.checkpoints.metadata import Run, write_run
from llama_jax.checkpoints.save import CheckpointWriter
from llama_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig
from llama_jax.errors import UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.formats.weights import DTYPES, Tensor, of_layer, tensor_shapes
from llama_jax.model.parameters import abstract, named_leaves


def write(weights, path):
    checkpoint_folder.write(weights, path)
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A converted model's folder, not to be changed."""
    return write(tiny_weights("bfloat16"), tmp_path_factory.mktemp("good") / "ckpt")


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "ckpt")


def stacked(weights):
    """The leaves that a run of this model would save."""
    read = {name: tensor.read() for name, tensor in weights.tensors.items()}
    layers = range(weights.config.num_layers)
    return {
        name: read[name] if name in read else np.stack([read[of_layer(name, i)] for i in layers])
        for name in named_leaves(abstract(weights.config))
    }


def train(weights, path, steps=(3, 8)):
    """A run's folder whose newest step has these weights, and the others random ones."""
    path.mkdir()
    data = DataConfig(path="data", batch_size=1, sequence_length=2)
    optimizer = OptimizerConfig(steps=9, learning_rate=1e-3, warmup_steps=0)
    config = Config(model=weights.config, data=data, optimizer=optimizer)
    write_run(path, Run(config=config, bos=weights.bos, eos=False))
    (path / "tokenizer.model").write_bytes(weights.tokenizer)
    writer = CheckpointWriter(path, 9)
    for step in steps:
        leaves = stacked(weights if step == steps[-1] else tiny_weights(seed=step))
        structure = jax.tree.structure(abstract(weights.config))
        arrays = [jax.numpy.asarray(leaf) for leaf in leaves.values()]
        writer.save(step, jax.tree.unflatten(structure, arrays), {"n": np.int32(step)}, {}, 1.0)
    writer.close()
    return path


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_written_is_what_is_read(tmp_path, dtype, tied):
    weights = tiny_weights(dtype, tied_embeddings=tied, rope_theta=5e5)
    done = []
    checkpoint_folder.write(weights, tmp_path / "50 % off", report=done.append)
    read = checkpoint_folder.read(tmp_path / "50 % off")
    same(weights, read)
    assert (read.config, read.tokenizer, read.bos) == (weights.config, weights.tokenizer, True)
    sizes = [tensor.nbytes for tensor in weights.tensors.values()]
    assert len(done) == len(sizes) and done == np.cumsum(np.diff(done, prepend=0)).tolist()
    assert done[-1] == sum(sizes)
    same(weights, checkpoint_folder.read(tmp_path / "50 % off" / "0"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_load_opens_what_is_written(tmp_path, dtype):
    """Orbax takes our files for its own, and the checksums are those it would find."""
    weights = tiny_weights(dtype, tied_embeddings=False)
    loaded = loading.load(write(weights, tmp_path / "ckpt"))
    expected = stacked(weights)
    for name, leaf in named_leaves(loaded.model).items():
        np.testing.assert_array_equal(leaf, expected[name].astype(np.float32))
    assert (loaded.step, loaded.bos) == (0, True)


def test_layers_are_stored_apart_and_written_one_by_one(tmp_path):
    """Each tensor is read once, and none is alive when the next is read."""
    weights, alive, order = tiny_weights(), [], []

    def watched(name, tensor):
        def read():
            assert not alive, f"{alive} is still held when {name} is read"
            order.append(name)
            alive.append(name)
            array = tensor.read().copy()
            weakref.finalize(array, alive.clear)
            return array

        return Tensor(tensor.shape, tensor.dtype, read)

    tensors = {name: watched(name, tensor) for name, tensor in weights.tensors.items()}
    write(type(weights)(**vars(weights) | {"tensors": tensors}), tmp_path / "ckpt")
    assert sorted(order) == sorted(tensor_shapes(weights.config))
    kinds = [name.split(".", 2)[2] for name in order if name.startswith("blocks.")]
    assert kinds == sorted(kinds, key=kinds.index), "kind by kind"


def test_a_runs_checkpoint_is_read_layer_by_layer(tmp_path, monkeypatch):
    weights = tiny_weights()
    read = checkpoint_folder.read(train(weights, tmp_path / "run"))
    reads = count_reads(monkeypatch)
    same(weights, read)
    assert len(reads) == len(weights.tensors)
    other = checkpoint_folder.read(tmp_path / "run" / "3")
    same(tiny_weights(seed=3), other)
    again = write(read, tmp_path / "again")
    same(weights, checkpoint_folder.read(again))


def test_arrays_not_stored_by_layer_are_read_once(tmp_path, monkeypatch):
    """As they were stored by earlier versions."""
    weights = tiny_weights()
    one_piece = orbax.checkpoint.SaveArgs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orbax.checkpoint, "SaveArgs", lambda **_: one_piece)
        train(weights, tmp_path / "run")
    read = checkpoint_folder.read(tmp_path / "run")
    reads = count_reads(monkeypatch)
    kinds = [name for name in tensor_shapes(weights.config) if name.startswith("blocks.")]
    for name in kinds:
        expected = weights.tensors[name].read()
        assert read.tensors[name].read().tobytes() == expected.tobytes()
    assert [name for name, _ in reads] == list(dict.fromkeys(name for name, _ in reads))
    assert len(reads) == len(kinds) / 3
    assert all(others == 0 for _, others in reads), "two are held at once"


def count_reads(monkeypatch):
    """The names of arrays as they are read, each with how many read before are still held."""
    reads, alive, array_class = [], [], checkpoint_folder._StoredArray
    original = array_class._read

    def counted(self, index):
        reads.append((self.name, sum(array() is not None for array in alive)))
        array = original(self, index)
        alive.append(weakref.ref(array))
        return array

    monkeypatch.setattr(array_class, "_read", counted)
    return reads


def test_a_damaged_step_is_skipped(tmp_path, capsys):
    run = train(tiny_weights(), tmp_path / "run")
    shutil.rmtree(run / "8" / "meta")
    same(tiny_weights(seed=3), checkpoint_folder.read(run))
    said = capsys.readouterr().err
    assert said.startswith("warning: checkpoint") and said.count("\n") == 1
    with pytest.raises(UserError, match="8 is damaged"):
        checkpoint_folder.read(run / "8")


def read_all(folder):
    for tensor in checkpoint_folder.read(folder).tensors.values():
        tensor.read()


@pytest.mark.parametrize("source", ["converted", "trained"])
def test_a_flipped_bit_is_detected_when_its_array_is_read(folder, tmp_path, source):
    if source == "trained":
        folder = train(tiny_weights(), tmp_path / "run")
    step = folder / ("0" if source == "converted" else "8") / "model"
    files = sorted(step.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 2] ^= 1
    files[-1].write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: ") as error:
        read_all(folder)
    assert "\n" not in str(error.value)


def data_files(folder):
    return [path for path in (folder / "0" / "model" / "d").iterdir() if path.is_file()]


def cut(folder):
    for path in data_files(folder):
        path.write_bytes(path.read_bytes()[:10])


def link(folder):
    path = data_files(folder)[0]
    path.rename(folder / "moved")
    path.symlink_to(folder / "moved")


def edit_meta(folder, change):
    path = folder / "0" / "meta" / "metadata"
    tree = json.loads(path.read_text())
    change(tree["checksums"]["model"])
    path.write_text(json.dumps(tree))


def edit_config(folder, **changes):
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    tree["model"] |= changes
    path.write_text(json.dumps(tree))


def store_of(folder):
    base = {"driver": "file", "path": f"{folder}/0/model/"}
    return tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()


def zarr(name, **changes):
    """Rewrite what is said of an array's layout."""

    def damage(folder):
        store = store_of(folder)
        tree = json.loads(store[f"{name}/.zarray"]) | changes
        store[f"{name}/.zarray"] = json.dumps(tree)

    return damage


def drop_numbers(folder):
    """What is missing would be zeros, and so would their checksum."""
    del store_of(folder)["embedding/0.0"]
    edit_meta(folder, lambda sums: sums.update(embedding=0))


def claim_much(folder):
    """Some bytes that say they are a thousand million rows."""
    edit_config(folder, vocab_size=10**9)
    zarr("embedding", shape=[10**9, SIZES["dim"]])(folder)


SHAPE = [SIZES["vocab_size"], SIZES["dim"]]
DAMAGE = {
    "its files are cut": cut,
    "a link leads outside": link,
    "the arrays are gone": lambda folder: shutil.rmtree(folder / "0" / "model" / "d"),
    "the store is gone": lambda folder: (folder / "0" / "model" / "manifest.ocdbt").unlink(),
    "a checksum is gone": lambda folder: edit_meta(folder, lambda sums: sums.pop("embedding")),
    "a checksum differs": lambda folder: edit_meta(folder, lambda s: s.update(embedding=1)),
    "a checksum is a text": lambda folder: edit_meta(folder, lambda s: s.update(embedding="1")),
    "the config has more layers": lambda folder: edit_config(folder, num_layers=4),
    "the config is untied": lambda folder: edit_config(folder, tied_embeddings=False),
    "the config is absurd": lambda folder: edit_config(folder, num_layers=10**12),
    "the vocabulary is absurd": lambda folder: edit_config(folder, vocab_size=10**30),
    "an array is of integers": zarr("embedding", dtype="<i4"),
    "an array has another shape": zarr("embedding", shape=SHAPE[::-1]),
    "an array's parts are larger than it": zarr("embedding", chunks=[10**6, 10**6]),
    "an array's parts have another size": zarr("embedding", chunks=[1, 1]),
    "an array's numbers are missing": drop_numbers,
    "an array is larger than all files": claim_much,
    "an array is of doubles": zarr("norm.scale", dtype="<f8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_in_one_line(folder, damage, capsys):
    DAMAGE[damage](folder)
    with pytest.raises(UserError) as error:
        read_all(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert capsys.readouterr().err.count("\n") <= 1


def test_large_arrays_in_small_files_are_refused_before_anything_is_read(folder):
    claim_much(folder)
    with pytest.raises(UserError, match="which cannot hold the 24,"):
        checkpoint_folder.read(folder)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_mutated_files_give_an_error_or_the_right_tensors(good, tmp_path_factory, data):
    folder = shutil.copytree(good, tmp_path_factory.mktemp("mutated") / "ckpt")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([Path(file).relative_to(folder) for file in files]))
    content = bytearray((folder / path).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] = data.draw(st.integers(0, 255))
    else:
        del content[place:]
    (folder / path).write_bytes(content)
    try:
        weights = checkpoint_folder.read(folder)
        read = {name: tensor.read() for name, tensor in weights.tensors.items()}
    except UserError as error:
        assert "\n" not in str(error)
    else:
        expected = tiny_weights("bfloat16")
        assert all(read[name].tobytes() == expected.tensors[name].read().tobytes() for name in read)
    shutil.rmtree(folder)


def test_layers_of_different_dtypes_become_float32(tmp_path):
    weights, half = tiny_weights(), tiny_weights("float16")
    name = "blocks.1.ffn.up.kernel"
    tensors = dict(weights.tensors) | {name: half.tensors[name]}
    mixed = type(weights)(**vars(weights) | {"tensors": tensors})
    read = checkpoint_folder.read(write(mixed, tmp_path / "ckpt"))
    assert {tensor.dtype for tensor in read.tensors.values()} == {np.dtype(np.float32)}
    expected = half.tensors[name].read().astype(np.float32)
    np.testing.assert_array_equal(read.tensors[name].read(), expected)


def test_a_model_without_a_tokenizer_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        write(tiny_weights(tokenizer=b""), tmp_path / "ckpt")
    assert not list(tmp_path.iterdir())


def test_a_folder_without_steps_is_named(folder):
    shutil.rmtree(folder / "0")
    with pytest.raises(UserError, match="has no finished checkpoint"):
        checkpoint_folder.read(folder)


def test_a_config_may_use_every_default(tmp_path):
    config = ModelConfig(**SIZES | {"hidden_dim": 0, "multiple_of": 8})
    weights = tiny_weights(hidden_dim=0, multiple_of=8)
    assert checkpoint_folder.read(write(weights, tmp_path / "ckpt")).config == config
