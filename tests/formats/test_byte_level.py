"""Byte-level vocabularies: from and to GGUF and Llama 3's ranks files, padded, in every format."""

import base64
import json

import numpy as np
import pytest
import tokenizers
from tiny_tokenizer import ROWS, SPECIAL, TEXTS, keys_of, library_of
from tiny_weights import tiny_weights

from llama_jax.checkpoints.load import load
from llama_jax.errors import UserError
from llama_jax.formats import byte_level
from llama_jax.formats.byte_level import PRE_TOKENIZERS
from llama_jax.formats.convert import Conversion, convert
from llama_jax.formats.gguf import vocabulary as gguf_vocabulary
from llama_jax.formats.gguf.vocabulary import read_tokenizer, tokenizer_keys
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.meta import ranks
from llama_jax.formats.tokenizer_files import read_tokenizer_file
from llama_jax.text.tokenizer import parse_tokenizer


@pytest.fixture(scope="module")
def library():
    return library_of("smollm")


@pytest.fixture(scope="module")
def content(library):
    return read_tokenizer(keys_of(library, "smollm"))


@pytest.mark.parametrize("name", ["llama-bpe", "smollm", "gpt-2", "default", "qwen2", "tekken"])
def test_vocabularies_with_these_pre_tokenizers_go_there_and_back(name):
    library = library_of(name)
    keys = keys_of(library, name)
    content = read_tokenizer(keys)
    tokenizer = parse_tokenizer(content, "tokenizer.json")
    library.encode_special_tokens = True
    for text in TEXTS:
        assert tokenizer.encode(text) == library.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert gguf_vocabulary.adds_bos(keys) == (name in ("llama-bpe", "tekken"))
    back = tokenizer_keys(content, bos=False)
    for key, value in keys.values.items():
        np.testing.assert_array_equal(back[key], value)


def test_every_name_is_written_as_one_that_splits_alike(library):
    for name, pre in PRE_TOKENIZERS.items():
        content = read_tokenizer(keys_of(library, name))
        written = tokenizer_keys(content, bos=True)["tokenizer.ggml.pre"]
        assert PRE_TOKENIZERS[written] == pre or name in ("chatglm-bpe", "glm4")
        found = byte_level.patterns(json.loads(content)["pre_tokenizer"])
        assert found == pre.patterns
        parse_tokenizer(content, "tokenizer.json").encode(TEXTS[0])


def test_words_are_split_as_their_names_say(library):
    def words(name, text):
        content = read_tokenizer(keys_of(library, name, merges=[]))
        made = tokenizers.Tokenizer.from_str(content.decode()).pre_tokenizer
        return [text[slice(*place)] for _, place in made.pre_tokenize_str(text)]

    text = "It'S  x12345\n\n a"
    assert words("llama-bpe", text) == ["It", "'S", " ", " x", "123", "45", "\n\n", " a"]
    assert words("qwen2", text) == ["It", "'S", " ", " x", *"12345", "\n\n", " a"]
    assert words("gpt-2", text) == ["It", "'", "S", " ", " x", "12345", "\n\n", " a"]
    assert words("smollm", text) == ["It", "'", "S", " ", " x", *"12345", "\n\n", " a"]
    assert words("default", text) == ["It", "'", "S", " ", " x", "123", "45", "\n\n", " a"]
    assert words("tekken", "HTTPServer a/b")[:2] == ["HTTPServer", " a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "smolm"}, "unknown pre-tokenizer, 'smolm'; expected one of .* 'smollm'"),
        ({"model": "t5"}, "kind 't5'; expected 'llama'"),
        ({"merges": None}, "has no key tokenizer.ggml.merges"),
        ({"merges": ["a nothing"]}, "'a nothing' in tokenizer.ggml.merges, which makes no piece"),
        ({"bos_token_id": 9999}, "= 9999; expected 0 to"),
        ({"token_type": np.ones(3, np.int32)}, "tokens and 3 token types"),
    ],
)
def test_vocabularies_that_are_refused(library, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(keys_of(library, "smollm", **changes))
    assert "\n" not in str(caught.value)


def test_vocabularies_without_types_and_with_repeated_pieces_are_read(library):
    tokenizer = parse_tokenizer(read_tokenizer(keys_of(library, "smollm", token_type=None)), "t")
    assert tokenizer.special_ids == {text: n for n, text in enumerate(SPECIAL)}
    pieces = [*keys_of(library, "smollm").values["tokenizer.ggml.tokens"], "Ġcats"]
    keys = keys_of(library, "smollm", tokens=pieces, token_type=None)
    tokenizer = parse_tokenizer(read_tokenizer(keys), "t")
    assert tokenizer.vocab_size == ROWS + 1
    assert tokenizer.encode(" cats") == [ROWS]  # the last of equal ones, as in llama.cpp
    assert tokenizer.decode([ROWS, pieces.index("Ġcats")]) == " cats"


# ---- ranks files ----


def ranks_of(library):
    """A file as Meta's: the pieces that are not control tokens, in base64, and their ids."""
    vocab = json.loads(library.to_str())["model"]["vocab"]
    pieces = [text for text in sorted(vocab, key=vocab.__getitem__) if text not in SPECIAL]
    coded = [bytes(ranks.BYTE_OF_CHARACTER[c] for c in text) for text in pieces]
    return b"".join(base64.b64encode(piece) + b" %d\n" % n for n, piece in enumerate(coded))


def test_a_ranks_file_becomes_a_tokenizer_json_and_back(tmp_path):
    library = library_of("llama-bpe")
    (tmp_path / "tokenizer.model").write_bytes(written := ranks_of(library))
    size = ROWS - len(SPECIAL)
    content = read_tokenizer_file(tmp_path / "tokenizer.model", size + 256)
    tokenizer = parse_tokenizer(content, tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (size, size + 1)
    named = {text: token - size for text, token in tokenizer.special_ids.items()}
    assert (named["<|eot_id|>"], named["<|start_header_id|>"]) == (9, 6)
    assert named["<|reserved_special_token_250|>"] == 255
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert ranks.from_json(content) == written
    with pytest.raises(UserError, match="this is neither"):
        ranks.from_json(read_tokenizer(keys_of(library, "smollm")))


def test_a_damaged_ranks_file_is_refused(library, tmp_path):
    path, written, rows = tmp_path / "tokenizer.model", ranks_of(library), ROWS - 3 + 256
    lines = written.splitlines(keepends=True)
    for content, message in (
        (written[:-2], "damaged in line"),
        (
            b"".join(lines[:-1]),
            "is cut short or another model's: it has 301 pieces and 256",
        ),
        (written + b"Zm9vYmFy 302\n", "is another model's"),
        (lines[1] + written, "damaged in line 1"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            read_tokenizer_file(path, rows)
        assert str(path) in str(caught.value)


# ---- whole models ----


def test_a_model_goes_to_every_format_that_holds_its_tokenizer(content, tmp_path, capsys):
    (tmp_path / "own.json").write_bytes(content)
    rows = ROWS + 5  # padded
    store = tiny_weights(vocab_size=rows, tokenizer=content)
    llama2c.write(store, tmp_path / "model.bin")
    expected = parse_tokenizer(content, tmp_path)

    def converted(source, path, target, name, **how):
        job = Conversion(source=source, input=path, target=target, output=tmp_path / name, **how)
        convert(job)
        return tmp_path / name

    ckpt = converted(
        "llama2c", tmp_path / "model.bin", "ckpt", "ckpt", tokenizer=tmp_path / "own.json"
    )
    assert f"has {ROWS} pieces and the model {rows} rows" in capsys.readouterr().err
    hf = converted("ckpt", ckpt, "hf", "hf")
    assert not (hf / "tokenizer.model").exists()
    gguf = converted("hf", hf, "gguf", "x.gguf")
    back = converted("gguf", gguf, "ckpt", "back")
    tokenizer = load(back).tokenizer
    assert tokenizer.path.name == "tokenizer.json" and tokenizer.vocab_size == rows
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for text in TEXTS:
        assert tokenizer.encode(text) == expected.encode(text)
    assert "role" not in (hf / "tokenizer.json").read_text()
    for target in ("llama2c", "meta"):
        with pytest.raises(UserError, match="SentencePiece"):
            converted("ckpt", ckpt, target, f"to.{target}")
    (ckpt / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match="its checksum differs"):
        load(ckpt)
