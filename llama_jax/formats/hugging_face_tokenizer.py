"""The tokenizer of a Hugging Face folder, found and made to fit the model.

It is a SentencePiece model, or a tokenizer.json that says the same. Does not know either's layout.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.formats.hugging_face_files import find
from llama_jax.formats.hugging_face_tokenizer_json import (
    Added,
    read_added,
    read_pieces,
    unused,
    user_defined,
)
from llama_jax.formats.json_object import read_object, shown
from llama_jax.formats.tokenizer_choice import tokenizer_model
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary

MODEL = "tokenizer.model"
JSON = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
MULTIPLES = (8, 16, 32, 64, 128)  # embeddings are padded to one of these to run fast


def read_tokenizer(
    folder: Path, given: Path | None, config: Mapping[str, Any], rows: int
) -> tuple[bytes, bool]:
    """A SentencePiece model with a piece for each row of the embedding, and whether BOS is usual.

    The model is empty if the folder has no tokenizer and none is given. One that fits is returned
    as it is; one with fewer pieces is completed by the tokens that the folder names, and by unused
    pieces where the rows were evidently rounded up.

    Args:
      given: a tokenizer.model, .json or .bin to use instead of the folder's.
      config: what config.json holds.

    Raises:
      UserError: one line, if a file is not sound or the sizes do not fit.
    """
    settings_path = find(folder, SETTINGS)
    settings = read_object(settings_path) if settings_path else {}
    bos = settings.get("add_bos_token")
    bos = bos if isinstance(bos, bool) else True
    path = given or find(folder, MODEL) or find(folder, JSON)
    if path is None:
        return b"", bos
    if path.suffix == ".json":
        vocabulary, pieces = _from_json(path, settings, config, rows)
        model = b""
    else:
        model = tokenizer_model(path, vocab_size=0)
        try:
            vocabulary = Vocabulary.from_model(model)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        _require_ids(vocabulary, path)
        pieces = dict(enumerate(vocabulary.pieces))
    size = len(pieces)
    _complete(pieces, rows, _named(folder, settings), path)
    if model and size == rows:
        return model, bos
    whole = tuple(pieces[token] for token in range(rows))
    return dataclasses.replace(vocabulary, pieces=whole).to_model(), bos


def _from_json(
    path: Path, settings: Mapping[str, Any], config: Mapping[str, Any], rows: int
) -> tuple[Vocabulary, dict[int, Piece]]:
    """All about a tokenizer.json but its pieces, and these by id."""
    pieces, normalization = read_pieces(path, rows)
    ids = {piece.text: token for token, piece in pieces.items()}
    if len(ids) < len(pieces):
        raise UserError(f"{path} has two pieces that differ only in how they spell a space")
    unknown = next(token for token, piece in pieces.items() if piece.kind == Kind.UNKNOWN)
    special: dict[str, Any] = {"unknown_id": unknown}
    for name, usual in (("bos", "<s>"), ("eos", "</s>")):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        text = text if isinstance(text, str) else usual
        token: Any = ids.get(text, config.get(f"{name}_token_id"))
        piece = pieces.get(token) if type(token) is int else None
        if piece is None or piece.kind in (Kind.UNKNOWN, Kind.BYTE):
            problem = f"{path} has no {shown(text)}, which should be {name.upper()}"
            raise UserError(f"{problem}; give a SentencePiece model by --tokenizer")
        pieces[token] = dataclasses.replace(piece, kind=Kind.CONTROL, score=0.0)
        special[f"{name}_id"] = token
    return Vocabulary(pieces=(), **normalization, **special), pieces


def _require_ids(vocabulary: Vocabulary, path: Path) -> None:
    """`UserError` if a SentencePiece model's special ids are no places in it."""
    ids = {"unknown": vocabulary.unknown_id, "BOS": vocabulary.bos_id, "EOS": vocabulary.eos_id}
    ids |= {"padding": max(vocabulary.pad_id, 0)}
    for name, token in ids.items():
        if not 0 <= token < len(vocabulary.pieces):
            raise UserError(f"{path}: the {name} piece has id {token}; give a Llama 2 tokenizer")


def _named(folder: Path, settings: Mapping[str, Any]) -> Added:
    """The tokens that a folder adds to its tokenizer: by id, a text and whether it is control."""
    listed = settings.get("added_tokens_decoder", {})
    listed = listed if isinstance(listed, dict) else {"": listed}
    entries = [
        {"id": int(key) if key.isdecimal() and len(key) < 10 else key} | entry
        if isinstance(entry, dict)
        else entry
        for key, entry in listed.items()
    ]
    named = read_added(folder / SETTINGS, entries)
    path = find(folder, ADDED)
    plain = read_object(path).items() if path else []
    return read_added(folder / ADDED, [{"id": v, "content": k} for k, v in plain]) | named


def _complete(pieces: dict[int, Piece], rows: int, named: Added, path: Path) -> None:
    """Add named and unused pieces until there is one for each row; `UserError` if they are none."""
    taken = {piece.text for piece in pieces.values()}
    for token, (text, is_control) in named.items():
        piece = Piece(text, 0.0, Kind.CONTROL) if is_control else user_defined(text)
        if token < rows and token not in pieces and piece.text not in taken:
            pieces[token] = piece
            taken.add(piece.text)
    size = max(pieces) + 1
    if rows != size and rows not in {-(-size // multiple) * multiple for multiple in MULTIPLES}:
        sizes = f"{path} has {size:,} pieces, the model {rows:,} rows for them"
        raise UserError(f"{sizes}; give the tokenizer that it was trained with by --tokenizer")
    for token in set(range(rows)) - pieces.keys():
        text = f"<unused_{token}>"
        while text in taken:
            text += "_"
        pieces[token] = unused(text)
