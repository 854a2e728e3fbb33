"""Verification of conversions by our own model; with torch and transformers see `parity`."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_weights import tiny_vocabulary, tiny_weights

from llama_jax.checkpoints.load import load
from llama_jax.errors import UserError
from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.formats import verify as verification
from llama_jax.formats.convert import Conversion, Options, convert
from llama_jax.formats.llama2c import tokenizer as tokenizer_bin
from llama_jax.formats.verify import is_cheap, memory_needed, our_logits, verify
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import Tensor

RIGHT = "verified: llama_jax on the output against llama_jax on ckpt: max |Δlogit| "


@pytest.fixture(autouse=True)
def no_libraries(monkeypatch):
    monkeypatch.setattr(verification, "missing", lambda *libraries: list(libraries))


def with_output(weights, array):
    tensor = Tensor(array.shape, array.dtype, lambda: array)
    return dataclasses.replace(weights, tensors=dict(weights.tensors) | {"output": tensor})


def converted(tmp_path, target="ckpt", weights=None, **options):
    weights = weights or tiny_weights(tied_embeddings=False)
    checkpoint_folder.write(weights, tmp_path / "in")
    job = Conversion(
        source="ckpt",
        input=tmp_path / "in",
        target=target,
        output=tmp_path / "out",
        options=Options(**options),
    )
    return job, convert(job)


@pytest.mark.parametrize("target", ["ckpt", "meta", "hf", "llama2c", "gguf"])
def test_a_right_conversion_changes_no_logit(tmp_path, target):
    (line,) = verify(*converted(tmp_path, target))
    assert line.startswith(RIGHT + "0 where logits reach ")
    assert line.endswith("16 of 16 greedy tokens agree")


def test_logits_are_those_of_the_loaded_model(tmp_path):
    job, source = converted(tmp_path)
    tokens = np.random.default_rng(3).integers(0, 283, 9)
    expected = jax.jit(lambda model: model(tokens[None])[0][0])(load(job.output).model)
    np.testing.assert_allclose(our_logits(source)(tokens), expected, atol=1e-5)


def test_half_precision_sources_are_compared_exactly(tmp_path):
    (line,) = verify(*converted(tmp_path, "hf", tiny_weights("bfloat16")))
    assert line.startswith(RIGHT + "0 ")


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("ckpt", {"dtype": "bfloat16"}),
        ("gguf", {"dtype": "q8_0"}),
        ("llama2c", {"llama2c_version": 2, "group_size": 8}),
    ],
)
def test_rounding_is_reported_and_no_error(tmp_path, target, options):
    (line,) = verify(*converted(tmp_path, target, **options))
    assert line.startswith(RIGHT) and not line.startswith(RIGHT + "0 ")


def test_a_wrong_number_is_an_error(tmp_path):
    job, source = converted(tmp_path)
    wrong = source.tensors["output"].read().copy()
    wrong[11] += 0.1
    with pytest.raises(UserError, match=r"although no number was rounded; do not use it") as error:
        list(verify(job, with_output(source, wrong)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["ckpt", "hf", "gguf", "meta"])
def test_what_begins_and_ends_a_text_is_compared(tmp_path, target):
    weights = tiny_weights(tied_embeddings=False)
    job, source = converted(tmp_path, target, dataclasses.replace(weights, stop_ids=(7, 2)))
    assert list(verify(job, source))
    other = dataclasses.replace(source, stop_ids=(2, 8))
    if target == "meta":  # which holds EOS alone
        assert list(verify(job, other))
        return
    with pytest.raises(UserError, match=r"stop ids: .*out has \[2, 7\], .*in \[2, 8\]; do not use"):
        list(verify(job, other))
    with pytest.raises(UserError, match=r"BOS before texts: .*out has True, .*in False"):
        list(verify(job, dataclasses.replace(source, bos=False)))


def test_llama2cs_tokenizer_is_read_back(tmp_path):
    job, source = converted(tmp_path, "llama2c")
    assert list(verify(job, source))
    pieces = list(tiny_vocabulary().pieces)
    pieces[267], pieces[268] = pieces[268], pieces[267]  # b and c
    (tmp_path / "tokenizer.bin").unlink()
    tokenizer_bin.write(Vocabulary(pieces=tuple(pieces)), tmp_path / "tokenizer.bin")
    with pytest.raises(UserError, match=r"the tokenizer written to .*out encodes .*; do not use"):
        list(verify(job, source))


def test_where_llama2c_is_known_to_differ_plain_texts_are_compared(tmp_path, capsys):
    vocabulary = dataclasses.replace(tiny_vocabulary(), joins_spaces=True)
    weights = tiny_weights(tokenizer=vocabulary.to_model())
    assert list(verify(*converted(tmp_path, "llama2c", weights)))
    assert "spaces are joined; some ids differ" in capsys.readouterr().err


def test_other_greedy_tokens_are_counted(tmp_path):
    job, source = converted(tmp_path, dtype="bfloat16")
    negated = -source.tensors["output"].read()
    (line,) = verify(job, with_output(source, negated))
    assert line.endswith(" 0 of 16 greedy tokens agree")


def test_logits_that_are_not_finite_are_not_compared(tmp_path):
    job, source = converted(tmp_path)
    not_finite = np.full((283, 24), np.nan, np.float32)
    (line,) = verify(job, with_output(source, not_finite))
    assert line == "not verified: llama_jax on ckpt computes logits that are NaN or infinite"
    job = dataclasses.replace(job, input=job.output, output=tmp_path / "again")
    damaged = with_output(convert(job), not_finite)
    (tmp_path / "bad").mkdir()
    checkpoint_folder.write(damaged, tmp_path / "bad" / "ckpt")
    job = dataclasses.replace(job, output=tmp_path / "bad" / "ckpt")
    with pytest.raises(UserError, match="no number was rounded"):
        list(verify(job, source))


@pytest.mark.parametrize("context", [1, 5])
def test_short_contexts(tmp_path, context):
    job, source = converted(tmp_path, weights=tiny_weights(context_length=context))
    (line,) = verify(job, source)
    assert f"{context // 2} of {context // 2} greedy tokens" in line


def test_the_memory_needed_is_estimated(monkeypatch):
    weights = tiny_weights()
    numbers = sum(np.prod(tensor.shape) for tensor in weights.tensors.values())
    assert 8 * numbers < memory_needed(weights) < 8 * numbers + 2**20
    assert is_cheap(weights)
    monkeypatch.setattr(verification.os, "sysconf", lambda name: 2)
    assert not is_cheap(weights)
