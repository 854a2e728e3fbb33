"""Small tokenizers: a trained one, and one with the control tokens of chat formats."""

import pytest
from tiny_weights import tiny_vocabulary

from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.sentencepiece import train_tokenizer
from llama_jax.text.tokenizer import load_tokenizer

TEXTS = ["A system said: [INST] a user's task ### Response: an input, a context.\nThe end."] * 9
CONTROLS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_tokenizer(TEXTS, 300, tmp_path_factory.mktemp("trained") / "tokenizer.model")


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    pieces = tiny_vocabulary(330).pieces
    pieces += tuple(Piece(text, 0.0, Kind.CONTROL) for text in CONTROLS)
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    path.write_bytes(Vocabulary(pieces=pieces).to_model())
    return load_tokenizer(path)
