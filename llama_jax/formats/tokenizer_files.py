"""Tokenizer files of every kind as the two that we keep: tokenizer.model and tokenizer.json.

A tokenizer.bin of llama2.c and a tokenizer.json of Llama 2's kind become a SentencePiece model,
which every format can hold; a ranks file of Llama 3 becomes a tokenizer.json.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError, warn
from llama_jax.formats import byte_level
from llama_jax.formats.huggingface.tokenizer_json import Added, OtherKind, read_pieces, user_defined
from llama_jax.formats.json_files import shown
from llama_jax.formats.llama2c import tokenizer as llama2c
from llama_jax.formats.meta import ranks
from llama_jax.formats.vocabulary import LOWEST, Kind, Piece, Vocabulary
from llama_jax.text.huggingface import ROLE, parse_json, pieces, special_roles
from llama_jax.text.tokenizer import JSON, parse_tokenizer, read_file, tokenizer_file_name

MOST_UNUSED = 1024  # rows beyond the tokenizer; padding to multiples of 1024 leaves fewer
USUAL = {"bos": "<s>", "eos": "</s>"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """What the other files in a tokenizer's folder say of its tokens."""

    added: Added = dataclasses.field(default_factory=dict)  # tokens that its file may lack
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of "bos" and "eos"
    ids: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of "bos" and "eos"


NOTHING = Named()


def read_tokenizer_file(path: Path, rows: int, named: Named = NOTHING) -> bytes:
    """Return the content of a tokenizer.model or tokenizer.json with a piece for each row.

    If it has fewer pieces than rows, the named tokens are added, then unused pieces.

    Args:
      rows: of the model's embedding.
      named: in a Hugging Face folder, what its other files say.

    Raises:
      UserError: if the file is missing, damaged, of another kind, or has more pieces than rows.
    """
    content = read_file(path)
    if llama2c.is_tokenizer_bin(content):
        vocabulary = llama2c.read(path)
        if (size := len(vocabulary.pieces)) != rows:  # a file that is cut short shows it here alone
            raise wrong_size(path, size, rows)
        content = vocabulary.to_model()
    elif ranks.is_ranks(content):
        content = ranks.to_json(content, rows, path)
    elif tokenizer_file_name(content) == JSON:
        try:
            content = _complete(*_from_json(path, rows, named), rows, named, path).to_model()
        except OtherKind:
            content = _with_roles(content, named, path)
    else:
        content = _complete_model(content, rows, named, path)
    return fit_rows(content, rows, path)


def _from_json(path: Path, rows: int, named: Named) -> tuple[Vocabulary, dict[int, Piece]]:
    """Return the vocabulary of a tokenizer.json without its pieces, and the pieces by id."""
    found, normalization = read_pieces(path, rows)
    ids = {piece.text: token for token, piece in found.items()}
    if len(ids) < len(found):
        raise UserError(f"{path} has two pieces that differ only in how they write a space")
    special: dict[str, Any] = {
        "unknown_id": next(i for i, piece in found.items() if piece.kind == Kind.UNKNOWN)
    }
    for role, usual in USUAL.items():
        text = named.texts.get(role, usual)
        token = ids.get(text, named.ids.get(role, -1))
        if token not in found or found[token].kind in (Kind.UNKNOWN, Kind.BYTE):
            raise OtherKind(f"{path} has no {shown(text)}, which should be {role.upper()}")
        special[f"{role}_id"] = token
    return Vocabulary(pieces=(), **normalization, **special), found


def _complete_model(content: bytes, rows: int, named: Named, path: Path) -> bytes:
    """Return a SentencePiece model with the named tokens; itself if it has them all."""
    parse_tokenizer(content, path)
    try:
        vocabulary = Vocabulary.from_model(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    ids = {"BOS": vocabulary.bos_id, "EOS": vocabulary.eos_id, "padding": vocabulary.pad_id}
    ids = {name: max(token, 0) for name, token in ids.items()}  # these may be missing
    for name, token in (ids | {"unknown": vocabulary.unknown_id}).items():
        if not 0 <= token < len(vocabulary.pieces):
            raise UserError(f"{path}: the {name} piece has id {token}; give a Llama 2 tokenizer")
    complete = _complete(vocabulary, dict(enumerate(vocabulary.pieces)), rows, named, path)
    return content if complete == vocabulary else complete.to_model()


def _complete(
    vocabulary: Vocabulary, found: dict[int, Piece], rows: int, named: Named, path: Path
) -> Vocabulary:
    """Return a vocabulary of the pieces found, and the named tokens as far as there are rows."""
    if (size := max(found) + 1) > rows:
        raise wrong_size(path, size, rows)
    ids = {piece.text: token for token, piece in found.items()}
    for token, (text, is_control) in named.added.items():
        piece = Piece(text, 0.0, Kind.CONTROL) if is_control else user_defined(text)
        if token < rows and token not in found and piece.text not in ids:
            found[token], ids[piece.text] = piece, token
    for token in set(range(max(found))) - found.keys():
        found[token] = Piece(byte_level.unused_name(token, ids), LOWEST, Kind.UNUSED)
    special = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id}
    special |= {role: ids[text] for role, text in named.texts.items() if text in ids}
    for role, token in special.items():
        if token < 0:
            continue
        if found[token].kind in (Kind.UNKNOWN, Kind.BYTE):
            special[role] = getattr(vocabulary, f"{role}_id")
        elif found[token].kind != Kind.CONTROL:  # as SentencePiece requires it
            found[token] = Piece(found[token].text, 0.0, Kind.CONTROL)
    return dataclasses.replace(
        vocabulary,
        pieces=tuple(found[token] for token in range(len(found))),
        bos_id=special["bos"],
        eos_id=special["eos"],
    )


def _with_roles(content: bytes, named: Named, path: Path) -> bytes:
    """Return a tokenizer.json that records BOS and EOS, if they do not follow from it already."""
    values = parse_json(content, path)
    texts = pieces(values, path)
    ids = {text: token for token, text in texts.items()}
    found: dict[int, str] = {}
    for role in USUAL:
        token = ids.get(named.texts.get(role, ""), named.ids.get(role, -1))
        if token in texts:
            found[token] = role
    known = special_roles(values, texts)
    if all(known.get(role) == token for token, role in found.items()):
        return content
    added = {token["id"]: token for token in values["added_tokens"]}
    for token, role in found.items():
        entry = added.get(token) or byte_level.added_token(token, texts[token], special=True)
        added[token] = entry | {ROLE: role}
    listed = [added[token] for token in sorted(added)]
    return json.dumps(values | {"added_tokens": listed}, ensure_ascii=False).encode()


def fit_rows(content: bytes, rows: int, source: Path) -> bytes:
    """Return the content of a tokenizer file with a piece for each row of the embedding.

    Rows beyond the last piece, as embeddings are padded with, get unused pieces, with a warning.
    Tokens of a tokenizer.json that were added beyond the last row are left out. The result is
    loaded once, so that it can be relied on.

    Args:
      source: of the tokenizer, for messages.

    Raises:
      UserError: if the tokenizer is damaged, has more pieces than rows, or far fewer.
    """
    is_json = tokenizer_file_name(content) == JSON
    size = parse_tokenizer(content, source).vocab_size
    if size == rows:
        return content
    fitted = _fit_json(content, rows, source) if is_json else _fit_model(content, rows)
    if not 0 <= rows - size < MOST_UNUSED and fitted is content:
        raise wrong_size(source, size, rows)
    if size < rows:
        names = f"ids {size:,} to {rows - 1:,}" if rows - size > 1 else f"id {size:,}"
        warn(f"{source} has {size:,} pieces and the model {rows:,} rows; {names} are unused")
    parse_tokenizer(fitted, source)
    return fitted


def wrong_size(source: Path, size: int, rows: int) -> UserError:
    """Return the error of a tokenizer with a number of pieces that cannot be the model's."""
    sizes = f"tokenizer {source} has {size:,} pieces and the model {rows:,} rows for them"
    return UserError(f"{sizes}; give the tokenizer that it was trained with by --tokenizer")


def _fit_model(content: bytes, rows: int) -> bytes:
    """Return a SentencePiece model with unused pieces; itself if that is not possible."""
    vocabulary = Vocabulary.from_model(content)
    size = len(vocabulary.pieces)
    if not size < rows < size + MOST_UNUSED:
        return content
    taken = {piece.text: None for piece in vocabulary.pieces}
    names = [byte_level.unused_name(token, taken) for token in range(size, rows)]
    unused = [Piece(name, LOWEST, Kind.UNUSED) for name in names]
    return dataclasses.replace(vocabulary, pieces=(*vocabulary.pieces, *unused)).to_model()


def _fit_json(content: bytes, rows: int, source: Path) -> bytes:
    """Return a tokenizer.json with unused control tokens, or fewer; itself if it cannot be."""
    values = parse_json(content, source)
    added = [token for token in values["added_tokens"] if token["id"] < rows]
    texts = pieces(values | {"added_tokens": added}, source)
    size = max(texts) + 1
    if not size <= rows < size + MOST_UNUSED:
        return content
    taken = dict.fromkeys(texts.values())
    for token in range(size, rows):
        name = byte_level.unused_name(token, taken)
        added.append(byte_level.added_token(token, name, special=True))
    return json.dumps(values | {"added_tokens": added}, ensure_ascii=False).encode()
