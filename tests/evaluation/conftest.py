"""A small checkpoint, and the model in it, for all tests of this folder."""

import dataclasses

import pytest
from tiny_weights import tiny_weights

from llama_jax.formats import checkpoint as checkpoint_folder
from llama_jax.llm import LLM
from llama_jax.text.sentencepiece import train_tokenizer

TEXTS = [f"Tim saw {n} red boats on the blue sea and Anna was glad." for n in range(60)]
CONTEXT = 40


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint whose texts begin with BOS; beside it, in `plain`, one whose texts do not."""
    place = tmp_path_factory.mktemp("evaluation")
    tokenizer = train_tokenizer(TEXTS, 320, place / "t.model").path.read_bytes()
    weights = tiny_weights(
        tokenizer=tokenizer, vocab_size=320, num_layers=1, context_length=CONTEXT
    )
    checkpoint_folder.write(weights, place / "ckpt")
    checkpoint_folder.write(dataclasses.replace(weights, bos=False), place / "plain")
    return place / "ckpt"


@pytest.fixture(scope="session")
def llm(checkpoint):
    return LLM(checkpoint)


@pytest.fixture(scope="session")
def without_bos(checkpoint):
    """A model whose texts do not begin with BOS."""
    return LLM(checkpoint.with_name("plain"))
