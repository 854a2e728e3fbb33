"""Incremental decoding, at a constant cost per token: ids to text as they come.

It follows SentencePiece's rules for bytes and leading spaces exactly, and never returns half a
character.
"""

import codecs
import operator
from collections.abc import Iterable

from llama_jax.errors import UserError

SPACE = "▁"  # SentencePiece's symbol for a space in a piece (U+2581)


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
