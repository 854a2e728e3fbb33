"""llama2.c's tokenizer.bin: pieces and scores, without the kinds of pieces.

The kinds are inferred as llama2.c's code assumes them: 0 is <unk>, 1 is <s>, 2 is </s>, and <0x00>
to <0xFF> are bytes.
"""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from llama_jax.errors import UserError, describe_file, warn
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.decoding import SPACE

MAX_BYTES = 16 * 2**20  # Llama 2's has 0.4 MB
CONTROLS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2
WRITTEN = {1: "\n<s>\n", 2: "\n</s>\n"}  # the texts of two of them in a file
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]  # ids from 3 on
ADVICE = "give llama2.c's tokenizer.bin or a tokenizer.model"


def read(path: Path) -> Vocabulary:
    """Return the vocabulary in a file; `UserError` if it is damaged or something else."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"tokenizer {path} {what}; {ADVICE}")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise UserError(f"tokenizer {path} is no tokenizer.bin: it has {size:,} bytes; {ADVICE}")
    data = path.read_bytes()
    if why := describe_file(data[:64]):
        raise UserError(f"tokenizer {path} is {why}")
    pieces = tuple(_pieces(path, data))
    if tuple(piece.text for piece in pieces[:3]) != CONTROLS:
        raise UserError(f"tokenizer {path} does not begin with <unk>, <s>, </s>; {ADVICE}")
    return Vocabulary(pieces=pieces)


def write(vocabulary: Vocabulary, path: Path) -> None:
    """Write a vocabulary as a new file; warn if llama2.c gives some texts other ids than it does.

    Raises:
      UserError: if llama2.c would give other ids to every text, or ids are not where it expects
        them.
    """
    texts = [piece.text for piece in vocabulary.pieces]
    ids = (vocabulary.unknown_id, vocabulary.bos_id, vocabulary.eos_id)
    if ids != (0, 1, 2) or texts[3 : 3 + len(BYTES)] != BYTES:
        raise UserError(
            "llama2.c cannot use this tokenizer: it takes ids 0, 1 and 2 for <unk>, <s> and </s>"
            " and 3 to 258 for bytes; choose another format"
        )
    if not vocabulary.adds_space:
        raise UserError(
            "llama2.c cannot use this tokenizer: it puts a space before every text, and this"
            " tokenizer none; choose another format"
        )
    if lost := differences(vocabulary):
        warn(f"llama2.c does not know that in this tokenizer {', '.join(lost)}; some ids differ")
    written = [WRITTEN.get(token, text.replace(SPACE, " ")) for token, text in enumerate(texts)]
    encoded = [text.encode() for text in written]
    with path.open("xb") as file:
        file.write(struct.pack("<i", max(map(len, encoded))))
        for piece, text in zip(vocabulary.pieces, encoded):
            file.write(struct.pack("<fi", piece.score, len(text)) + text)


def differences(vocabulary: Vocabulary) -> list[str]:
    """Return for what a vocabulary does with some texts that llama2.c does not.

    llama2.c does not change texts, and finds no piece in one before it is split into characters.
    """
    found = ["spaces are joined"] if vocabulary.joins_spaces else []
    found += ["characters are replaced"] if vocabulary.characters else []
    whole = [repr(p.text) for p in vocabulary.pieces if p.kind == Kind.USER_DEFINED]
    return found + ([f"{whole[0]} is always one piece"] if whole else [])


def has_pieces(path: Path, vocabulary: Vocabulary) -> bool:
    """Return whether a file holds the pieces of a vocabulary; not if it is damaged."""
    try:
        found = read(path).pieces
    except UserError:
        return False
    return [piece.text for piece in found] == [piece.text for piece in vocabulary.pieces]


def is_tokenizer_bin(content: bytes) -> bool:
    """Return whether a file begins as a tokenizer.bin does, with a small int32."""
    return len(content) >= 4 and content[2:4] == b"\0\0"


def _pieces(path: Path, data: bytes) -> Iterator[Piece]:
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
        raise UserError(f"tokenizer {path} is damaged: piece {token} is not UTF-8") from error
    if token < len(CONTROLS):
        kind = Kind.CONTROL if token else Kind.UNKNOWN
        return Piece(text.strip("\n"), score, kind)
    kind = Kind.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", text) else Kind.NORMAL
    return Piece(text.replace(" ", SPACE), score, kind)
