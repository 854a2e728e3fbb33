"""The token folders of a study: a corpus split contiguously, and a retrieval task.

Retrieval: in the first half of a sequence each of some keys has one value, a token of its own range
among noise. In the second half the keys' query tokens follow in random order, each before the value
that was seen. Only these answers count. To predict one, a model has to attend to one token by its
content, as far back as it is; chance is one in `VALUES`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.data.prepare.corpora import NAMES, Corpus, corpus_from_files, named_corpus
from llama_jax.data.prepare.documents import ReadOptions
from llama_jax.data.prepare.tokenize import TokenOptions, prepare
from llama_jax.data.token_folder import META, TokenFolder, TokenWriter
from llama_jax.errors import UserError, did_you_mean
from llama_jax.files import new_folder
from llama_jax.study.settings import RETRIEVAL, TEXT, Scale, data_folder
from llama_jax.text.tokenizer import save_tokenizer

VALIDATION_FRACTION = 0.1  # of the text, its end
KEYS, VALUES, NOISE = 16, 8, 16  # tokens: queries, values of each key, and noise
SMALLEST_VOCABULARY = KEYS * VALUES + KEYS + NOISE  # these tokens are its last ones
SHORTEST_SEQUENCE = 4 * KEYS
TRAINING_SEQUENCES, VALIDATION_SEQUENCES = 2**14, 256
SHARD_TOKENS = 100_000_000


def require_corpus(name: str) -> None:
    """Raise `UserError` unless this is the name of a corpus, or a text that exists."""
    if name not in NAMES and not Path(name).exists():
        expected = f"expected one of {', '.join(NAMES)}, or a text file or folder"
        raise UserError(f"corpus {name!r} does not exist{did_you_mean(name, NAMES)}; {expected}")


def prepare_data(scale: Scale, folder: Path, corpus: str) -> None:
    """Write the token folders of a study that do not exist yet.

    Raises:
      UserError: if the corpus cannot be had, or is too short.
    """
    text = data_folder(folder, TEXT)
    if not (text / META).is_file():
        options = TokenOptions(vocab_size=scale.vocab_size, workers=1)
        prepare(_corpus(corpus), text, options)
    opened = TokenFolder.open(text)
    for split, least in (("train", 2), ("validation", 1)):
        needed = least * 8 * scale.length + 1
        found = opened.splits[split].tokens
        if found < needed:
            raise UserError(
                f"corpus {corpus!r} has {found:,} tokens for {split}; expected at least {needed:,}:"
                " name a longer text"
            )
    if scale.retrieval_steps and not (data_folder(folder, RETRIEVAL) / META).is_file():
        write_retrieval_data(data_folder(folder, RETRIEVAL), opened, scale.length)


def _corpus(name: str) -> Corpus:
    if name in NAMES:
        return named_corpus(name, validation=VALIDATION_FRACTION)
    options = ReadOptions(split_at="none")
    return corpus_from_files(name, options=options, validation=VALIDATION_FRACTION)


def write_retrieval_data(output: Path, text: TokenFolder, length: int) -> None:
    """Write training and validation sequences of the retrieval task to a new token folder.

    Args:
      text: the folder whose tokenizer it gets, so that models have the same vocabulary.
      length: T, tokens of each sequence; windows of T + 1 tokens meet them exactly.
    """
    random = np.random.default_rng(0)
    with new_folder(output) as folder:
        save_tokenizer(text.tokenizer_path.read_bytes(), folder)
        writer = TokenWriter(folder, text.vocab_size, SHARD_TOKENS)
        try:
            for split, count in (
                ("train", TRAINING_SEQUENCES),
                ("validation", VALIDATION_SEQUENCES),
            ):
                tokens_RT = retrieval_sequences(count, length, length, text.vocab_size, random)
                starts = np.arange(count, dtype=np.int64) * length
                writer.add(split, tokens_RT.reshape(-1), starts, characters=0)
            writer.finish(bos=False, eos=False, source="retrieval task")
        finally:
            writer.close()


def retrieval_sequences(
    count: int, total: int, length: int, vocab_size: int, random: np.random.Generator
) -> np.ndarray:
    """Return sequences [R, total] of the retrieval task, as integers.

    Values are among the first length / 2 tokens and queries among the last length / 2; noise lies
    between them where `total` is more than the training length.
    """
    first = vocab_size - SMALLEST_VOCABULARY
    queries = first + KEYS * VALUES
    tokens_RT = random.integers(vocab_size - NOISE, vocab_size, (count, total))
    row_R1, half = np.arange(count)[:, None], length // 2
    value_RK = first + np.arange(KEYS) * VALUES + random.integers(0, VALUES, (count, KEYS))
    place_RK = np.argsort(random.random((count, half)), axis=1)[:, :KEYS]
    tokens_RT[row_R1, place_RK] = value_RK
    order_RK = np.argsort(random.random((count, KEYS)), axis=1)
    start = total - 2 * KEYS
    tokens_RT[:, start::2] = queries + order_RK
    tokens_RT[:, start + 1 :: 2] = np.take_along_axis(value_RK, order_RK, axis=1)
    return tokens_RT


def is_query(tokens: Any, vocab_size: int) -> Any:
    """Return whether each token asks for a value, which is the next one."""
    return (tokens >= vocab_size - NOISE - KEYS) & (tokens < vocab_size - NOISE)
