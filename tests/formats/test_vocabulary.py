"""Vocabularies from SentencePiece models and back, checked by SentencePiece itself."""

import dataclasses

import pytest
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tiny_weights import tiny_vocabulary

from llama_jax.errors import UserError
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary

TEXTS = ["", " ", "abc", "  ab  c ", "cab abc", "日 <s> ab\n\n\tb", "<unk></s>", "12 b3"]


def encoder(model):
    """What SentencePiece makes of texts with a model."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor.encode


def test_pieces_survive_a_model():
    vocabulary = tiny_vocabulary()
    assert Vocabulary.from_model(vocabulary.to_model()) == vocabulary


def test_everything_else_survives_a_model():
    extra = (Piece("<pad>", 0.0, Kind.CONTROL), Piece("ü!", -0.5, Kind.USER_DEFINED))
    pieces = (*tiny_vocabulary().pieces[::-1], *extra, Piece("gone", -9.0, Kind.UNUSED))
    count = len(pieces) - 3
    vocabulary = Vocabulary(
        pieces=pieces,
        unknown_id=count - 1,
        bos_id=count - 2,
        eos_id=count - 3,
        pad_id=count,
        adds_space=False,
        joins_spaces=True,
    )
    model = vocabulary.to_model()
    assert Vocabulary.from_model(model) == vocabulary
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id(), processor.pad_id())
    assert ids == (count - 1, count - 2, count - 3, count)
    assert processor.encode(" a  b ", out_type=str) == ["a", "▁b"]
    assert count + 1 in processor.encode("bü!a")


def test_a_model_of_these_pieces_encodes_by_their_scores():
    encode = encoder(tiny_vocabulary().to_model())
    vocabulary = tiny_vocabulary()
    assert [vocabulary.pieces[token].text for token in encode("abc d")] == ["▁ab", "c", "▁", "d"]
    ids = {piece.text: token for token, piece in enumerate(vocabulary.pieces)}
    assert encode("é") == [ids["▁"], *(3 + byte for byte in "é".encode())]


def test_the_same_pieces_make_the_same_bytes():
    assert tiny_vocabulary().to_model() == tiny_vocabulary().to_model()


@pytest.mark.parametrize("name", ["tok512.model", "tokenizer.model"])
def test_a_real_tokenizer_encodes_the_same_afterwards(shared_data, name):
    model = (shared_data / name).read_bytes()
    vocabulary = Vocabulary.from_model(model)
    before, after = encoder(model), encoder(vocabulary.to_model())
    texts = (shared_data / "llama-spm.inp").read_text().split("\n__ggml_vocab_test__\n")
    assert len(texts) == 47
    for text in (*texts, *TEXTS, "a" * 999):
        assert before(text) == after(text), text
    assert Vocabulary.from_model(vocabulary.to_model()) == vocabulary


def test_spaces_are_joined_only_where_they_were(shared_data):
    joins = {
        name: Vocabulary.from_model((shared_data / name).read_bytes()).joins_spaces
        for name in ("tok512.model", "tokenizer.model")
    }
    assert joins == {"tok512.model": True, "tokenizer.model": False}


@pytest.mark.parametrize("garbage", [b"\xff\xff", b"no model", b"\x0a\x05abc"])
def test_other_data_than_a_model_is_refused(garbage):
    with pytest.raises(UserError, match="is not a SentencePiece model") as caught:
        Vocabulary.from_model(garbage)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_algorithm_is_refused():
    proto = ModelProto()
    proto.ParseFromString(tiny_vocabulary().to_model())
    proto.trainer_spec.model_type = proto.trainer_spec.UNIGRAM
    with pytest.raises(UserError, match="not BPE"):
        Vocabulary.from_model(proto.SerializeToString())


def test_a_vocabulary_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_vocabulary().bos_id = 5
