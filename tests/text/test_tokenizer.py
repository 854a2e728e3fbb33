"""Tokenizer: recorded ids, agreement with SentencePiece, damaged files, and training."""

import re

import hypothesis.strategies as st
import pytest
import sentencepiece
from hypothesis import given, settings

from llama_jax.errors import UserError
from llama_jax.text.sentencepiece import MODEL_TYPES, train_tokenizer
from llama_jax.text.tokenizer import load_tokenizer

TEXTS = [
    "Once upon a time there was a small boat. The boat had a red sail.\nIt was happy.",
    "One day, Lily and Tom found 12 shiny stones near the river; they shared them!",
    "  indented   text\twith a tab, an é and a 日本",
] * 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(TEXTS, 330, tmp_path_factory.mktemp("trained") / "tokenizer.model")


@pytest.fixture(scope="module", params=["trained", "tok512.model", "tokenizer.model"])
def tokenizer(request, trained):
    if request.param == "trained":
        return trained
    return load_tokenizer(request.getfixturevalue("shared_data") / request.param)


@pytest.fixture(scope="module")
def llama2(shared_data):
    return load_tokenizer(shared_data / "tokenizer.model")


def test_ids_are_the_recorded_ones(llama2, shared_data):
    texts = (shared_data / "llama-spm.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = (shared_data / "llama-spm.out").read_text().split("\n")
    assert len(texts) == 47
    for text, line in zip(texts, lines):
        ids = [int(word) for word in line.split()]
        assert llama2.encode(text, bos=False, eos=False) == ids, text


def test_llama2_ids_are_the_documented_ones(llama2):
    vectors = {
        "": [],
        "Hello world": [15043, 3186],
        " Hello": [29871, 15043],
        "  two  spaces": [259, 1023, 29871, 8162],
        "\n": [29871, 13],
        "日本": [29871, 30325, 30346],
        "🙂": [29871, 243, 162, 156, 133],
        "<s>": [529, 29879, 29958],
    }
    assert {text: llama2.encode(text, bos=False, eos=False) for text in vectors} == vectors
    assert llama2.encode("Hello", bos=True, eos=True) == [1, 15043, 2]
    assert llama2.vocab_size == 32000
    assert llama2.sha256.startswith("9e556afd")


@pytest.mark.parametrize(
    "text", ["<s>", "</s>", "<unk>", "<s>x</s>", "<0x0A>", "[INST] </s>", "\0"]
)
def test_text_never_becomes_a_control_id(tokenizer, text):
    ids = tokenizer.encode(text, bos=False, eos=False)
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == text


@given(text=st.text(max_size=60))
def test_decoding_inverts_encoding(trained, text):
    text = text.replace("▁", "_")  # which means a space to SentencePiece
    ids = trained.encode(text, bos=True, eos=True)
    assert trained.decode(ids) == text
    assert all(0 <= token < trained.vocab_size for token in ids)


@pytest.fixture(scope="module")
def processor(trained):
    return sentencepiece.SentencePieceProcessor(model_file=str(trained.path))


@settings(max_examples=200)
@given(data=st.data())
def test_decoding_agrees_with_sentencepiece(trained, processor, data):
    ids = data.draw(st.lists(st.integers(0, 329), max_size=12))
    assert trained.decode(ids) == processor.decode(ids)


@settings(max_examples=200)
@given(text=st.text(max_size=30), noise=st.lists(st.integers(0, 329), max_size=9), data=st.data())
def test_decoded_text_does_not_depend_on_the_pieces(trained, text, noise, data):
    ids = noise + trained.encode(text, bos=True, eos=False)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    decoder, pieces = trained.decoder(), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)]):
        pieces.append(decoder.push(ids[start:end]))
    pieces.append(decoder.flush())
    assert "".join(pieces) == trained.decode(ids)


def test_incomplete_character_is_held_back(tokenizer):
    first, *middle, last = tokenizer.encode("🙂", bos=False, eos=False)[-4:]
    decoder = tokenizer.decoder()
    assert decoder.push([first, *middle]) == ""
    assert decoder.push([last]) == "🙂"
    assert decoder.flush() == ""
    assert decoder.push([first]) == ""
    assert decoder.flush() == "\ufffd"


def test_completion_keeps_the_space_after_the_prompt(tokenizer):
    ids = tokenizer.encode("the boat was red", bos=True, eos=False)
    for end in range(len(ids)):
        prompt, completion = ids[:end], ids[end:]
        decoder = tokenizer.decoder(after=prompt)
        text = tokenizer.decode(prompt) + decoder.push(completion) + decoder.flush()
        assert text == "the boat was red"


def test_continuing_text_has_the_ids_of_the_complete_text(tokenizer):
    whole = tokenizer.encode_array("the boat, was\nred and small")
    first = tokenizer.encode_array("the boat, was\nred")
    rest = tokenizer.encode_array(" and small", continues=True)
    assert whole.tolist() == [*first, *rest]


@pytest.mark.parametrize("token", [-1, 330, 10**9])
def test_decoding_an_id_outside_the_vocabulary_is_an_error(trained, token):
    with pytest.raises(UserError, match=rf"token id {token} is outside the vocabulary of 330"):
        trained.decode([5, token])


def test_error_of_a_lone_surrogate_has_the_position(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate, U\+D800, at character 3"):
        tokenizer.encode("abc\ud800", bos=True, eos=False)


@pytest.mark.parametrize("text", ["word " * 200_000, "a" * 10**6, "日本🙂" * 300_000])
def test_million_characters_are_encoded(trained, text):
    ids = trained.encode(text, bos=False, eos=False)
    assert text.startswith(trained.decoder().push(ids[:1000]))


def _bad_files():
    return {
        "empty": (b"", "is empty"),
        "garbage": (bytes(range(200, 256)) * 9, "is not a SentencePiece model"),
        "text": (b"Once upon a time", "is not a SentencePiece model"),
        "html": (b"\n<!DOCTYPE html><html>", "is a web page"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
    }


@pytest.mark.parametrize("kind", _bad_files())
def test_error_of_a_file_that_is_not_a_model_is_one_line(tmp_path, kind):
    content, message = _bad_files()[kind]
    path = tmp_path / f"{kind}.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["missing.model", "."])
def test_missing_model_is_an_error(tmp_path, path):
    with pytest.raises(UserError, match=r"does not exist|is a folder"):
        load_tokenizer(tmp_path / path)


def test_truncated_model_is_an_error(trained, tmp_path):
    model = trained.path.read_bytes()
    path = tmp_path / "cut.model"
    for size in (*range(1, len(model), 37), *range(len(model) - 80, len(model))):
        path.write_bytes(model[:size])
        with pytest.raises(UserError, match=r"cut short|not a SentencePiece model"):
            load_tokenizer(path)


def test_training_is_reproducible_and_newlines_are_bytes(trained, tmp_path):
    again = train_tokenizer(iter(TEXTS), 330, tmp_path / "again.model")
    assert again.sha256 == trained.sha256
    assert again.vocab_size == 330
    assert not any("\n" in again.decode([token]) for token in range(259, 330))


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_each_kind_of_model_restores_texts_and_loads_by_its_file(kind, tmp_path):
    texts = ["The  boat sails home.\tIt has 12 sails.\n\n", "naïve ☃ 👍"]
    train_tokenizer(TEXTS, 310, tmp_path / "named.model", kind)
    tokenizer = load_tokenizer(tmp_path / "named.model")
    for text in texts:
        ids = tokenizer.encode(text, bos=False, eos=False)
        assert tokenizer.decode(ids) == text
        decoder = tokenizer.decoder()
        assert "".join(decoder.push([token]) for token in ids) + decoder.flush() == text
    letters = len(tokenizer.encode("boat", bos=False, eos=False))
    assert letters == 5 if kind == "char" else letters < 5
    assert kind == "char" or tokenizer.vocab_size == 310


def test_ctrl_c_while_a_text_is_read_for_training_is_no_error_of_the_trainer(tmp_path):
    def texts():
        yield "once upon a time"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(texts(), 300, tmp_path / "tokenizer.model")
    assert not any(tmp_path.iterdir())


def test_training_prints_nothing_and_writes_only_the_model(tmp_path, capfd):
    train_tokenizer(TEXTS, 330, tmp_path / "silent.model")
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["silent.model"]


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (TEXTS, 100_000, r"vocab_size=100000 is too large.*use a vocab_size of \d+ or less"),
        (TEXTS, 260, r"vocab_size=260 is too small.*use a vocab_size of \d+ or more"),
        (TEXTS, 0, "vocab_size=0 is out of range"),
        (TEXTS, -5, "vocab_size=-5 is out of range"),
        ([], 300, "no text to train a tokenizer on"),
        (["", "\n\n"], 300, "no text to train a tokenizer on"),
    ],
)
def test_training_error_has_the_vocabulary_size_that_works(tmp_path, texts, vocab_size, message):
    with pytest.raises(UserError, match=message):
        train_tokenizer(texts, vocab_size, tmp_path / "x.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab_size", [100_000, 260])
def test_vocabulary_size_in_a_training_error_works(tmp_path, vocab_size):
    with pytest.raises(UserError) as caught:
        train_tokenizer(TEXTS, vocab_size, tmp_path / "x.model")
    named = int(re.findall(r"vocab_size of (\d+)", str(caught.value))[0])
    assert train_tokenizer(TEXTS, named, tmp_path / "x.model").vocab_size == named


def test_error_of_the_texts_is_raised(tmp_path):
    def texts():
        yield "some text"
        raise UserError("the source is damaged")

    with pytest.raises(UserError, match="the source is damaged"):
        train_tokenizer(texts(), 300, tmp_path / "x.model")


def test_training_uses_lines_longer_than_the_trainer_accepts(tmp_path):
    tokenizer = train_tokenizer(["abcdef " * 20_000], 268, tmp_path / "long.model")
    assert len(tokenizer.encode("abcdef", bos=False, eos=False)) < 6
