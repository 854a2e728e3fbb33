"""Constrained output: masks against trying each word, and only texts of the grammar come out."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizer
from cases import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from schemas import SCHEMAS, errors_of
from tiny_model import make_model
from tiny_weights import built

from llama_jax.errors import UsageError, UserError
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.inference.completions import add_text, collect
from llama_jax.inference.constraints import Constraint, masks
from llama_jax.inference.decode import decode, sample_first_token
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.inference.sampler import Sampler, keep_allowed
from llama_jax.model.transformer import unstack
from llama_jax.text.huggingface import HuggingFaceTokenizer
from llama_jax.text.sentencepiece import train_tokenizer
from llama_jax.text.tokenizer import load_tokenizer

VOCAB = 371  # of the model; no tokenizer here has as many
KINDS = ("sentencepiece", "byte_level")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.model"
    content = tiny_tokenizer.library_of("llama-bpe").to_str().encode()
    return {
        "sentencepiece": train_tokenizer(tiny_tokenizer.TEXTS * 9, 355, path),
        "byte_level": HuggingFaceTokenizer(content, path.with_name("tokenizer.json")),
    }


@cache
def model():
    return unstack(make_model(vocab_size=VOCAB, num_layers=1, context_length=128))


def stops(tokenizer):
    """A token that texts could have, "x", and one that the tokenizer does not know."""
    return (tokenizer.encode("ax")[-1], 365)


def bits(mask_W, size=VOCAB):
    """The tokens that a mask allows."""
    assert mask_W.dtype == np.uint32 and mask_W.shape == (-(-size // 32),)
    return {i for i in range(32 * len(mask_W)) if int(mask_W[i // 32]) >> i % 32 & 1}


def start(kind, text, tokenizer, *, stop_ids=None, prompt=(3, 4), size=VOCAB):
    stop_ids = stops(tokenizer) if stop_ids is None else stop_ids
    return Constraint(kind, text, tokenizer, stop_ids=stop_ids, vocab_size=size, prompt=prompt)


# --- masks ---


WORDS = st.text(st.sampled_from("abc' 12{}\"\\\né日🙂\t"), min_size=1, max_size=9)


@settings(max_examples=40, deadline=None)
@given(words=st.lists(WORDS, min_size=1, max_size=5), data=st.data())
@pytest.mark.parametrize("name", KINDS)
def test_masks_equal_each_token_tried_alone(tokenizers, name, words, data):
    tokenizer = tokenizers[name]
    pieces = [tokenizer.piece_bytes(token) for token in range(tokenizer.vocab_size)]
    language = [word.encode() for word in words]
    grammar = "start: " + " | ".join(json.dumps(word, ensure_ascii=False) for word in words)
    constraint, text, ends = start("grammar", grammar, tokenizer), b"", set(stops(tokenizer))
    while True:
        following = {word[len(text) :] for word in language if word.startswith(text)}
        may_end = b"" in following
        expected = {
            token
            for token, piece in enumerate(pieces)
            if piece and token not in ends and any(rest.startswith(piece) for rest in following)
        }
        found = bits(constraint.mask())
        assert found & ends == (ends if may_end else set())
        found -= ends
        if len({rest[:1] for rest in following}) > 1:
            assert found == expected
        else:  # where the text is certain, tokens may be those that the tokenizer gives it
            assert found <= expected
        assert constraint.has_ended == (not expected)
        if not found:
            assert may_end
            return
        token = data.draw(st.sampled_from(sorted(found)))
        constraint.advance(token)
        text += pieces[token]


@pytest.mark.parametrize("size", [64, 300, VOCAB, 500])
def test_vocabularies_of_other_sizes_than_the_tokenizers(tokenizers, size):
    tokenizer = tokenizers["byte_level"]
    mask_W = start("regex", "(?s:.*)", tokenizer, stop_ids=(40, 10**6), size=size).mask()
    found = bits(mask_W, size)
    assert 40 in found and max(found) < min(size, tokenizer.vocab_size)
    assert not found & {id for id in tokenizer.special_ids.values() if id != 40}


def test_a_batch_lets_sequences_without_constraint_go_on_by_any_token(tokenizers):
    tokenizer = tokenizers["byte_level"]
    digits = start("regex", "[0-9]+", tokenizer)
    ended = start("regex", "a", tokenizer, stop_ids=())
    ended.advance(next(iter(bits(ended.mask()))))
    assert ended.has_ended and not ended.mask().any()
    masks_BW = masks([None, digits, ended], VOCAB)
    assert (masks_BW[0] == 2**32 - 1).all() and (masks_BW[2] == 2**32 - 1).all()
    assert bits(masks_BW[1]) == bits(digits.mask())
    assert {tokenizer.piece_text(token) for token in bits(digits.mask())} >= set("0123456789")


def test_a_token_that_is_not_allowed_cannot_follow(tokenizers):
    tokenizer = tokenizers["byte_level"]
    constraint = start("regex", "[0-9]+", tokenizer)
    [letter] = tokenizer.encode("a")
    with pytest.raises(UserError, match="no token of the vocabulary continues the constrained"):
        constraint.advance(letter)


def test_a_stop_token_is_no_part_of_a_text(tokenizers):
    tokenizer = tokenizers["byte_level"]
    found = bits(start("regex", "[w-z]{2}", tokenizer).mask())
    assert found >= set(tokenizer.encode("w")) and not found & set(stops(tokenizer))
    with pytest.raises(UserError, match="no token of the vocabulary continues the constrained"):
        start("regex", "x", tokenizer)


@pytest.mark.parametrize("pattern", [" a", "( |b)a", "a"])
def test_a_space_that_the_tokenizer_adds_is_not_taken_for_one_of_the_text(tokenizers, pattern):
    tokenizer, random = tokenizers["sentencepiece"], np.random.default_rng(0)
    for prompt in ([tokenizer.bos_id], tokenizer.encode("b", bos=True)):
        for _ in range(5):
            constraint, ids = start("regex", pattern, tokenizer, prompt=prompt, stop_ids=()), []
            while not constraint.has_ended:
                ids.append(int(random.choice(sorted(bits(constraint.mask())))))
                constraint.advance(ids[-1])
            text = tokenizer.decoder(after=prompt).push(ids)
            assert re.fullmatch(pattern, text), (prompt, ids)


# --- the sampler ---


def test_only_allowed_tokens_keep_their_logits():
    random = np.random.default_rng(0)
    logits_BV = random.standard_normal((3, 77)).astype(np.float32)
    masks_BW = random.integers(0, 2**32, (3, 3)).astype(np.uint32)
    found_BV = np.asarray(keep_allowed(jnp.asarray(logits_BV), jnp.asarray(masks_BW)))
    for found_V, logits_V, mask_W in zip(found_BV, logits_BV, masks_BW):
        allowed = [token in bits(mask_W, 77) for token in range(77)]
        np.testing.assert_array_equal(found_V, np.where(allowed, logits_V, -np.inf))


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_no_bias_allows_a_forbidden_token(temperature):
    params = SamplingParams(
        temperature=temperature, logit_bias={5: 1e9, 6: -np.inf}, top_k=3, min_p=0.1
    )
    allowed_BW = jnp.asarray([[1 << 6]], jnp.uint32)
    sampler = dataclasses.replace(Sampler.of([params]), allowed_BW=allowed_BW)
    keys_B = jax.random.split(jax.random.key(0), 1)
    sample = jax.jit(lambda sampler, *rest: sampler(*rest))
    assert sample(sampler, jnp.zeros((1, 30)), keys_B).tolist() == [6]


# --- generation ---


def is_balanced(text):
    while "()" in text:
        text = text.replace("()", "")
    return text == ""


SMALL_SCHEMA = {
    "type": "object",
    "properties": {"a b": {"type": "string", "maxLength": 4}, "n": {"enum": [None, 12, "é"]}},
    "required": ["a b", "n"],
    "additionalProperties": False,
}
CONSTRAINTS = [
    ({"regex": r"[a-c]{1,4}( [0-9]{2}|é日)?"}, re.compile(r"[a-c]{1,4}( [0-9]{2}|é日)?").fullmatch),
    ({"regex": "yes|no|never"}, {"yes", "no", "never"}.__contains__),
    ({"grammar": 'start: "" | "(" start ")" start'}, is_balanced),
    ({"grammar": 'root ::= "" | "(" root ")" root'}, is_balanced),
    ({"json_schema": SMALL_SCHEMA}, lambda text: not errors_of(SMALL_SCHEMA, json.loads(text))),
]


def run(request, tokenizer):
    """The ids of each sequence and why it ended."""
    ids, ends = ([[] for _ in request.prompts] for _ in range(2))
    for delta in Engine(model(), tokenizer=tokenizer).generate(request):
        ids[delta.index] += delta.ids
        ends[delta.index] += [delta.finish_reason] if delta.finish_reason else []
    return ids, [end for [end] in ends]


@pytest.mark.parametrize("name", slow_but(["byte_level"], KINDS))
def test_only_texts_of_the_grammar_come_out(tokenizers, name):
    tokenizer, wanted = tokenizers[name], [each for each in CONSTRAINTS for _ in range(8)]
    params = [
        SamplingParams(temperature=1, top_p=1, max_tokens=60, seed=seed, **each)
        for seed, (each, _) in enumerate(wanted)
    ]
    prompts = [[3, 20 + row] for row in range(len(params))]
    ids, ends = run(Request(prompts=prompts, params=params, stop_ids=stops(tokenizer)), tokenizer)
    assert ends.count("stop") > 20
    for (constraint, accepts), prompt, found, end in zip(wanted, prompts, ids, ends):
        decoder = tokenizer.decoder(after=prompt)
        text = decoder.push(found) + decoder.flush()
        assert end == "length" or accepts(text), (constraint, text)
        assert not set(found) & set(stops(tokenizer))
    assert len(set(map(tuple, ids))) > 20, "one text again and again would prove little"


@pytest.mark.slow
def test_a_sequence_is_the_same_with_constrained_ones_beside_it(tokenizers):
    plain, tokenizer = {"temperature": 1.2, "max_tokens": 25}, tokenizers["byte_level"]
    settings = [
        {**plain, "seed": 1},
        {"temperature": 0, "max_tokens": 19},
        {**plain, "seed": 2, "regex": "[0-9 ]{3,}", "frequency_penalty": 0.5},
    ]
    prompts = [[*range(10, 12 + row)] for row in range(len(settings))]

    def request_of(rows):
        params = [SamplingParams(**settings[row]) for row in rows]
        return Request(
            prompts=[prompts[row] for row in rows], params=params, stop_ids=stops(tokenizer)
        )

    together = run(request_of(range(3)), tokenizer)
    for row in (0, 2):
        [ids], [end] = run(request_of([row]), tokenizer)
        assert (ids, end) == (together[0][row], together[1][row])


def test_a_text_that_cannot_go_on_ends_at_once_also_without_stop_tokens(tokenizers):
    tokenizer = tokenizers["byte_level"]
    params = [SamplingParams(regex="a|12345"), SamplingParams(regex="c+", max_tokens=5)]
    request = Request(prompts=[[3], [4]], params=params)
    ids, ends = run(request, tokenizer)
    assert tokenizer.decode(ids[0]) in ("a", "12345") and ends == ["stop", "length"]


def test_other_constraints_compile_nothing(tokenizers):
    sizes = []
    for pattern in ("[0-9]{3}", "a|bc", "(xyz)+"):
        params = [SamplingParams(regex=pattern, max_tokens=5)] * 2
        run(Request(prompts=[[3], [4]], params=params), tokenizers["byte_level"])
        sizes.append((decode._cache_size(), sample_first_token._cache_size()))
    assert len(set(sizes)) == 1


def test_logprobs_are_the_models_own(tokenizers):
    params = SamplingParams(regex="[0-9]{4}", logprobs=2, temperature=0)
    engine = Engine(model(), tokenizer=tokenizers["byte_level"])
    request = Request(prompts=[[3]], params=[params], stop_ids=stops(tokenizers["byte_level"]))
    [first, *_] = [each for delta in engine.generate(request) for each in delta.logprobs]
    plain = SamplingParams(logprobs=2, temperature=0, max_tokens=1)
    [other] = next(engine.generate(Request(prompts=[[3]], params=[plain]))).logprobs
    assert first.top == other.top and first.logprob < other.logprob


# --- bad input ---


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        ({"regex": "a("}, "regex='a(' cannot be used: unclosed group; change it"),
        ({"regex": "(?=a)b"}, "regex='(?=a)b' cannot be used: look-around, including look-ahead"),
        ({"regex": 3}, "regex=3 is not a text; expected one"),
        ({"regex": "a" * 200_001}, "regex has 200,001 characters; expected at most 200,000"),
        ({"grammar": "start: x"}, "grammar='start: x' cannot be used: at 1(8): unknown name"),
        (
            {"grammar": "root ::= [a"},
            "grammar='root ::= [a' cannot be used: as GBNF: Unexpected end",
        ),
        (
            {"grammar": "root ::= x"},
            "grammar='root ::= x' cannot be used: as GBNF: Rule 'x' not found",
        ),
        ({"grammar": ""}, "grammar='' cannot be used: Empty grammar; change it"),
        (
            {"json_schema": {"not": {}}},
            """json_schema='{"not": {}}' cannot be used: Unimplemented""",
        ),
        (
            {"json_schema": {"type": "strng"}},
            """json_schema='{"type": "strng"}' cannot be used: In""",
        ),
        ({"json_schema": {"$ref": "http://a/b"}}, "json_schema="),
        ({"json_schema": "{"}, "json_schema='{' is not JSON: Expecting property name"),
        ({"json_schema": "[" * 99_999}, "json_schema="),
        (
            {"json_schema": {"const": np.nan}},
            "json_schema={'const': nan} is not JSON: Out of range",
        ),
        ({"json_schema": {"const": b"a"}}, "json_schema={'const': b'a'} is not JSON: "),
        ({"json_schema": [1]}, "json_schema=[1] is not a JSON object; expected a JSON schema as"),
        ({"json_schema": False}, "json_schema=False is not a JSON object; expected"),
        ({"json_schema": True, "regex": "a"}, "json_schema and regex exclude each other; choose"),
        ({"grammar": 'start: "a"', "regex": "a"}, "regex and grammar exclude each other; choose"),
        ({"regex": "a", "speculate": True, "temperature": 0}, "speculate=True guesses"),
        ({"regex": "a", "rng": "xorshift", "seed": 1}, "regex='a' does not go with rng='xorshift'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_constraint_that_cannot_be_used_is_refused_at_once(constraint, message):
    with pytest.raises(UsageError) as error:
        SamplingParams(**constraint)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("constraint", "reason"),
    [
        ({"grammar": 'start: start "a"'}, "no text fits it"),
        ({"grammar": "start: <|nothing|>"}, 'unknown special token: "<|nothing|>"'),
    ],
    ids=["endless", "special"],
)
def test_a_constraint_that_no_text_fits_is_refused_before_generating(
    tokenizers, constraint, reason
):
    request = Request(
        prompts=[[3]],
        params=[SamplingParams(**constraint)],
        stop_ids=stops(tokenizers["byte_level"]),
    )
    with pytest.raises(UsageError, match=f"^grammar=.* cannot be used: .*{re.escape(reason)}"):
        Engine(model(), tokenizer=tokenizers["byte_level"]).generate(request)
    with pytest.raises(UsageError, match=r"^grammar needs the model's tokenizer; give Engine one$"):
        Engine(model()).generate(request)


def test_a_grammar_too_complex_to_follow_ends_in_one_line(tokenizers):
    params = SamplingParams(regex="((a{1000}){1000}){1000}", max_tokens=4)
    engine = Engine(model(), tokenizer=tokenizers["byte_level"])
    with pytest.raises(
        UserError, match=r"no token .* continues .*: lexer error.*; change the json"
    ):
        list(
            engine.generate(
                Request(prompts=[[3]], params=[params], stop_ids=stops(tokenizers["byte_level"]))
            )
        )


def test_llguidance_is_loaded_only_by_a_constraint_and_named_if_it_is_missing():
    script = """
import sys
sys.modules["llguidance"] = None  # importing it fails
from llama_jax.inference.request import SamplingParams
SamplingParams()
try:
    SamplingParams(regex="a")
except ValueError as error:
    print(error)
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = "json_schema, regex and grammar need the package llguidance; install it with:"
    assert made.stdout.strip() == f"{expected} pip install llama_jax[serve]", made.stderr


# --- many texts ---


@pytest.mark.slow
def test_many_json_texts_are_valid(shared_data):
    """JSON_TEXTS=10000 makes ten thousand, which takes minutes."""
    count = int(os.environ.get("JSON_TEXTS", "400"))
    tokenizer = load_tokenizer(shared_data / "tok512.model")
    weights = unstack(built(llama2c.read(shared_data / "stories260K.bin")))
    engine, texts = Engine(weights, tokenizer=tokenizer), set[str]()
    for schema in SCHEMAS.values():
        params = SamplingParams(json_schema=schema, temperature=1, top_p=1, max_tokens=180)
        request = Request.same_params([[1]], params, n=count // len(SCHEMAS), stop_ids=(1, 2))
        made = collect(add_text(engine.generate(request), request, tokenizer), request)
        for completion in made:
            assert completion.finish_reason == "stop", completion
            assert not errors_of(schema, json.loads(completion.text)), completion
        texts |= {completion.text for completion in made}
    assert len(texts) > count // 2
