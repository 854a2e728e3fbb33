"""Llama 3's tokenizer.model: a text file with a line for each piece, its bytes in base64, its id.

It is the format of tiktoken. The 256 control tokens that follow the pieces are not in the file, nor
is the pattern that splits texts into words; both are in Meta's code.
"""

import base64
import re
from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.formats.byte_level import PRE_TOKENIZERS, patterns
from llama_jax.formats.byte_level import to_json as byte_level_json
from llama_jax.formats.vocabulary import Kind
from llama_jax.text.huggingface import BYTE_OF_CHARACTER, parse_json, pieces
from llama_jax.text.tokenizer import JSON

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")
RESERVED = [f"<|reserved_special_token_{number}|>" for number in range(251)]
CONTROLS = [
    *("<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4]),
    *("<|start_header_id|>", "<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]),
]
CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
PRE_TOKENIZER = PRE_TOKENIZERS["llama-bpe"]


def is_ranks(content: bytes) -> bool:
    """Return whether a file begins as a ranks file does."""
    return LINE.match(content[:1024].split(b"\n", 1)[0]) is not None


def to_json(content: bytes, rows: int, path: Path) -> bytes:
    """Return the content of a tokenizer.json with the pieces of a ranks file.

    Args:
      rows: of the model's embedding, which Meta never pads.

    Raises:
      UserError: if the file is damaged or cut short, or has another number of pieces.
    """
    listed: list[bytes] = []
    for number, line in enumerate(content.splitlines()):
        if not LINE.fullmatch(line) or int(line.split()[1]) != number:
            raise UserError(f"tokenizer {path} is damaged in line {number + 1}; copy it again")
        try:
            listed.append(base64.b64decode(line.split()[0], validate=True))
        except ValueError as error:
            message = f"tokenizer {path} is damaged in line {number + 1}: {error}"
            raise UserError(f"{message}; copy it again") from error
    size = len(listed) + len(CONTROLS)
    if size != rows:
        short = "is cut short or another model's" if size < rows else "is another model's"
        sizes = f"{len(listed):,} pieces and {len(CONTROLS)} control tokens for {rows:,} rows"
        raise UserError(f"tokenizer {path} {short}: it has {sizes}; copy it again")
    ids = {piece: token for token, piece in enumerate(listed)}
    if len(ids) < len(listed) or not all(bytes([byte]) in ids for byte in range(256)):
        raise UserError(f"tokenizer {path} is damaged: it repeats or lacks a piece; copy it again")
    texts = ["".join(map(CHARACTER_OF_BYTE.__getitem__, piece)) for piece in listed]
    merges = [
        (texts[ids[piece[:cut]]], texts[ids[piece[cut:]]])
        for piece in listed  # joined in the order of their ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    kinds = [Kind.NORMAL] * len(texts) + [Kind.CONTROL] * len(CONTROLS)
    roles = {"bos": len(texts), "eos": len(texts) + 1}
    return byte_level_json([*texts, *CONTROLS], kinds, merges, PRE_TOKENIZER, roles, bos=True)


def from_json(content: bytes) -> bytes:
    """Return the ranks file of a tokenizer.json.

    Raises:
      UserError: if it is not Llama 3's kind.
    """
    values = parse_json(content, Path(JSON))
    texts = pieces(values, Path(JSON))
    plain = [texts.get(token, "") for token in range(len(texts) - len(CONTROLS))]
    is_llama3 = patterns(values.get("pre_tokenizer")) == PRE_TOKENIZER.patterns
    special = {token["id"] for token in values["added_tokens"] if token.get("special")}
    is_llama3 &= special == {*range(len(plain), len(texts))} and all(plain)
    if not (is_llama3 and set("".join(plain)) <= BYTE_OF_CHARACTER.keys()):
        raise UserError(
            "Meta's format holds SentencePiece and Llama 3's tokenizers, and this is neither;"
            " choose another format"
        )
    lines = [
        base64.b64encode(bytes(map(BYTE_OF_CHARACTER.__getitem__, text))) + b" %d\n" % token
        for token, text in enumerate(plain)
    ]
    return b"".join(lines)
