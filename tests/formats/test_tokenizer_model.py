"""Tokenizer files: kept as they are, made from a tokenizer.bin, and fitted to an embedding."""

import json
import struct

import pytest
from sentencepiece import SentencePieceProcessor
from test_llama2c_tokenizer import PIECES, packed
from tiny_weights import tiny_vocabulary

from llama_jax.errors import UserError
from llama_jax.formats.huggingface.tokenizer_writer import to_tokenizer_json
from llama_jax.formats.llama2c import tokenizer as tokenizer_bin
from llama_jax.formats.tokenizer_files import read_tokenizer_file
from llama_jax.formats.vocabulary import Vocabulary


def refused(path, vocab_size=283):
    with pytest.raises(UserError) as caught:
        read_tokenizer_file(path, vocab_size)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_returned_as_it_is(tmp_path):
    path = tmp_path / "any name"
    path.write_bytes(tiny_vocabulary().to_model())
    assert read_tokenizer_file(path, 283) == path.read_bytes()


def test_a_tokenizer_bin_becomes_a_model(tmp_path):
    path = tmp_path / "any name"
    tokenizer_bin.write(tiny_vocabulary(), path)
    assert Vocabulary.from_model(read_tokenizer_file(path, 283)) == tiny_vocabulary()


def test_a_tokenizer_json_of_llama_2_becomes_a_model(tmp_path):
    path = tmp_path / "any name"
    path.write_text(json.dumps(to_tokenizer_json(tiny_vocabulary(), bos=True)))
    found = Vocabulary.from_model(read_tokenizer_file(path, 283))
    assert [piece.text for piece in found.pieces] == [p.text for p in tiny_vocabulary().pieces]


def test_a_longest_piece_of_ten_bytes_is_no_protobuf(tmp_path):
    (tmp_path / "x").write_bytes(packed([*PIECES, ("x" * 10, -9.0)]))
    assert (tmp_path / "x").read_bytes()[0] == 10  # as all of SentencePiece's begin
    assert len(Vocabulary.from_model(read_tokenizer_file(tmp_path / "x", 265)).pieces) == 265


@pytest.mark.parametrize(("name", "size"), [("tok512", 512), ("tokenizer", 32000)])
def test_real_ones_of_both_kinds_agree(shared_data, name, size):
    model = read_tokenizer_file(shared_data / f"{name}.model", size)
    assert model == (shared_data / f"{name}.model").read_bytes()
    one, other = SentencePieceProcessor(), SentencePieceProcessor()
    one.LoadFromSerializedProto(model)
    other.LoadFromSerializedProto(read_tokenizer_file(shared_data / f"{name}.bin", size))
    text = "One day, Lily met a Shoggoth. 日本 <s>"
    assert one.encode(text) == other.encode(text)
    assert one.vocab_size() == other.vocab_size() == size


@pytest.mark.parametrize("suffix", [".model", ".bin"])
def test_a_size_that_does_not_fit_is_refused(tmp_path, suffix):
    path = tmp_path / f"tokenizer{suffix}"
    if suffix == ".bin":
        tokenizer_bin.write(tiny_vocabulary(), path)
    else:
        path.write_bytes(tiny_vocabulary().to_model())
    for size in (282, 32000, *([284] if suffix == ".bin" else [])):
        assert f"has 283 pieces and the model {size:,} rows for them; give" in refused(path, size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{}", "holds no vocabulary"),
        (b"<html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "only a git-LFS pointer"),
        (tiny_vocabulary().to_model()[:999], "is cut short"),
        (packed(PIECES)[:999], "is cut short"),
        (packed(PIECES[:100]), "has 100 pieces and the model 266 rows"),
        (packed([*PIECES, ("ab", 0.0), ("ab", 0.0)]), "not a SentencePiece model: .*defined"),
        (struct.pack("<i", 0) + bytes(90), "is older than August 2023"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_tokenizer_file(tmp_path / "x", 266)
    refused(tmp_path / "x")


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "x")
    assert "is a folder" in refused(tmp_path)
