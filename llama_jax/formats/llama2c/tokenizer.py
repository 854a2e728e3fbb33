"""llama2.c's tokenizer.bin: pieces and scores, and nothing about what they are for.

That is inferred, as llama2.c's code takes it for granted: 0 is <unk>, 1 is <s>, 2 is </s>, and
<0x00> to <0xFF> are bytes.
"""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import UserError, describe_file
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.tokenizer import SPACE, Tokenizer

LARGEST = 16 * 2**20  # bytes; Llama 2's has 0.4 MB
CONTROLS = ("<unk>", "<s>", "</s>")  # their ids are their places
WRITTEN = {1: "\n<s>\n", 2: "\n</s>\n"}  # how the file has two of them
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # ids from 3 on
ADVICE = "give llama2.c's tokenizer.bin or a tokenizer.model"


def read(path: Path, vocab_size: int = 0) -> Vocabulary:
    """The vocabulary in a file.

    Args:
      vocab_size: how many pieces there have to be; 0: any number.

    Raises:
      UserError: if the file is damaged, something else, or of another size.
    """
    data = _read_bytes(path)
    pieces = tuple(_pieces(path, data))
    if tuple(piece.text for piece in pieces[:3]) != CONTROLS:
        raise UserError(f"tokenizer {path} does not begin with <unk>, <s>, </s>; {ADVICE}")
    if vocab_size and len(pieces) != vocab_size:
        raise UserError(
            f"tokenizer {path} has {len(pieces)} pieces and the model {vocab_size};"
            " give the tokenizer it was trained with"
        )
    return Vocabulary(pieces=pieces)


def write(vocabulary: Vocabulary, path: Path) -> None:
    """Write a vocabulary as a new file.

    llama2.c puts a space before every text and leaves others as they are, whatever ours does.

    Raises:
      UserError: if llama2.c would take ids for something else than they are.
    """
    texts = [piece.text for piece in vocabulary.pieces]
    ids = (vocabulary.unknown_id, vocabulary.bos_id, vocabulary.eos_id)
    if ids != (0, 1, 2) or texts[3 : 3 + len(BYTES)] != BYTES:
        raise UserError(
            "llama2.c cannot use this tokenizer: it takes ids 0, 1 and 2 for <unk>, <s> and </s>"
            " and 3 to 258 for bytes; choose another format"
        )
    written = [WRITTEN.get(token, text.replace(SPACE, " ")) for token, text in enumerate(texts)]
    encoded = [text.encode() for text in written]
    with path.open("xb") as file:
        file.write(struct.pack("<i", max(map(len, encoded))))
        for piece, text in zip(vocabulary.pieces, encoded):
            file.write(struct.pack("<fi", piece.score, len(text)) + text)


def _read_bytes(path: Path) -> bytes:
    """The bytes of a file that may be one of these."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"tokenizer {path} {what}; {ADVICE}")
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"tokenizer {path} is no tokenizer.bin: it has {size:,} bytes; {ADVICE}")
    data = path.read_bytes()
    if why := describe_file(data[:64]):
        raise UserError(f"tokenizer {path} is {why}")
    return data


def _pieces(path: Path, data: bytes) -> Iterator[Piece]:
    """The pieces up to the end of the file."""
    longest = struct.unpack_from("<i", data)[0] if len(data) >= 4 else 0
    if not 1 <= longest <= len(data):
        hint = ", or is older than August 2023" if longest == 0 else ""
        raise UserError(f"tokenizer {path} is no tokenizer.bin{hint}; {ADVICE}")
    position, token = 4, 0
    while position < len(data):
        if position + 8 > len(data):
            raise UserError(f"tokenizer {path} is cut short within piece {token}; copy it again")
        score, length = struct.unpack_from("<fi", data, position)
        position += 8
        if not 1 <= length <= longest or not math.isfinite(score):
            raise UserError(
                f"tokenizer {path} is damaged: piece {token} has {length} bytes and a score of"
                f" {score:g}; expected 1 to {longest} bytes and a finite score"
            )
        if position + length > len(data):
            raise UserError(f"tokenizer {path} is cut short within piece {token}; copy it again")
        yield _piece(path, token, data[position : position + length], score)
        position, token = position + length, token + 1


def _piece(path: Path, token: int, written: bytes, score: float) -> Piece:
    try:
        text = written.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"tokenizer {path} is damaged: piece {token} is no UTF-8") from error
    if token < len(CONTROLS):
        kind = Kind.CONTROL if token else Kind.UNKNOWN
        return Piece(text.strip("\n"), score, kind)
    kind = Kind.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else Kind.NORMAL
    return Piece(text.replace(" ", SPACE), score, kind)


# The tokenizer that a user names for a model whose files carry none.
#
# Does not know models; it compares vocabulary sizes.


def tokenizer_model(path: Path, vocab_size: int) -> bytes:
    """A SentencePiece model from a tokenizer.model, or made from llama2.c's tokenizer.bin.

    Args:
      vocab_size: of the model; 0 if it is not known.

    Raises:
      UserError: if the file is neither, is damaged, or has another number of pieces.
    """
    if _is_bin(path):
        model = read(path, vocab_size).to_model()
        _require_loadable(path, model)
        return model
    tokenizer = Tokenizer(path)
    if vocab_size and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces and the model {vocab_size};"
            " give the tokenizer it was trained with"
        )
    return path.read_bytes()


def _is_bin(path: Path) -> bool:
    """Whether a file begins with a small int32, as none of SentencePiece's can."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4)
    return len(head) == 4 and head[2:] == b"\0\0"


def _require_loadable(path: Path, model: bytes) -> None:
    """`UserError` if SentencePiece refuses a model, for bytes that lack or a piece that repeats."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().LoadFromSerializedProto(model)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise UserError(f"tokenizer {path} is damaged, says SentencePiece: {why}") from error
