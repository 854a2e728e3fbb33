"""Token ids to text as they come, without ever showing half a character.

Follows SentencePiece's rules for bytes and leading spaces to the letter, at a constant cost per
token. It does not know where the surfaces of the ids come from.
"""

import codecs
import operator
from collections.abc import Iterable

from llama_jax.errors import UserError

SPACE = "▁"  # how SentencePiece spells a space inside a piece


class Decoder:
    """Ids in, text out, as they come; never half a character. Made by `Tokenizer.decoder`."""

    def __init__(self, surfaces: list[str | bytes], drops_space: bool, joins_spaces: bool) -> None:
        """Start a text.

        Args:
          surfaces: by id, the piece with its spaces as `SPACE`, or one byte of a character.
          drops_space: whether the space that starts the text is SentencePiece's own.
          joins_spaces: whether all spaces that start the text are.
        """
        self._surfaces = surfaces
        self._joins_spaces = joins_spaces
        self._at_start = drops_space
        self._characters = codecs.getincrementaldecoder("utf-8")("one_mark_per_byte")

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; the bytes of an incomplete character are held back.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        return "".join([self._push(operator.index(token)) for token in ids])

    def flush(self) -> str:
        """What was held back, as U+FFFD for each byte, since nothing can complete it any more."""
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


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    """Replace bad bytes as SentencePiece does, which marks each of them."""
    assert isinstance(error, UnicodeDecodeError)
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error("one_mark_per_byte", _one_mark_per_byte)
