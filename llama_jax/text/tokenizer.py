"""Token ids to text as they come, without ever showing half a character.

Follows SentencePiece's rules for bytes and leading spaces to the letter, at a constant cost per
token. It does not know where the surfaces of the ids come from.
"""

import codecs
import functools
import hashlib
import io
import operator
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError, describe_file

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


# The bytes of a tokenizer's file, and what is wrong with a file that is not one.
#
# Knows how a SentencePiece file is laid out, not what it means.

LARGEST_MODEL = 64 * 2**20  # bytes; Llama 2's has 0.5 MB


def read_model(path: Path) -> bytes:
    """The bytes of a model file, refused with the reason if they are evidently something else."""
    if path.is_dir():
        raise UserError(f"tokenizer {path} is a folder; give the tokenizer.model in it")
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; expected a SentencePiece model file")
    if path.stat().st_size > LARGEST_MODEL:
        raise UserError(not_a_model(path, f": it has {path.stat().st_size:,} bytes"))
    model = path.read_bytes()
    if why := describe_file(model[:512]):
        raise UserError(f"tokenizer {path} is {why}")
    fields, is_whole = _protobuf_fields(model)
    if 1 in fields and not (is_whole and fields >= {1, 2, 3}):
        raise UserError(f"tokenizer {path} is cut short after {len(model):,} bytes; copy it again")
    return model


def _protobuf_fields(data: bytes) -> tuple[set[int], bool]:
    """The field numbers at the top of a protobuf message, and whether the last field is whole.

    A SentencePiece model is pieces (1), then the trainer's (2) and normalizer's (3) settings. One
    that is cut between two fields loads without complaint, and then encodes differently.
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


def not_a_model(path: Path, why: str = "") -> str:
    """The complaint about a file that is no SentencePiece model."""
    return f"tokenizer {path} is not a SentencePiece model{why}; give a file like tokenizer.model"


# Text to token ids and back with a SentencePiece model, and the training of such a model.
#
# The only file that knows SentencePiece. It does not know chat templates, documents or tensors.

LONGEST_LINE = 4096  # characters given to the trainer at once
MOST_LINES = 5_000_000  # the trainer holds them all in memory


class Tokenizer:
    """A SentencePiece model: text in, ids out, and back.

    Text never becomes a control id: the literal "<s>" is encoded as the three characters it is,
    and only `bos=True` and `eos=True` put such ids in. "▁" (U+2581) is decoded as a space, since
    that is what SentencePiece means by it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load a model file; `UserError` if it is missing or is something else."""
        from sentencepiece import SentencePieceProcessor

        self.path = Path(path)
        model = read_model(self.path)
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(not_a_model(self.path)) from error
        self.sha256: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise UserError(f"{path} has no <s> or no </s> piece; Llama 2 tokenizers have both")

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """The ids of a text, after BOS if `bos`, before EOS if `eos`.

        Raises:
          UserError: if the text holds a lone surrogate, which no UTF-8 can express.
        """
        ids = self.encode_array(text).tolist()
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        """The ids of a text as int32, without BOS or EOS; many threads may encode at once.

        A text that `continues` another and begins with a space gets the ids it has inside that
        other text: SentencePiece puts a space before every text, so ours is left out.
        """
        if continues and self._adds_space:
            text = text.removeprefix(" ")
        try:
            return self._processor.encode_as_numpy(text)
        except RuntimeError as error:
            lone = re.search("[\ud800-\udfff]", text)
            if lone is None:
                raise
            message = f"the text has a lone surrogate, U+{ord(lone[0]):04X}, at character"
            raise UserError(f"{message} {lone.start()}; remove it") from error

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; control ids have none, bytes that are no UTF-8 become U+FFFD.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        decoder = self.decoder()
        return decoder.push(ids) + decoder.flush()

    def decoder(self, after: Iterable[int] = ()) -> Decoder:
        """An incremental decoder for ids that follow the ids `after`, such as a prompt's.

        The space that SentencePiece puts before a text is dropped where the text starts; ids that
        follow a prompt of more than BOS do not start it and keep theirs.
        """
        decoder = Decoder(self._surfaces, self._adds_space, self._joins_spaces)
        decoder.push(after)
        decoder.flush()
        return decoder

    def piece_text(self, token: int) -> str:
        """What an id says by itself; a byte that is no whole character shows as U+FFFD."""
        surface = self._surfaces[token]
        if isinstance(surface, bytes):
            return surface.decode(errors="replace")
        return surface.replace(SPACE, " ")

    @functools.cached_property
    def _adds_space(self) -> bool:
        """Whether the model puts a space before every text."""
        return self._processor.normalize("a").startswith(SPACE)

    @functools.cached_property
    def _joins_spaces(self) -> bool:
        """Whether the model strips a text and turns runs of spaces into one."""
        return SPACE * 2 not in self._processor.normalize("a  a")

    @functools.cached_property
    def _surfaces(self) -> list[str | bytes]:
        """What each id adds to a text, as `Decoder` wants it."""
        return [self._surface(token) for token in range(self.vocab_size)]

    def _surface(self, token: int) -> str | bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        if self._processor.is_unknown(token):
            return self._processor.decode([token])
        return "" if self._processor.is_control(token) else piece


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, path: str | os.PathLike[str]
) -> Tokenizer:
    """Learn a BPE model from texts and write it to `path`, whole or not at all.

    The texts are held in memory, so pass a sample of a large corpus. Like SentencePiece's own
    reader this looks at single lines, so that only the byte piece holds a newline. The same
    texts give the same file on every machine.

    Raises:
      UserError: if the texts are too short or have too many different characters for `vocab_size`.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,  # as in Llama 2's: every text survives a round trip
            unk_surface=" \u2047 ",
            max_sentence_length=4 * LONGEST_LINE,  # in bytes; a longer line would be skipped
            input_sentence_size=MOST_LINES,
            shuffle_input_sentence=False,  # its shuffle is not reproducible
            num_threads=16,  # written into the model, hence the same for every machine
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_training_problem(str(error), vocab_size)) from error
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(model.getvalue())
    partial.replace(path)
    return Tokenizer(path)


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of texts, cut where they are longer than the trainer would accept."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LONGEST_LINE):
                yield line[start : start + LONGEST_LINE]


def _training_problem(message: str, vocab_size: int) -> str:
    """SentencePiece's complaint in our words, with the size that would work."""
    if most := re.search(r"too high .* <= (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too large for this text, which gives at most"
            f" {most[1]} pieces; use a vocab_size of {most[1]} or less, or more text"
        )
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size={vocab_size} is too small: bytes and single characters of this text"
            f" alone are {least[1]} pieces; use a vocab_size of {least[1]} or more"
        )
    if "sentences_.empty()" in message or "all_chars_count" in message:
        return "there is no text to train a tokenizer on; expected more than blanks"
    if "vocab_size() > (0)" in message or "vocab_size()) > (0)" in message:
        return f"vocab_size={vocab_size} is out of range; expected some hundreds or thousands"
    return f"SentencePiece cannot train on this text: {message}"
