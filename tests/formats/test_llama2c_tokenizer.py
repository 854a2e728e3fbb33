"""llama2.c's tokenizer.bin: real files to the byte, damaged ones refused."""

import dataclasses
import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from sentencepiece import SentencePieceProcessor
from tiny_weights import tiny_vocabulary

from llama_jax.errors import UserError
from llama_jax.formats.llama2c.tokenizer import read, write
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary


def packed(pieces, longest=None):
    """A file of texts and scores."""
    encoded = [(text.encode() if isinstance(text, str) else text, score) for text, score in pieces]
    longest = max(len(text) for text, _ in encoded) if longest is None else longest
    body = (struct.pack("<fi", score, len(text)) + text for text, score in encoded)
    return struct.pack("<i", longest) + b"".join(body)


PIECES = [("<unk>", 0.0), ("\n<s>\n", 0.0), ("\n</s>\n", 0.0)]
PIECES += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
PIECES += [(" ab", -0.0), (" ", -1e9), ("日", -2.5), ("<s>x", -3.0), ("\n", -4.0)]


@pytest.fixture
def place(tmp_path):
    """A function that puts bytes into a file."""

    def put(content):
        (tmp_path / "tokenizer.bin").write_bytes(content)
        return tmp_path / "tokenizer.bin"

    return put


def refused(path):
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_made_by_hand_is_read_and_rewritten(place):
    path = place(packed(PIECES))
    vocabulary = read(path)
    assert vocabulary.pieces[:3] == (
        Piece("<unk>", 0.0, Kind.UNKNOWN),
        Piece("<s>", 0.0, Kind.CONTROL),
        Piece("</s>", 0.0, Kind.CONTROL),
    )
    assert vocabulary.pieces[3 + 10] == Piece("<0x0A>", 0.0, Kind.BYTE)
    assert vocabulary.pieces[259:] == (
        Piece("▁ab", -0.0),
        Piece("▁", -1e9),
        Piece("日", -2.5),
        Piece("<s>x", -3.0),
        Piece("\n", -4.0),
    )
    ids = (vocabulary.unknown_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id)
    assert (ids, vocabulary.adds_space, vocabulary.joins_spaces) == ((0, 1, 2, -1), True, False)
    write(vocabulary, path.with_name("again.bin"))
    assert path.with_name("again.bin").read_bytes() == packed(PIECES)


@pytest.mark.parametrize("name", ["tok512", "tokenizer"])
def test_a_real_file_is_made_of_its_model(shared_data, tmp_path, name):
    vocabulary = Vocabulary.from_model((shared_data / f"{name}.model").read_bytes())
    write(vocabulary, tmp_path / "made.bin")
    assert (tmp_path / "made.bin").read_bytes() == (shared_data / f"{name}.bin").read_bytes()
    assert read(tmp_path / "made.bin").pieces == vocabulary.pieces


@pytest.mark.parametrize("name", ["tok512", "tokenizer"])
def test_a_real_file_encodes_as_its_model_does(shared_data, name):
    original, ours = SentencePieceProcessor(), SentencePieceProcessor()
    original.LoadFromFile(str(shared_data / f"{name}.model"))
    ours.LoadFromSerializedProto(read(shared_data / f"{name}.bin").to_model())
    texts = (shared_data / "llama-spm.inp").read_text().split("\n__ggml_vocab_test__\n")
    lines = (shared_data / "llama-spm.out").read_text().split("\n")
    assert len(texts) == 47
    for text, line in zip(texts, lines):
        ids = ours.encode(text)
        if name == "tokenizer":
            assert ids == original.encode(text) == [int(token) for token in line.split()], text
        else:  # its model drops superfluous spaces, which llama2.c never does
            assert ids == original.encode(text) or text.split(" ") != text.split(), text
        assert ours.decode(ids) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\5", "is no tokenizer.bin"),
        (struct.pack("<i", -5) + packed(PIECES)[4:], "is no tokenizer.bin"),
        (struct.pack("<i", 2**31 - 1) + packed(PIECES)[4:], "is no tokenizer.bin"),
        (packed(PIECES)[4:], "is older than August 2023"),
        (packed(PIECES, longest=5), "piece 2 has 6 bytes .* expected 1 to 5"),
        (packed(PIECES[:2]), "does not begin with <unk>, <s>, </s>"),
        (packed(PIECES[1:]), "does not begin with <unk>, <s>, </s>"),
        (packed([*PIECES, (b"\xff\xfe", 0.0)]), "piece 264 is not UTF-8"),
        (packed([*PIECES, ("", 0.0)]), "piece 264 has 0 bytes"),
        (packed([*PIECES, ("x", float("nan"))]), "piece 264 has 1 bytes and a score of nan"),
        (packed([*PIECES, ("x", float("-inf"))]), "a score of -inf"),
        (packed(PIECES) + struct.pack("<fi", 0.0, -1), "piece 264 has -1 bytes"),
        (packed(PIECES) + struct.pack("<fi", 0.0, 2**31 - 1), "piece 264 has 2147483647 bytes"),
        (packed(PIECES) + struct.pack("<fi", 0.0, 3) + b"ab", "cut short within piece 264"),
        (packed(PIECES) + b"\0" * 7, "cut short within piece 264"),
        (b"version https://git-lfs.github.com/spec/v1\n", "only a git-LFS pointer"),
        (b"<html>", "is a web page"),
    ],
)
def test_a_damaged_file_is_refused(place, content, message):
    path = place(content)
    with pytest.raises(UserError, match=message):
        read(path)
    refused(path)


def test_a_huge_file_is_not_read(tmp_path):
    with (tmp_path / "x.bin").open("wb") as file:
        file.truncate(2**40)
    assert "has 1,099,511,627,776 bytes" in refused(tmp_path / "x.bin")


def test_missing_files_and_folders_are_refused(tmp_path):
    assert "does not exist" in refused(tmp_path / "x.bin")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"unknown_id": 1, "bos_id": 0},
        {"bos_id": 2, "eos_id": 1},
        {"eos_id": 259},
        {"pieces": tiny_vocabulary().pieces[:200]},
        {"pieces": (*tiny_vocabulary().pieces[:3], *tiny_vocabulary().pieces[4:])},
        {"bos_id": -1},
        {"adds_space": False},
    ],
)
def test_a_vocabulary_that_llama2c_would_misread_is_refused(tmp_path, changes):
    vocabulary = dataclasses.replace(tiny_vocabulary(), **changes)
    with pytest.raises(UserError, match=r"llama2\.c cannot use this tokenizer"):
        write(vocabulary, tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_llama2c_encodes_otherwise_is_written_with_a_warning(tmp_path, capsys):
    write(tiny_vocabulary(), tmp_path / "x.bin")
    assert capsys.readouterr().err == ""
    pieces = (*tiny_vocabulary().pieces, Piece("<tool>", 0.0, Kind.USER_DEFINED))
    write(dataclasses.replace(tiny_vocabulary(), joins_spaces=True, pieces=pieces), tmp_path / "y")
    assert "spaces are joined, '<tool>' is always one piece; some ids" in capsys.readouterr().err


@settings(max_examples=60, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, 3800), st.integers(0, 255)), max_size=4),
    length=st.none() | st.integers(0, 3800),
)
def test_a_changed_file_is_refused_or_read_right(tmp_path_factory, flips, length):
    path = tmp_path_factory.mktemp("changed") / "x.bin"
    changed = bytearray(packed(PIECES))
    for place, byte in flips:
        changed[place % len(changed)] = byte
    path.write_bytes(bytes(changed[:length]))
    try:
        vocabulary = read(path)
    except UserError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
        return
    assert [piece.kind for piece in vocabulary.pieces[:3]] == [2, 3, 3]
    assert sum(len(piece.text.encode()) for piece in vocabulary.pieces) < 2 * len(changed)
