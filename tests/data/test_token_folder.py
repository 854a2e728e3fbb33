"""Token folders: writing and reading, fingerprints, and detection of every kind of damage."""

import json

import numpy as np
import pytest

from llama_jax.data.token_folder import TokenFolder, TokenWriter, fingerprint
from llama_jax.errors import UserError


def write(
    path, *, vocab_size=53, shard_tokens=20, train=50, validation=7, source="a test", block=14
):
    """Write a token folder whose tokens count up, with documents of seven tokens."""
    path.mkdir(parents=True)
    (path / "tokenizer.model").write_bytes(b"any bytes")
    writer = TokenWriter(path, vocab_size, shard_tokens)
    for split, count in (("train", train), ("validation", validation)):
        for start in range(0, count, block):  # several documents at a time
            size = min(block, count - start)
            tokens = np.arange(start, start + size, dtype=np.int32) % vocab_size
            writer.add(split, tokens, np.arange(0, size, 7), characters=3 * size)
    writer.finish(bos=True, eos=False, source=source)
    return path


def test_round_trip(tmp_path):
    folder = TokenFolder.open(write(tmp_path / "tokens"))
    assert folder.dtype == np.uint16
    assert (folder.vocab_size, folder.bos, folder.eos, folder.source) == (53, True, False, "a test")
    train = folder.splits["train"]
    assert (train.tokens, train.documents, train.characters) == (50, 8, 150)
    assert [shard.tokens for shard in train.shards] == [20, 20, 10]
    assert np.concatenate(folder.arrays("train")).tolist() == list(range(50))
    assert folder.document_starts("train").tolist() == [0, 7, 14, 21, 28, 35, 42, 49]
    assert sorted(file.name for file in folder.path.iterdir()) == [
        "meta.json",
        "tokenizer.model",
        *[f"train-0000{n}.{end}" for n in range(3) for end in ("bin", "documents.npy")],
        "validation-00000.bin",
        "validation-00000.documents.npy",
    ]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_dtype_depends_on_vocabulary_size(tmp_path, vocab_size, dtype):
    folder = TokenFolder.open(write(tmp_path / "tokens", vocab_size=vocab_size))
    assert folder.dtype == dtype
    assert folder.arrays("train")[0].nbytes == 20 * np.dtype(dtype).itemsize


def test_empty_split_has_no_shards(tmp_path):
    folder = TokenFolder.open(write(tmp_path / "tokens", validation=0))
    assert folder.splits["validation"].tokens == 0
    assert folder.arrays("validation") == ()


def test_fingerprint_depends_on_tokens_only(tmp_path):
    prints = [
        TokenFolder.open(write(tmp_path / name, **options)).fingerprint
        for name, options in {
            "a": {},
            "b": {"source": "elsewhere"},
            "c": {"train": 49},
            "d": {"vocab_size": 54},
        }.items()
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def _edit_meta(path, **changes):
    """Change meta.json and update its fingerprint."""
    meta = json.loads((path / "meta.json").read_text()) | changes
    meta["fingerprint"] = fingerprint(meta)
    (path / "meta.json").write_text(json.dumps(meta))


def _set_token(path, position, token):
    array = np.memmap(path / "train-00001.bin", np.uint16, "r+")
    array[position] = token
    array.flush()


DAMAGE = {
    "no meta": (
        lambda p: (p / "meta.json").unlink(),
        r"has no meta.json; create it with: python pre",
    ),
    "meta cut": (lambda p: (p / "meta.json").write_text("{"), r"meta.json is damaged"),
    "meta a list": (lambda p: (p / "meta.json").write_text("[]"), r"meta.json is damaged"),
    "meta binary": (lambda p: (p / "meta.json").write_bytes(b"\xff"), r"meta.json is damaged"),
    "meta edited": (
        lambda p: (p / "meta.json").write_text(
            (p / "meta.json").read_text().replace('"bos": true', '"bos": false')
        ),
        r"meta.json is damaged",
    ),
    "version": (lambda p: _edit_meta(p, version=9), r"'llama_jax tokens' version 9; expected .* 1"),
    "dtype": (lambda p: _edit_meta(p, dtype="uint32"), r"has 40 bytes; expected 20 tokens of 4"),
    "bad dtype": (lambda p: _edit_meta(p, dtype="words"), r"meta.json is damaged"),
    "no splits": (lambda p: _edit_meta(p, splits={}), r"meta.json is damaged"),
    "tokenizer": (lambda p: (p / "tokenizer.model").write_bytes(b"x"), r"not the tokenizer of"),
    "no tokenizer": (lambda p: (p / "tokenizer.model").unlink(), r"tokenizer.model is missing"),
    "no shard": (lambda p: (p / "train-00001.bin").unlink(), r"train-00001.bin is missing"),
    "no starts": (
        lambda p: (p / "train-00001.documents.npy").unlink(),
        r"documents.npy is missing",
    ),
    "starts edited": (
        lambda p: np.save(p / "train-00001.documents.npy", np.array([1, 8, 16], "<u8")),
        r"train-00001.documents.npy has changed since it was written; remove the folder",
    ),
    "odd size": (
        lambda p: (p / "train-00001.bin").write_bytes(b"x" * 39),
        r"train-00001.bin has 39 bytes; expected 20 tokens of 2 bytes",
    ),
    "id too large": (
        lambda p: _set_token(p, 3, 60),
        r"train-00001.bin has id 60 at position 3, but the vocabulary ends at 52",
    ),
    "edited": (lambda p: _set_token(p, 3, 5), r"train-00001.bin has changed since it was written"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("full_check_bytes", [2**20, 0])
def test_damage_is_reported_in_one_line(tmp_path, kind, full_check_bytes):
    path = write(tmp_path / "tokens")
    damage, message = DAMAGE[kind]
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        TokenFolder.open(path, full_check_bytes).document_starts("train")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_flipped_bits_in_document_starts_are_found(tmp_path):
    path = write(tmp_path / "tokens") / "train-00000.documents.npy"
    data = path.read_bytes()
    for position in range(0, len(data), 5):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"documents\.npy has changed since it was written"):
            TokenFolder.open(tmp_path / "tokens")


def test_folder_without_hashes_of_document_starts_is_accepted(tmp_path):
    folder = TokenFolder.open(write(tmp_path / "tokens"))
    meta = json.loads((folder.path / "meta.json").read_text())
    for split in meta["splits"].values():
        for shard in split["shards"]:
            del shard["documents_sha256"]
    assert fingerprint(meta) == folder.fingerprint
    (folder.path / "meta.json").write_text(json.dumps(meta))
    np.testing.assert_array_equal(
        TokenFolder.open(folder.path).document_starts("train"), folder.document_starts("train")
    )


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_missing_folder_message_says_how_to_create_it(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=rf"python prepare.py TEXT --output .*{name}"):
        TokenFolder.open(tmp_path / name)


def test_large_folders_are_checked_at_both_ends(tmp_path):
    path = write(tmp_path / "tokens", shard_tokens=999_999, train=1_999_998, block=7 * 10**5)
    for position in (0, 999_998):
        before = int(np.memmap(path / "train-00001.bin", np.uint16, "r")[position])
        _set_token(path, position, 52 - before)
        with pytest.raises(UserError, match="has changed since it was written"):
            TokenFolder.open(path, full_check_bytes=0)
        _set_token(path, position, before)
        TokenFolder.open(path, full_check_bytes=0)
    _set_token(path, 999_990, 999)
    with pytest.raises(UserError, match="has id 999 at position 999,990"):
        TokenFolder.open(path, full_check_bytes=0)
