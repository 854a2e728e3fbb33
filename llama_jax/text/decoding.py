"""What all tokenizers have in common: their interface, and incremental decoding.

Decoding has a constant cost per token. It follows SentencePiece's rules for bytes and leading
spaces exactly, and never returns half a character.
"""

import codecs
import operator
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from llama_jax.errors import UserError

SPACE = "▁"  # SentencePiece's symbol for a space in a piece (U+2581)


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

    @property
    def _surfaces(self) -> list[str | bytes]:
        """What each id adds to a text; see `Decoder`."""
        ...

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        """Return the ids of a text as int32, without BOS or EOS; can be called from many threads.

        Args:
          text: any text.
          continues: it continues another text and begins with a space; it gets the ids that it has
            there, without the space that a tokenizer adds before every text.

        Raises:
          UserError: if the text has a lone surrogate, which UTF-8 cannot express.
        """
        ...

    def new_decoder(self) -> "Decoder":
        """Return an incremental decoder at the start of a text."""
        ...

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text, after BOS if `bos`, before EOS if `eos`, where they exist.

        Raises:
          UserError: as `encode_array`.
        """
        before = [self.bos_id] if bos and self.bos_id >= 0 else []
        after = [self.eos_id] if eos and self.eos_id >= 0 else []
        return before + self.encode_array(text).tolist() + after

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids: nothing for control ids, U+FFFD for bytes that are not UTF-8.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        decoder = self.new_decoder()
        return decoder.push(ids) + decoder.flush()

    def decoder(self, after: Iterable[int] = ()) -> "Decoder":
        """Return an incremental decoder for ids that follow the ids `after`, such as a prompt's.

        A space that the tokenizer adds before a text is dropped at the start of the text; ids after
        a prompt of more than BOS keep theirs.
        """
        decoder = self.new_decoder()
        decoder.push(after)
        decoder.flush()
        return decoder

    def piece_text(self, token: int) -> str:
        """Return the text of an id by itself; U+FFFD for a byte that is not a whole character."""
        return self.piece_bytes(token).decode(errors="replace")

    def piece_bytes(self, token: int) -> bytes:
        """Return the bytes that an id adds within a text; none for a control id."""
        surface = self._surfaces[token]
        return surface if isinstance(surface, bytes) else surface.replace(SPACE, " ").encode()


def require_no_surrogate(text: str) -> None:
    """Raise `UserError` if a text has a lone surrogate, which UTF-8 cannot express."""
    if lone := re.search("[\ud800-\udfff]", text):
        message = f"the text has a lone surrogate, U+{ord(lone[0]):04X}, at character"
        raise UserError(f"{message} {lone.start()}; remove it")


class Decoder:
    """Turns ids into text as they come; made by `Tokenizer.decoder`."""

    def __init__(
        self,
        surfaces: list[str | bytes],
        drops_space: bool,
        joins_spaces: bool,
        errors: str = "replace_each_byte",
    ) -> None:
        """Start a text.

        Args:
          surfaces: for each id, its piece with `SPACE` for spaces, or one byte of a character.
          drops_space: whether the first space of the text was added by SentencePiece.
          joins_spaces: whether all spaces at the start of the text were.
          errors: how U+FFFD replaces bytes that are not UTF-8: "replace_each_byte" as in
            SentencePiece, or "replace", once for each part of a character, as in byte-level BPE.
        """
        self._surfaces = surfaces
        self._joins_spaces = joins_spaces
        self._at_start = drops_space
        self._characters = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these ids complete; bytes of an incomplete character are held back.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        return "".join([self._push(operator.index(token)) for token in ids])

    def flush(self) -> str:
        """Return U+FFFD for the bytes held back, when no more ids will come."""
        return self._characters.decode(b"", final=True)

    def _push(self, token: int) -> str:
        if not 0 <= token < len(self._surfaces):
            raise UserError(
                f"token id {token} is outside the vocabulary of {len(self._surfaces)} pieces;"
                f" expected 0 to {len(self._surfaces) - 1}"
            )
        surface = self._surfaces[token]
        if isinstance(surface, bytes):
            self._at_start = False
            return self._characters.decode(surface)
        if self._at_start and surface:
            surface = surface.removeprefix(SPACE)
            self._at_start = self._joins_spaces and not surface
        return self.flush() + surface.replace(SPACE, " ")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace each invalid byte by U+FFFD, as SentencePiece does."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("replace_each_byte", _replace_each_byte)
