"""tokenizer.json: the ids of the library, no control id out of a text, streamed decoding."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import tokenizers
from odd_texts import odd_texts
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import load_tokenizer, parse_tokenizer, tokenizer_file_name

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<unk>"]
TEXTS = ["The cat's 12 lives\nand 🙂 naïve 日本語 code: if x:\n    return {x}", "<s> a b  c"] * 3
METASPACE = pre_tokenizers.Metaspace()


def build(kind):
    """A tokenizer of the library, trained on a few texts."""
    unknown = {"unk_token": "<unk>"}
    settings = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **settings)
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(**unknown))
        trainer = trainers.WordPieceTrainer(vocab_size=120, **settings)
    elif kind == "words":
        made = tokenizers.Tokenizer(models.WordLevel(**unknown))
        trainer = trainers.WordLevelTrainer(**settings)
    else:
        made = tokenizers.Tokenizer(models.BPE(**({} if kind == "bytes" else unknown)))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **settings)
    if kind == "bytes":
        digits = pre_tokenizers.Digits(individual_digits=True)
        level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
        made.decoder = decoders.ByteLevel()
        template = {"special_tokens": [(text, n) for n, text in enumerate(SPECIAL[:2])]}
        made.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", **template)
    elif kind in ("wordpiece", "words"):
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        made.decoder = decoders.WordPiece(cleanup=False) if kind == "wordpiece" else None
    else:
        made.pre_tokenizer, made.decoder = METASPACE, decoders.Metaspace()
    made.train_from_iterator(TEXTS, trainer)
    made.add_tokens([tokenizers.AddedToken("<tool>", lstrip=True)])
    return made


@pytest.fixture(scope="module")
def made():
    """Tokenizers of the library by kind."""
    return {kind: build(kind) for kind in ("bytes", "metaspace", "unigram", "wordpiece", "words")}


def ours(library, path="tokenizer.json"):
    return parse_tokenizer(library.to_str().encode(), path)


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece", "words", "unigram"])
def test_ids_are_the_librarys(made, kind):
    library, tokenizer = made[kind], ours(made[kind])
    library.encode_special_tokens = True  # texts of control tokens are texts
    texts = odd_texts(400)
    if kind in ("unigram", "words"):  # which make them of such texts all the same
        texts = [text for text in texts if not any(special in text for special in SPECIAL)]
    assert len(texts) >= 150
    for text in texts:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece", "words", "unigram"])
def test_no_text_becomes_a_control_id(made, kind):
    tokenizer = ours(made[kind])
    control = set(tokenizer.special_ids.values()) - {tokenizer.special_ids["<unk>"]}
    assert list(tokenizer.special_ids) == SPECIAL
    for text in odd_texts(300):
        assert control.isdisjoint(tokenizer.encode(text)), text


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "wordpiece", "words"])
def test_streamed_decoding_equals_decoding_at_once_and_the_librarys(made, kind):
    library, tokenizer, rng = made[kind], ours(made[kind]), random.Random(1)
    for text in odd_texts(200):
        ids = tokenizer.encode(text)
        decoder = tokenizer.decoder()
        streamed = "".join(decoder.push([token]) for token in ids) + decoder.flush()
        assert streamed == tokenizer.decode(ids) == library.decode(ids)
        if kind == "bytes" and "e\u0301" not in text:  # composed by NFC
            assert streamed.replace("<tool>", "") == text.replace("<tool>", "") or "<tool>" in text
    if kind == "bytes":
        for _ in range(200):  # bytes that are no characters
            ids = rng.choices(range(len(SPECIAL), tokenizer.vocab_size), k=8)
            assert tokenizer.decode(ids) == library.decode(ids)
            assert b"".join(map(tokenizer.piece_bytes, ids)).decode(errors="replace") == (
                tokenizer.decode(ids)
            )


def test_bos_and_eos_are_added_when_asked_for(made):
    tokenizer = ours(made["bytes"])
    ids = tokenizer.encode("The cat")
    assert tokenizer.encode("The cat", bos=True, eos=True) == [0, *ids, 1]
    assert tokenizer.decode([0, *ids, 1]) == "The cat"
    assert tokenizer.piece_bytes(0) == b"" and tokenizer.piece_text(ids[0]).startswith("T")
    without = json.loads(made["words"].to_str())
    without["added_tokens"] = without["added_tokens"][2:]
    others = list(without["model"]["vocab"].items())[2:]
    without["model"]["vocab"] = {"zz": 0, "yy": 1} | dict(others)
    tokenizer = parse_tokenizer(json.dumps(without).encode(), "tokenizer.json")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (-1, -1)
    assert tokenizer.encode("zz", bos=True, eos=True) == [0]


def test_where_bos_and_eos_come_from(made):
    values = json.loads(made["bytes"].to_str())
    roles = lambda: (lambda t: (t.bos_id, t.eos_id))(  # noqa: E731
        parse_tokenizer(json.dumps(values).encode(), "tokenizer.json")
    )
    assert roles() == (0, 1)
    values["post_processor"]["single"][0]["SpecialToken"]["id"] = SPECIAL[2]
    assert roles() == (2, 1)  # the post-processor before known names
    values["added_tokens"][3]["role"] = "eos"
    assert roles() == (2, 3)  # what is recorded first


def test_threads_give_the_same_ids(made):
    tokenizer, texts = ours(made["bytes"]), odd_texts(100)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(tokenizer.encode, texts))
    assert found == [tokenizer.encode(text) for text in texts]


def test_a_text_that_continues_another_has_the_ids_it_has_there(made):
    for kind in ("bytes", "metaspace"):
        tokenizer = ours(made[kind])
        one, other = "The cat", " lives and code"
        both = [*tokenizer.encode(one), *tokenizer.encode_array(other, continues=True)]
        assert both == tokenizer.encode(one + other)


def test_a_vocabulary_without_byte_pieces_is_read(made):
    tokenizer = ours(made["metaspace"])
    assert tokenizer.decode(tokenizer.encode("The cat and  x")) == "The cat and  x"
    assert tokenizer.decode(tokenizer.encode("Ω")) == ""  # unknown


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is damaged"),
        (b'{"model": {"vocab": {}}}', "model.vocab is damaged"),
        (b'{"add_bos_token": true}', "holds no vocabulary"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "of an unknown kind"),
        (b'{"model": {"type": "X", "vocab": {"a": 0}}}', "unknown kind, model 'X': data did not"),
        (b'{"model": {"vocab": {"a": 99999999}}}', "model.vocab is damaged"),
        (b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": -1}]}', "expected an id"),
    ],
)
def test_damaged_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / tokenizer_file_name(content)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="lone surrogate, U\\+D800, at character 1"):
        ours(build("words")).encode("a\ud800")
