"""Small byte-level tokenizers of the `tokenizers` library, and their keys in a GGUF file."""

import json

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from llama_jax.formats import byte_level
from llama_jax.formats.byte_level import PRE_TOKENIZERS
from llama_jax.formats.gguf.header import Keys

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = ["It's 12345 cats, don't\n\n  you THINK? naïve 日本語 🙂 def f(x): return [x]\r\n"] * 2
TEXTS = [
    *CORPUS,
    "'LL 'll it'S  2024-11-29\t\r\n x   y",
    "a1b22c333 $+<=>^~|` ...!?",
    "camelCase HTTPServer ÀÉß ǅ",
    "日本 12 语言,。한국어",
    "<|im_end|> é e\u0301 \x00\xa0\u200b",
]
ROWS = 305


def library_of(name):
    """A tokenizer of the library with the pre-tokenizer of that name, trained on a little text."""
    made = tokenizers.Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[name].ignore_merges))
    steps, use_regex = PRE_TOKENIZERS[name].patterns, False
    if steps[-1] == byte_level.GPT2:
        steps, use_regex = steps[:-1], True
    splits = [pre_tokenizers.Split(tokenizers.Regex(step), "isolated") for step in steps]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, level])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=ROWS, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
        ),
    )
    return made


def keys_of(library, name, **changes):
    """The keys of a GGUF file that another program would write."""
    values = json.loads(library.to_str())
    vocab = values["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)
    merges = [" ".join(merge) for merge in values["model"]["merges"]]
    keys = {
        "model": "gpt2",
        "pre": name,
        "tokens": pieces,
        "token_type": np.array([3 if text in SPECIAL else 1 for text in pieces], np.int32),
        "merges": merges,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    keys = {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items()}
    return Keys("model.gguf", {key: value for key, value in keys.items() if value is not None})
