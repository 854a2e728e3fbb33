"""The interface of tokenizers, and loading one from a file of either kind."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.errors import UserError, describe_file
from llama_jax.text.decoding import Decoder
from llama_jax.text.huggingface import HuggingFaceTokenizer
from llama_jax.text.sentencepiece import SentencePieceTokenizer

TOKENIZER_FILES = MODEL, JSON = "tokenizer.model", "tokenizer.json"
LARGEST_FILE = 128 * 2**20  # bytes; Llama 3's tokenizer.json has 9 MB


class Tokenizer(Protocol):
    """Text to token ids and back.

    Text never becomes a control id: a literal "<s>" is encoded as its characters, and only
    `bos=True` and `eos=True` add such ids.
    """

    path: Path
    sha256: str  # of the file
    vocab_size: int
    bos_id: int  # -1: none
    eos_id: int  # -1: none
    special_ids: Mapping[str, int]  # of each control token, such as "<|im_end|>", by its text

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text, after BOS if `bos`, before EOS if `eos`, where they exist.

        Raises:
          UserError: if the text has a lone surrogate, which UTF-8 cannot express.
        """
        ...

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Return the ids of a text as int32, without BOS or EOS; can be called from many threads.

        Args:
          text: any text.
          continues: it continues another text; it gets the ids that it has there.
        """
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: nothing for control ids, U+FFFD for bytes that are not UTF-8.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        ...

    def decoder(self, after: Iterable[int] = ()) -> Decoder:
        """Return an incremental decoder for ids that follow the ids `after`, such as a prompt's."""
        ...

    def piece_text(self, token: int) -> str:
        """Return the text of an id by itself; U+FFFD for a byte that is not a whole character."""
        ...

    def piece_bytes(self, token: int) -> bytes:
        """Return the bytes that an id adds within a text; none for a control id."""
        ...


# ---- files ----


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
