"""SentencePiece models (tokenizer.model): encoding, decoding, and training a new one."""

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError, first_line
from llama_jax.text.decoding import SPACE, Decoder, Tokenizer, require_no_surrogate

LONGEST_LINE = 4096  # characters given to the trainer at once
MODEL_TYPES = ("bpe", "unigram", "char")
SMALLEST_CHAR = 259  # pieces of a "char" model without characters
MOST_LINES = 5_000_000  # the trainer holds them all in memory


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    "▁" (U+2581) is decoded as a space, because that is its meaning in SentencePiece.
    """

    def __init__(self, model: bytes, path: Path) -> None:
        """Load a model, the content of the file at `path`.

        Raises:
          UserError: if it is cut short, or not a SentencePiece model.
        """
        from sentencepiece import SentencePieceProcessor

        self.path = path
        _require_complete(model, path)
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, UnicodeDecodeError) as error:
            message = f"tokenizer {path} is not a SentencePiece model: {first_line(error)}"
            raise UserError(f"{message}; give a tokenizer.model or tokenizer.json") from error
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        ids = filter(self._processor.is_control, range(self.vocab_size))
        self.special_ids: Mapping[str, int] = {self._text(i): i for i in ids}

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Return the ids of a text as int32; see `Tokenizer`."""
        if continues and self._adds_space:
            text = text.removeprefix(" ")
        try:
            return self._processor.encode_as_numpy(text)
        except RuntimeError:
            require_no_surrogate(text)
            raise

    def new_decoder(self) -> Decoder:
        """Return an incremental decoder at the start of a text."""
        return Decoder(self._surfaces, self._adds_space, self._joins_spaces)

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether the model adds a space before every text."""
        return self._processor.normalize("a").startswith(SPACE)

    @functools.cached_property
    def _joins_spaces(self) -> bool:
        """Whether the model strips a text and joins consecutive spaces."""
        return SPACE * 2 not in self._processor.normalize("a  a")

    @functools.cached_property
    def _surfaces(self) -> list[str | bytes]:
        """What each id adds to a text; see `Decoder`."""
        return [self._surface(token) for token in range(self.vocab_size)]

    def _surface(self, token: int) -> str | bytes:
        if self._processor.is_control(token):
            return ""
        text = self._text(token)
        return bytes([int(text[1:-1], 16)]) if self._processor.is_byte(token) else text  # "<0x0A>"

    def _text(self, token: int) -> str:
        """Return a piece, or what the unknown one stands for; `UserError` if it is not UTF-8."""
        try:
            if self._processor.is_unknown(token):
                return self._processor.decode([token])
            return self._processor.id_to_piece(token)
        except UnicodeDecodeError as error:
            message = f"piece {token} of tokenizer {self.path} is not UTF-8; copy the file again"
            raise UserError(message) from error


# ---- model files ----


def _require_complete(model: bytes, path: Path) -> None:
    """Raise `UserError` if a SentencePiece model is cut short."""
    fields, is_complete = _protobuf_fields(model)
    if 1 in fields and not (is_complete and fields >= {1, 2, 3}):
        raise UserError(f"tokenizer {path} is cut short after {len(model):,} bytes; copy it again")


def _protobuf_fields(data: bytes) -> tuple[set[int], bool]:
    """Return the top-level field numbers of a protobuf message, and whether the last is complete.

    A SentencePiece model has pieces (1), then the settings of the trainer (2) and the normalizer
    (3). A file that is truncated between two fields loads without an error, but encodes
    differently.
    """
    fields, position = set(), 0
    while position < len(data) and data[position] & 7 == 2:  # all its fields have a length
        fields.add(data[position] >> 3)
        length, shift = 0, 0
        while (position := position + 1) < len(data) and shift < 63:
            length |= (data[position] & 127) << shift
            shift += 7
            if data[position] < 128:
                break
        position += 1 + length
    return fields, position == len(data)


# ---- training ----


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str], model_type: str = "bpe"
) -> SentencePieceTokenizer:
    """Train a model on texts and write it to `path` atomically.

    The texts are held in memory, so pass a sample of a large corpus. As with SentencePiece's own
    reader, the trainer gets single lines, so that no piece but the byte has a newline. The same
    texts give the same file on every machine.

    Args:
      vocab_size: pieces, bytes and special tokens included; of "char" the most: there are no more
        than characters, and the rarest become bytes where that is too few.
      model_type: one of `MODEL_TYPES`: "bpe" (Sennrich et al. 2016), "unigram" (Kudo 2018), or
        "char", a piece for each character.

    Raises:
      UserError: if the texts are too short or have too many different characters for `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,  # as in Llama 2's: decoding restores every text
            unk_surface=" \u2047 ",
            max_sentence_length=4 * LONGEST_LINE,  # in bytes; a longer line would be skipped
            input_sentence_size=MOST_LINES,
            shuffle_input_sentence=False,  # its shuffle is not reproducible
            num_threads=16,  # written into the model, hence the same for every machine
            minloglevel=3,
        )
    except RuntimeError as error:
        if "KeyboardInterrupt" in str(error):  # Ctrl-C while it asked for the next line
            raise KeyboardInterrupt from None
        raise UserError(_training_error(str(error), vocab_size)) from error
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return SentencePieceTokenizer(model.getvalue(), path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of texts, split where they are longer than the trainer accepts."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def _training_error(message: str, vocab_size: int) -> str:
    """Return an error of SentencePiece in one line, with the vocabulary size that would work."""
    if most := re.search(r"too high .* <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too large for this text, which has at most"
            f" {most[1]} pieces; use a vocab_size of {most[1]} or less, or more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small: bytes and single characters of this text"
            f" alone are {least[1]} pieces; use a vocab_size of {least[1]} or more"
        )
    if "char_model_trainer" in message:
        return (
            f"vocab_size={vocab_size} is too small: bytes and special tokens alone are"
            f" {SMALLEST_CHAR}; use a vocab_size of {SMALLEST_CHAR + 1} or more"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "there is no text to train a tokenizer on; expected more than whitespace"
    if "vocab_size() > (0)" in message or "vocab_size()) > (0)" in message:
        return f"vocab_size={vocab_size} is out of range; expected some hundreds or thousands"
    return f"SentencePiece cannot train on this text: {message}"
