"""A small trained tokenizer."""

import pytest

from llama_jax.text.sentencepiece import train_tokenizer

TEXTS = ["A system said: [INST] a user's task ### Response: an input, a context.\nThe end."] * 9


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("trained") / "tokenizer.model")
