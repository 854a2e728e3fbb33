"""Perplexity: against a loop over tokens, and against the scores of the library."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.data.prepare.documents import Chunk, ReadOptions, ReadProgress, read_documents
from llama_jax.errors import UsageError
from llama_jax.evaluation.perplexity import text_perplexity

SHORT = "Tim saw 7 red boats on the blue sea."
LONG = " ".join(f"Tim saw {n} red boats, and Anna was glad of the sea." for n in range(9))


def documents(*texts):
    return [Chunk(text, is_first=True, is_last=True) for text in texts]


def logprob_by_a_loop(llm, ids, stride):
    """The log-probability of all ids but the first, by a forward pass for each window."""
    context, total, scored = llm.context_length, 0.0, 1
    forward = jax.jit(lambda model, ids_BT: jax.nn.log_softmax(model(ids_BT)[0][0]))
    for start in [*range(0, max(len(ids) - context, 0), stride), max(len(ids) - context, 0)]:
        window = ids[start : start + context]
        logprobs_TV = np.asarray(forward(llm.engine.model, jnp.asarray([window])))
        end = start + len(window)
        total += sum(float(logprobs_TV[i - start - 1, ids[i]]) for i in range(scored, end))
        scored = end
    return total


def test_a_text_that_fits_has_the_score_of_the_library(llm):
    found, score = text_perplexity(llm, documents(SHORT)), llm.score(SHORT)
    assert (found.documents, found.tokens, found.bytes) == (1, len(score.logprobs), len(SHORT))
    assert found.logprob == pytest.approx(score.total)
    assert found.perplexity == pytest.approx(score.perplexity)
    assert found.bits_per_byte == pytest.approx(-score.total / math.log(2) / len(SHORT))


@pytest.mark.parametrize("stride", [0, 7, 20])
def test_a_long_text_is_scored_in_windows_as_in_a_loop(llm, stride):
    found = text_perplexity(llm, documents(LONG), stride, batch_size=3)
    ids = llm.tokenizer.encode(LONG, bos=True)
    assert len(ids) > 3 * llm.context_length
    assert found.tokens == len(ids) - 1
    assert found.logprob == pytest.approx(logprob_by_a_loop(llm, ids, stride or 39), rel=1e-5)
    if stride == 20:  # half a context, as the library has it
        assert found.logprob == pytest.approx(llm.score(LONG).total, rel=1e-6)


def test_a_file_read_in_chunks_has_the_perplexity_of_its_text(llm, tmp_path):
    file = tmp_path / "a.md"
    file.write_text(f"\n{LONG}\n")
    options = ReadOptions(block_bytes=50, chunk_characters=60)
    found = text_perplexity(llm, read_documents(file, options, ReadProgress()))
    assert found == text_perplexity(llm, documents(LONG))


def test_documents_are_scored_each_by_itself(llm):
    both = text_perplexity(llm, documents(SHORT, LONG), batch_size=1)
    one, other = (text_perplexity(llm, documents(text)) for text in (SHORT, LONG))
    added = one + other
    assert (both.documents, both.tokens, both.bytes) == (2, added.tokens, added.bytes)
    assert both.logprob == pytest.approx(added.logprob, rel=1e-5)


def test_without_bos_the_first_token_is_only_read(without_bos):
    found, ids = text_perplexity(without_bos, documents(SHORT)), without_bos.tokenizer.encode(SHORT)
    unread = len(without_bos.tokenizer.decode(ids[:1]))
    assert (found.tokens, found.bytes) == (len(ids) - 1, len(SHORT) - unread)


@pytest.mark.parametrize("stride", [-1, 40, 1.5])
def test_a_stride_out_of_range_is_refused(llm, stride):
    with pytest.raises(UsageError, match=r"^stride=.*expected 1 to 39, less than the context; 0: "):
        text_perplexity(llm, documents(SHORT), stride)
