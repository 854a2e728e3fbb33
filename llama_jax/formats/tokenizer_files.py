"""Tokenizer files of every kind as the two that we keep: tokenizer.model and tokenizer.json."""

import dataclasses
import json
from pathlib import Path

from llama_jax.errors import UserError, warn
from llama_jax.formats import byte_level
from llama_jax.formats.llama2c import tokenizer as llama2c
from llama_jax.formats.meta import ranks
from llama_jax.formats.vocabulary import LOWEST, Kind, Piece, Vocabulary
from llama_jax.text.huggingface import parse_json, pieces
from llama_jax.text.tokenizer import JSON, parse_tokenizer, read_file, tokenizer_file_name

MOST_UNUSED = 1024  # rows beyond the tokenizer; padding to multiples of 1024 leaves fewer


def read_tokenizer_file(path: Path, rows: int) -> bytes:
    """Return the content of a tokenizer.model or tokenizer.json with a piece for each row.

    A tokenizer.bin of llama2.c becomes a SentencePiece model, a ranks file of Llama 3 a
    tokenizer.json.

    Args:
      rows: of the model's embedding.

    Raises:
      UserError: if the file is missing, damaged, of another kind, or has more pieces than rows.
    """
    content = read_file(path)
    if llama2c.is_tokenizer_bin(content):
        vocabulary = llama2c.read(path)
        if (size := len(vocabulary.pieces)) != rows:  # a file that is cut short shows it here alone
            raise wrong_size(path, size, rows)
        content = vocabulary.to_model()
    elif ranks.is_ranks(content):
        content = ranks.to_json(content, rows, path)
    return fit_rows(content, rows, path)


def fit_rows(content: bytes, rows: int, source: Path) -> bytes:
    """Return the content of a tokenizer file with a piece for each row of the embedding.

    Rows beyond the last piece, as embeddings are padded with, get unused pieces, with a warning.
    Tokens of a tokenizer.json that were added beyond the last row are left out. The result is
    loaded once, so that it can be relied on.

    Args:
      source: of the tokenizer, for messages.

    Raises:
      UserError: if the tokenizer is damaged, has more pieces than rows, or far fewer.
    """
    is_json = tokenizer_file_name(content) == JSON
    size = parse_tokenizer(content, source).vocab_size
    if size == rows:
        return content
    fitted = _fit_json(content, rows, source) if is_json else _fit_model(content, rows)
    if not 0 <= rows - size < MOST_UNUSED and fitted is content:
        raise wrong_size(source, size, rows)
    if size < rows:
        names = f"ids {size:,} to {rows - 1:,}" if rows - size > 1 else f"id {size:,}"
        warn(f"{source} has {size:,} pieces and the model {rows:,} rows; {names} are unused")
    parse_tokenizer(fitted, source)
    return fitted


def wrong_size(source: Path, size: int, rows: int) -> UserError:
    """Return the error of a tokenizer with a number of pieces that cannot be the model's."""
    sizes = f"tokenizer {source} has {size:,} pieces and the model {rows:,} rows for them"
    return UserError(f"{sizes}; give the tokenizer that it was trained with by --tokenizer")


def _fit_model(content: bytes, rows: int) -> bytes:
    """Return a SentencePiece model with unused pieces; itself if that is not possible."""
    vocabulary = Vocabulary.from_model(content)
    size = len(vocabulary.pieces)
    if not size < rows < size + MOST_UNUSED:
        return content
    taken = {piece.text: None for piece in vocabulary.pieces}
    names = [byte_level.unused_name(token, taken) for token in range(size, rows)]
    unused = [Piece(name, LOWEST, Kind.UNUSED) for name in names]
    return dataclasses.replace(vocabulary, pieces=(*vocabulary.pieces, *unused)).to_model()


def _fit_json(content: bytes, rows: int, source: Path) -> bytes:
    """Return a tokenizer.json with unused control tokens, or fewer; itself if it cannot be."""
    values = parse_json(content, source)
    added = [token for token in values["added_tokens"] if token["id"] < rows]
    texts = pieces(values | {"added_tokens": added}, source)
    size = max(texts) + 1
    if not size <= rows < size + MOST_UNUSED:
        return content
    taken = dict.fromkeys(texts.values())
    for token in range(size, rows):
        name = byte_level.unused_name(token, taken)
        added.append(byte_level.added_token(token, name, special=True))
    return json.dumps(values | {"added_tokens": added}, ensure_ascii=False).encode()
