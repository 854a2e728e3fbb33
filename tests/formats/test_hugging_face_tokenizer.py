import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tiny_weights import tiny_vocabulary

from llama_jax.errors import UserError
from llama_jax.formats.huggingface.tokenizer import read_tokenizer
from llama_jax.formats.huggingface.tokenizer_writer import to_tokenizer_json, write_tokenizer
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.huggingface import HuggingFaceTokenizer
from llama_jax.text.tokenizer import load_tokenizer, parse_tokenizer

TINY = tiny_vocabulary()
ROWS = len(TINY.pieces)
VALUES = to_tokenizer_json(TINY, bos=True)
TEXTS = ["", "abc", " ab abc  bca", "x\ny", "<s>a", "né ▁🦙", "\0", "aaaa bbbb cabcabc"]
CTC = {"type": "CTC", "pad_token": "_", "word_delimiter_token": "|", "cleanup": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


def put(folder, **files):
    """A folder with JSON files, by their names without the ending."""
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def read(folder, given=None, rows=ROWS, **config):
    return read_tokenizer(folder, given, config, rows)


def pieces(folder, **options):
    return Vocabulary.from_model(read(folder, **options)).pieces


def encodings(model):
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return [processor.encode(text) for text in TEXTS]


def refused(folder, *reasons, **options):
    with pytest.raises(UserError) as caught:
        read(folder, **options)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    assert all(reason in message for reason in reasons), message


def model_with(**changes):
    """A tokenizer.json with other fields in its model."""
    return VALUES | {"model": VALUES["model"] | changes}


def test_a_sentencepiece_model_is_passed_on_as_it_is(tmp_path):
    model = TINY.to_model()
    write_tokenizer(model, True, 32, tmp_path)
    assert read(tmp_path) == model
    (tmp_path / "tokenizer.json").write_text("never looked at")
    assert read(tmp_path) == model


def test_without_any_file_there_is_no_tokenizer(tmp_path):
    assert read(tmp_path) == b""


def test_a_given_tokenizer_is_used(tmp_path):
    write_tokenizer(TINY.to_model(), True, 32, tmp_path)
    other = dataclasses.replace(TINY, adds_space=False)
    (tmp_path / "own.model").write_bytes(other.to_model())
    assert read(tmp_path, tmp_path / "own.model") == other.to_model()
    put(tmp_path, own=to_tokenizer_json(other, True))
    model = read(tmp_path, tmp_path / "own.json")
    assert Vocabulary.from_model(model).adds_space is False
    assert encodings(model) == encodings(other.to_model()) != encodings(TINY.to_model())
    with pytest.raises(UserError, match=r"absent.json does not exist"):
        read(tmp_path, tmp_path / "absent.json")
    with pytest.raises(UserError, match=r"absent.model does not exist"):
        read(tmp_path, tmp_path / "absent.model")


def test_a_model_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    refused(tmp_path, "cut short", "2 pieces and 256 control tokens for 283 rows")
    (tmp_path / "tokenizer.model").write_bytes(TINY.to_model()[:-9])
    refused(tmp_path, "cut short")


def test_a_tokenizer_json_becomes_a_model_that_encodes_alike(tmp_path):
    put(tmp_path, tokenizer=VALUES)
    model = read(tmp_path)
    assert encodings(model) == encodings(TINY.to_model())
    vocabulary = Vocabulary.from_model(model)
    assert [p.text for p in vocabulary.pieces] == [p.text for p in TINY.pieces]
    assert [p.kind for p in vocabulary.pieces] == [p.kind for p in TINY.pieces]
    assert (vocabulary.unknown_id, vocabulary.bos_id, vocabulary.eos_id) == (0, 1, 2)
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert load_tokenizer(tmp_path / "tokenizer.model").encode("abc", bos=True, eos=True)[-1] == 2


@pytest.mark.parametrize("name", ["tokenizer", "tok512"])
def test_a_real_tokenizer_survives_as_json(name, shared_data, tmp_path):
    model = (shared_data / f"{name}.model").read_bytes()
    whole = Vocabulary.from_model(model)
    put(tmp_path, tokenizer=to_tokenizer_json(whole, True))
    back = read(tmp_path, rows=len(whole.pieces))
    texts = (shared_data / "llama-spm.inp").read_text().split("\n__ggml_vocab_test__\n")
    ours, theirs = SentencePieceProcessor(), SentencePieceProcessor()
    ours.LoadFromSerializedProto(model)
    theirs.LoadFromSerializedProto(back)
    assert len(texts) == 47 and [*map(ours.encode, texts)] == [*map(theirs.encode, texts)]


def test_merges_may_be_texts_or_pairs(tmp_path):
    pairs = [merge.split(" ") for merge in VALUES["model"]["merges"]]
    assert len(pairs) == 8
    put(tmp_path, tokenizer=model_with(merges=pairs))
    assert encodings(read(tmp_path)) == encodings(TINY.to_model())


def test_pieces_with_a_space_are_written_as_pairs():
    odd = dataclasses.replace(TINY, pieces=(*TINY.pieces, Piece("a ", -9.0), Piece(" ", -9.0)))
    assert ["a", " "] in to_tokenizer_json(odd, True)["model"]["merges"]


def test_merges_in_the_order_of_another_library_decide(tmp_path):
    put(tmp_path, tokenizer=model_with(merges=["a b", "b c", "a bc", "▁ a", "▁a b"]))
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(read(tmp_path))
    assert processor.encode("abc ac bc", out_type=str) == ["▁", "ab", "c", "▁a", "c", "▁", "bc"]
    unused = [piece.text for piece in pieces(tmp_path) if piece.kind == Kind.UNUSED]
    assert unused == ["▁ab", "abc", "▁b"]


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "adds_space"),
    [
        (VALUES["normalizer"], None, True),
        ({"type": "Sequence", "normalizers": VALUES["normalizer"]["normalizers"][1:]}, None, False),
        (VALUES["normalizer"]["normalizers"][1], None, False),
        (None, METASPACE, True),
        (None, METASPACE | {"prepend_scheme": "first"}, True),
        (None, METASPACE | {"prepend_scheme": "never"}, False),
        (None, {"type": "Sequence", "pretokenizers": [METASPACE]}, True),
        (None, {"type": "Metaspace", "add_prefix_space": False, "split": False}, False),
    ],
)
def test_every_form_of_space_settings_is_read(normalizer, pre_tokenizer, adds_space, tmp_path):
    changes = {"normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    put(tmp_path, tokenizer=VALUES | changes)
    model = read(tmp_path)
    assert Vocabulary.from_model(model).adds_space == adds_space
    expected = dataclasses.replace(TINY, adds_space=adds_space)
    assert encodings(model) == encodings(expected.to_model())


def test_no_piece_spans_words_that_are_split(tmp_path):
    vocabulary = Vocabulary(pieces=(*TINY.pieces, Piece("▁▁", -50.0)))
    values = to_tokenizer_json(vocabulary, True)
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}  # cuts, unasked
    apart, together = ["▁", "▁", "▁a"], ["▁▁", "▁a"]
    cuts = [(METASPACE, together), (METASPACE | {"split": True}, apart), (old, apart)]
    for cut, parts in cuts:
        put(tmp_path, tokenizer=values | {"normalizer": None, "pre_tokenizer": cut})
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(read(tmp_path, rows=ROWS + 1))
        assert processor.encode("  a", out_type=str) == parts


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([], "not a SentencePiece model"),
        ({}, "model is None"),
        (VALUES | {"model": [1]}, "model is [1]"),
        (model_with(type="Unigram"), "of an unknown kind"),
        (model_with(type="Bigram"), "of an unknown kind"),
        (VALUES | {"normalizer": 7}, "of an unknown kind"),
        (VALUES | {"normalizer": None, "pre_tokenizer": METASPACE | {"split": 3}}, "unknown kind"),
        (VALUES | {"normalizer": None, "decoder": CTC}, "decodes by 'CTC'"),
        (model_with(vocab=None), "model.vocab is None"),
        (model_with(vocab=[["a", 0.0]]), "model.vocab is [['a'"),
        (model_with(vocab={}), "of an unknown kind"),
        (model_with(vocab={**VALUES["model"]["vocab"], "q": -1}), "'q': -1"),
        (model_with(vocab={**VALUES["model"]["vocab"], "qq": True}), "'qq': True"),
        (model_with(vocab={**VALUES["model"]["vocab"], "": 283}), "'': 283"),
        (model_with(vocab={**VALUES["model"]["vocab"], "\ud800": 283}), r"'\ud800': 283"),
        (model_with(vocab={**VALUES["model"]["vocab"], "qq": 5}), "one id to several pieces"),
        (model_with(vocab={**VALUES["model"]["vocab"], "q" * 20_000: 283}), "too long"),
        (
            model_with(vocab={**VALUES["model"]["vocab"], "qq": 300}),
            "301 pieces and the model 283 rows",
        ),
        (model_with(unk_token=["<unk>"]), "of an unknown kind"),
        (model_with(merges=None), "model.merges is None"),
        (model_with(merges=["a"]), "merges has 'a'"),
        (model_with(merges=["a b c"]), "merges has 'a b c'"),
        (model_with(merges=[["a", 3]]), "merges has ['a', 3]"),
        (model_with(merges=["a nothing"]), "merges has 'a nothing'"),
        (model_with(merges=["q q"]), "makes no piece"),
        (VALUES | {"added_tokens": 3}, "added_tokens is 3"),
        (VALUES | {"added_tokens": [3]}, "added_tokens has 3"),
        (VALUES | {"added_tokens": [{"id": "a", "content": "b"}]}, "expected id and content"),
    ],
)
def test_a_damaged_tokenizer_json_is_refused(values, reason, tmp_path):
    put(tmp_path, tokenizer=values)
    refused(tmp_path, reason)


@pytest.mark.parametrize(
    "values",
    [
        model_with(byte_fallback=False),
        model_with(ignore_merges=True),
        model_with(end_of_word_suffix="</w>"),
        model_with(unk_token="<s>"),
        VALUES | {"normalizer": {"type": "NFC"}},
        VALUES | {"normalizer": None},
    ],
)
def test_another_kind_of_tokenizer_json_is_kept_whole(values, tmp_path):
    put(tmp_path, tokenizer=values)
    content = read(tmp_path)
    assert content == (tmp_path / "tokenizer.json").read_bytes()
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (ROWS, 1, 2)
    with pytest.raises(UserError, match="the format holds SentencePiece vocabularies alone"):
        Vocabulary.from_model(content)


def test_special_pieces_may_have_other_names(tmp_path):
    text = json.dumps(VALUES).replace("</s>", "<|end|>").replace("<s>", "<|begin|>")
    (tmp_path / "tokenizer.json").write_text(text)
    assert read(tmp_path).startswith(b"{")  # kept whole: no SentencePiece without BOS
    model = read(tmp_path, bos_token_id=1, eos_token_id=2)
    assert Vocabulary.from_model(model).bos_id == 1
    names = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}
    put(tmp_path, tokenizer_config=names | {"added_tokens_decoder": {}})
    (tmp_path / "own.model").write_bytes(read(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "own.model")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    put(tmp_path, tokenizer_config={"bos_token": "<|begin|>"})
    for eos in (None, 0, 7, 283, "2", True):  # 7 is a byte
        assert read(tmp_path, eos_token_id=eos).startswith(b"{")


@pytest.mark.parametrize("bos", [True, False])
def test_bos_is_written_into_settings_and_template(bos, tmp_path):
    write_tokenizer(TINY.to_model(), bos, 32, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is bos and settings["add_eos_token"] is False
    template = json.loads((tmp_path / "tokenizer.json").read_text())["post_processor"]
    assert [len(template[key]) for key in ("single", "pair")] == ([2, 4] if bos else [1, 2])


def test_added_tokens_fill_the_rows(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(TINY.to_model())
    put(tmp_path, added_tokens={"<pad>": ROWS, "ab": ROWS + 1})  # the second is there already
    added = pieces(tmp_path, rows=ROWS + 2)[ROWS:]
    assert [piece.kind for piece in added] == [Kind.USER_DEFINED, Kind.UNUSED]
    put(tmp_path, added_tokens={"<pad>": ROWS, "new word": ROWS + 1, "<s>": 1})
    added = pieces(tmp_path, rows=ROWS + 2)[ROWS:]
    assert [piece.text for piece in added] == ["<pad>", "new▁word"]
    assert {piece.kind for piece in added} == {Kind.USER_DEFINED}
    decoder = {str(ROWS): {"content": "<pad>", "special": True}}
    put(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    added = pieces(tmp_path, rows=ROWS + 2)[ROWS:]
    assert [piece.kind for piece in added] == [Kind.CONTROL, Kind.USER_DEFINED]
    assert encodings(read(tmp_path, rows=ROWS + 2)) == encodings(TINY.to_model())
    assert read(tmp_path) == TINY.to_model()  # without rows for them they do not count


@pytest.mark.parametrize("special", [True, False])
def test_the_settings_say_what_ends_the_texts_of_a_model(special, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(TINY.to_model())
    names = {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "abc"}
    decoder = {str(ROWS): {"content": "<|im_end|>", "special": special}}
    put(tmp_path, tokenizer_config=names | {"added_tokens_decoder": decoder})
    tokenizer = parse_tokenizer(read(tmp_path, rows=ROWS + 1), tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, ROWS)
    assert tokenizer.special_ids == {"<s>": 1, "</s>": 2, "<|im_end|>": ROWS}
    put(tmp_path, tokenizer_config={"bos_token": "", "eos_token": "<unk>"})
    assert read(tmp_path) == TINY.to_model()


def test_bos_and_eos_are_control_pieces_though_none_was_added(tmp_path):
    put(tmp_path, tokenizer=VALUES | {"added_tokens": []})
    assert pieces(tmp_path)[:3] == TINY.pieces[:3]


def test_added_tokens_beyond_the_rows_are_ignored(tmp_path):
    added = [*VALUES["added_tokens"], {"id": ROWS, "content": "<pad>", "special": True}]
    put(tmp_path, tokenizer=VALUES | {"added_tokens": added})
    assert len(pieces(tmp_path)) == ROWS
    assert pieces(tmp_path, rows=ROWS + 1)[-1] == Piece("<pad>", 0.0, Kind.CONTROL)
    added[-1] = {"id": ROWS, "content": " "}
    put(tmp_path, tokenizer=VALUES | {"added_tokens": added})
    refused(tmp_path, "how they write a space", rows=ROWS + 1)


@pytest.mark.parametrize("rows", [284, 320, 1024])
def test_padded_rows_get_unused_pieces(rows, tmp_path, capsys):
    (tmp_path / "tokenizer.model").write_bytes(TINY.to_model())
    model = read(tmp_path, rows=rows)
    vocabulary = Vocabulary.from_model(model)
    assert vocabulary.pieces[:ROWS] == TINY.pieces
    assert {piece.kind for piece in vocabulary.pieces[ROWS:]} == {Kind.UNUSED}
    assert len({piece.text for piece in vocabulary.pieces}) == rows
    assert f"has 283 pieces and the model {rows:,} rows" in capsys.readouterr().err
    assert encodings(model) == encodings(TINY.to_model())


@pytest.mark.parametrize("rows", [1, 282, 2000])
def test_other_sizes_are_refused(rows, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(TINY.to_model())
    refused(tmp_path, "283 pieces", f"{rows:,} rows", rows=rows)


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": 3},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"-1": {"content": "a"}}},
        {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}},
        {"added_tokens_decoder": {"283": "a"}},
        {"added_tokens_decoder": {"283": {"content": ""}}},
        {"added_tokens_decoder": {"283": {"content": ["a"]}}},
    ],
)
def test_odd_settings_are_refused(settings, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(TINY.to_model())
    put(tmp_path, tokenizer_config=settings)
    refused(tmp_path, "expected id and content", rows=ROWS + 1)


def test_special_ids_outside_a_model_are_refused(tmp_path):
    for change in ({"unknown_id": 999}, {"pad_id": 999}):
        model = dataclasses.replace(TINY, **change).to_model()
        (tmp_path / "tokenizer.model").write_bytes(model)
        refused(tmp_path, "has id 999")


def test_a_user_defined_piece_is_written_as_texts_have_it():
    odd = Vocabulary(pieces=(*TINY.pieces, Piece("new▁word", 0.0, Kind.USER_DEFINED)))
    values = to_tokenizer_json(odd, True)
    assert values["model"]["vocab"]["new word"] == ROWS
    assert values["added_tokens"][-1]["content"] == "new word"
    assert values["added_tokens"][-1]["special"] is False


def test_control_pieces_are_in_no_merge():
    odd = [Piece("<s", -3.0), Piece("<", -4.0), Piece(">", -5.0), Piece("s", -6.0)]
    letters = [piece for piece in TINY.pieces if piece.text != "s"]
    values = to_tokenizer_json(Vocabulary(pieces=(*letters, *odd)), True)
    assert "< s" in values["model"]["merges"] and "<s >" not in values["model"]["merges"]


PATHS = [("model",), ("added_tokens",), ("added_tokens", 0), ("normalizer",), ("pre_tokenizer",)]
PATHS += [("model", key) for key in VALUES["model"]] + [("added_tokens", 1, "content")]
PATHS += [("model", "vocab", key) for key in ("a", "ab", "<s>", "<unk>", "<0x00>", "new", "▁a")]
PATHS += [("model", "merges", 0), ("added_tokens", 2, "id"), ("added_tokens", 0, "special")]
ODD = st.none() | st.booleans() | st.integers(-1, 290) | st.text("ab<s>▁ \0", max_size=4)
ODD |= st.sampled_from([[], {}, ["a", "b"], METASPACE, 2**70, {"a": 1}, "\ud800", "</s>"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(PATHS), ODD), min_size=1, max_size=3))
def test_odd_values_are_refused_or_give_a_model_that_loads(tmp_path_factory, changes):
    values = copy.deepcopy(VALUES)
    for path, value in changes:
        place = values
        try:
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = copy.deepcopy(value)  # one {} in two places would be a circle
        except (TypeError, KeyError, IndexError):
            continue
    folder = put(tmp_path_factory.getbasetemp() / "odd_tokenizer", tokenizer=values)
    try:
        model = read(folder)
        tokenizer = parse_tokenizer(model, folder / "own")
        assert tokenizer.vocab_size == ROWS
        for text in TEXTS:
            tokenizer.encode(text)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000


def test_a_text_that_a_vocabulary_without_unknown_token_lacks(tmp_path):
    values = copy.deepcopy(VALUES)
    values |= {"added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    values["model"] |= {"vocab": {"a": 0}, "merges": [], "byte_fallback": False}
    tokenizer = HuggingFaceTokenizer(json.dumps(values).encode(), tmp_path / "tokenizer.json")
    assert tokenizer.encode("a") == [0]
    with pytest.raises(UserError, match=r"tokenizer\.json cannot encode 'b'"):
        tokenizer.encode("b")
