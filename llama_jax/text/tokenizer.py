"""Tokenizer files of both kinds: which one a file is, and loading it as a `Tokenizer`."""

import os
from pathlib import Path

from llama_jax.errors import UserError, describe_file
from llama_jax.text.decoding import Tokenizer as Tokenizer
from llama_jax.text.huggingface import HuggingFaceTokenizer
from llama_jax.text.sentencepiece import SentencePieceTokenizer

TOKENIZER_FILES = MODEL, JSON = "tokenizer.model", "tokenizer.json"
LARGEST_FILE = 128 * 2**20  # bytes; Llama 3's tokenizer.json has 9 MB


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a tokenizer file, of the kind that its content says.

    Raises:
      UserError: if it is missing, damaged, or of an unknown kind.
    """
    path = Path(path)
    return parse_tokenizer(read_file(path), path)


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """Return the tokenizer in the content of a file; errors, which name the path, as above."""
    if tokenizer_file_name(content) == JSON:
        return HuggingFaceTokenizer(content, path)
    return SentencePieceTokenizer(content, path)


def tokenizer_file_name(content: bytes) -> str:
    """Return the name of a file with this content: tokenizer.model or tokenizer.json."""
    return JSON if content.lstrip()[:1] == b"{" else MODEL


def save_tokenizer(content: bytes, folder: Path) -> Path:
    """Write a tokenizer's content into a folder, and return the path of the file."""
    path = folder / tokenizer_file_name(content)
    path.write_bytes(content)
    return path


def tokenizer_path(folder: Path) -> Path:
    """Return the path of the tokenizer in a folder; of tokenizer.model if there is none."""
    path = folder / JSON
    return path if path.is_file() and not (folder / MODEL).exists() else folder / MODEL


def read_file(path: Path) -> bytes:
    """Return the content of a tokenizer file.

    Raises:
      UserError: if it is missing, or evidently another file.
    """
    if path.is_dir():
        raise UserError(f"tokenizer {path} is a folder; give the {MODEL} or {JSON} in it")
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; expected a {MODEL} or {JSON}")
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise UserError(f"tokenizer {path} has {size:,} bytes; expected a {MODEL} or {JSON}")
    content = path.read_bytes()
    if reason := describe_file(content[:512]):
        raise UserError(f"tokenizer {path} is {reason}")
    return content
