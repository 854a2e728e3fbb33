"""Reading the tokenizer of a Hugging Face folder: a SentencePiece model, or a tokenizer.json.

A tokenizer.json of Llama 2's kind, BPE that falls back to bytes with ▁ for a space, becomes a
SentencePiece model, which every format can hold. It encodes every text as the file describes (see
`formats.vocabulary`), except a text that begins with a space if the file puts no other before it.
Any other kind is kept as it is.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.formats import vocabulary as bpe
from llama_jax.formats.byte_level import added_token, unused_name
from llama_jax.formats.huggingface.tokenizer_writer import (
    ONE_SPACE,
    PREPEND_SPACE,
    STRIP,
    TO_SPACE,
)
from llama_jax.formats.json_files import Fields, read_object, shown
from llama_jax.formats.llama2c.tokenizer import is_tokenizer_bin
from llama_jax.formats.meta.ranks import is_ranks
from llama_jax.formats.tokenizer_files import fit_rows, read_tokenizer_file, wrong_size
from llama_jax.formats.vocabulary import LOWEST, Kind, Piece, Vocabulary
from llama_jax.formats.weights import find_file
from llama_jax.text.decoding import SPACE
from llama_jax.text.huggingface import ROLE, parse_json, special_roles
from llama_jax.text.huggingface import pieces as json_pieces
from llama_jax.text.tokenizer import JSON, MODEL, parse_tokenizer, read_file, tokenizer_file_name

SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
MAX_WORK = 10**8  # sum of squared lengths of pieces; 2 million for Llama 2
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
EXPECTED = {
    "type": "BPE",
    "byte_fallback": True,
    "dropout": None,
    "ignore_merges": False,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
}
Added = dict[int, tuple[str, bool]]  # by id, a text and whether it is a control piece
INSTEAD = "give a SentencePiece model by --tokenizer"


class OtherKind(UserError):
    """A tokenizer.json that is not of Llama 2's kind."""


def read_tokenizer(folder: Path, given: Path | None, config: Mapping[str, Any], rows: int) -> bytes:
    """Return the content of a tokenizer file, with a piece for each row of the embedding.

    It is a SentencePiece model or a tokenizer.json, and empty if the folder has none and none is
    given. If it has fewer pieces than rows, the tokens that the folder names are added,
    then unused pieces.

    Args:
      given: a tokenizer.model, .json or .bin to use instead of the folder's.
      config: the content of config.json.

    Raises:
      UserError: if a file is broken or the sizes do not fit.
    """
    settings_path = find_file(folder, SETTINGS)
    settings = read_object(settings_path) if settings_path else {}
    path = given or find_file(folder, MODEL) or find_file(folder, JSON)
    if path is None:
        return b""
    content = read_file(path)
    if tokenizer_file_name(content) == JSON:
        try:
            vocabulary, pieces = _from_json(path, settings, config, rows)
        except OtherKind:
            return fit_rows(_with_roles(content, settings, config, path), rows, path)
        content = b""
    else:
        if is_ranks(content) or is_tokenizer_bin(content):
            return read_tokenizer_file(path, rows)
        parse_tokenizer(content, path)
        try:
            vocabulary = Vocabulary.from_model(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        _check_ids(vocabulary, path)
        pieces = dict(enumerate(vocabulary.pieces))
    if (size := max(pieces) + 1) > rows:
        raise wrong_size(path, size, rows)
    size = len(pieces)
    _add_named(pieces, rows, _named(folder, settings))
    if not content or len(pieces) > size:
        whole = tuple(pieces[token] for token in range(max(pieces) + 1))
        content = dataclasses.replace(vocabulary, pieces=whole).to_model()
    return fit_rows(content, rows, path)


def _with_roles(
    content: bytes,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    path: Path,
) -> bytes:
    """Return a tokenizer.json that records BOS and EOS, if they do not follow from it already."""
    values = parse_json(content, path)
    texts = json_pieces(values, path)
    ids = {text: token for token, text in texts.items()}
    found: dict[int, str] = {}
    for role in ("bos", "eos"):
        text = settings.get(f"{role}_token")
        text = text.get("content") if isinstance(text, dict) else text
        token = config.get(f"{role}_token_id")
        token = token[0] if isinstance(token, list) and token else token
        token = ids.get(text, token) if isinstance(text, str) else token
        if type(token) is int and token in texts:
            found[token] = role
    known = special_roles(values, texts)
    if all(known.get(role) == token for token, role in found.items()):
        return content
    added = {token["id"]: token for token in values["added_tokens"]}
    for token, role in found.items():
        entry = added.get(token) or added_token(token, texts[token], special=True)
        added[token] = entry | {ROLE: role}
    listed = [added[token] for token in sorted(added)]
    return json.dumps(values | {"added_tokens": listed}, ensure_ascii=False).encode()


def _check_ids(vocabulary: Vocabulary, path: Path) -> None:
    ids = {"unknown": vocabulary.unknown_id, "BOS": vocabulary.bos_id, "EOS": vocabulary.eos_id}
    ids |= {"padding": max(vocabulary.pad_id, 0)}
    for name, token in ids.items():
        if not 0 <= token < len(vocabulary.pieces):
            raise UserError(f"{path}: the {name} piece has id {token}; give a Llama 2 tokenizer")


def _named(folder: Path, settings: Mapping[str, Any]) -> Added:
    """Return the tokens that a folder adds to its tokenizer."""
    listed = settings.get("added_tokens_decoder", {})
    listed = listed if isinstance(listed, dict) else {"": listed}
    entries = [
        {"id": int(key) if key.isdecimal() and len(key) < 10 else key} | entry
        if isinstance(entry, dict)
        else entry
        for key, entry in listed.items()
    ]
    named = _read_added(folder / SETTINGS, entries)
    path = find_file(folder, ADDED)
    plain = read_object(path).items() if path else []
    return _read_added(folder / ADDED, [{"id": v, "content": k} for k, v in plain]) | named


def _add_named(pieces: dict[int, Piece], rows: int, named: Added) -> None:
    """Add the named tokens, and unused pieces between them."""
    taken = {piece.text: None for piece in pieces.values()}
    for token, (text, is_control) in named.items():
        piece = Piece(text, 0.0, Kind.CONTROL) if is_control else _user_defined(text)
        if token < rows and token not in pieces and piece.text not in taken:
            pieces[token] = piece
            taken[piece.text] = None
    for token in set(range(min(rows, max(pieces)))) - pieces.keys():
        pieces[token] = Piece(unused_name(token, taken), LOWEST, Kind.UNUSED)


def _user_defined(text: str) -> Piece:
    """Return a piece that is found in texts before all others, as SentencePiece writes it."""
    return Piece(text.replace(" ", SPACE), 0.0, Kind.USER_DEFINED)


# ---- tokenizer.json ----


def _from_json(
    path: Path, settings: Mapping[str, Any], config: Mapping[str, Any], rows: int
) -> tuple[Vocabulary, dict[int, Piece]]:
    """Return the vocabulary of a tokenizer.json without its pieces, and the pieces by id."""
    pieces, normalization = read_pieces(path, rows)
    ids = {piece.text: token for token, piece in pieces.items()}
    if len(ids) < len(pieces):
        raise UserError(f"{path} has two pieces that differ only in how they write a space")
    unknown = next(token for token, piece in pieces.items() if piece.kind == Kind.UNKNOWN)
    special: dict[str, Any] = {"unknown_id": unknown}
    for name, usual in (("bos", "<s>"), ("eos", "</s>")):
        text = settings.get(f"{name}_token")
        text = text.get("content") if isinstance(text, dict) else text
        text = text if isinstance(text, str) else usual
        token: Any = ids.get(text, config.get(f"{name}_token_id"))
        piece = pieces.get(token) if type(token) is int else None
        if piece is None or piece.kind in (Kind.UNKNOWN, Kind.BYTE):
            raise OtherKind(f"{path} has no {shown(text)}, which should be {name.upper()}")
        pieces[token] = dataclasses.replace(piece, kind=Kind.CONTROL, score=0.0)
        special[f"{name}_id"] = token
    return Vocabulary(pieces=(), **normalization, **special), pieces


def read_pieces(path: Path, rows: int) -> tuple[dict[int, Piece], dict[str, Any]]:
    """Return the pieces by id, and the normalization of texts as fields of `Vocabulary`.

    Args:
      rows: of the model's embedding; tokens that were added beyond it are left out.

    Raises:
      OtherKind: if its kind is not Llama 2's.
      UserError: if the file is broken.
    """
    values = read_object(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}: model is {shown(model)}; expected an object")
    fields = Fields({key: value for key, value in model.items() if value != ""}, within="model")
    for key, expected in EXPECTED.items():
        fields.require(key, expected)
    if fields.problems:
        raise OtherKind(f"{path} is another kind of tokenizer: {', '.join(fields.problems)}")
    normalization, keeps_words = _read_normalization(path, values)
    vocab = _read_vocab(path, model.get("vocab"))
    if missing := BYTES - vocab.keys():
        raise OtherKind(f"{path} lacks {len(missing)} of the 256 byte pieces")
    unknown = model.get("unk_token") or "<unk>"
    if not isinstance(unknown, str) or unknown not in vocab or unknown in BYTES:
        raise OtherKind(f"{path}: model.unk_token {shown(unknown)} is no piece for it")
    added = _read_added(path, values.get("added_tokens", []))
    kinds = {
        text: Kind.CONTROL if special else Kind.USER_DEFINED for text, special in added.values()
    }
    kinds |= dict.fromkeys(BYTES, Kind.BYTE) | {unknown: Kind.UNKNOWN}
    ids = {token: text for token, (text, _) in added.items() if text not in vocab and token < rows}
    ids |= {token: text for text, token in vocab.items()}
    # Pieces of several words never arise if texts are split into words first.
    unreachable = [text for text in vocab if keeps_words and SPACE in text[1:]]
    ranks = bpe.ranks(_read_merges(path, model.get("merges"), vocab), unreachable)
    # The merged pieces by rank, then single characters: all that a text can become.
    found = [*sorted(ranks, key=ranks.__getitem__), *(text for text in vocab if len(text) == 1)]
    scores = {text: -float(place) for place, text in enumerate(found)}

    def piece(text: str) -> Piece:
        if text in kinds:
            is_user_defined = kinds[text] == Kind.USER_DEFINED
            return _user_defined(text) if is_user_defined else Piece(text, 0.0, kinds[text])
        if text in scores:
            return Piece(text, scores[text])
        return Piece(text, LOWEST, Kind.UNUSED)  # SentencePiece merges it last, then splits it

    return {token: piece(text) for token, text in ids.items()}, normalization


def _read_added(path: Path, listed: Any) -> Added:
    if not isinstance(listed, list):
        raise UserError(f"{path}: added_tokens is {shown(listed)}; expected a list")
    added = {}
    for entry in listed:
        fields = Fields(entry if isinstance(entry, dict) else {})
        token, text = fields.value("id", -1), fields.value("content", "")
        if not _is_id(token) or not isinstance(text, str) or not _is_text(text):
            raise UserError(f"{path}: added_tokens has {shown(entry)}; expected id and content")
        added[token] = text, fields.flag("special", False)
    return added


def _is_id(token: Any) -> bool:
    return type(token) is int and token >= 0


def _is_text(text: str) -> bool:
    """Return whether a piece can have this text: not empty, and expressible in UTF-8."""
    return bool(text) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _read_normalization(path: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the normalization as fields of `Vocabulary`, and whether it splits into words."""
    before = _steps(values.get("normalizer"), "normalizers")
    splits = _steps(values.get("pre_tokenizer"), "pretokenizers")
    if not before and len(splits) == 1 and isinstance(splits[0], dict):
        step: dict[str, Any] = {"replacement": SPACE, "add_prefix_space": True, "split": True}
        step |= splits[0]
        scheme = step.get("prepend_scheme", "always" if step["add_prefix_space"] else "never")
        is_known = scheme in ("always", "first", "never") and type(step["split"]) is bool
        if step.get("type") == "Metaspace" and step["replacement"] == SPACE and is_known:
            return {"adds_space": scheme != "never"}, step["split"]
    characters = _characters(before[0]) if before else b""
    rest = before[1:] if characters else before
    joins_spaces = rest[:2] == [STRIP, ONE_SPACE]
    rest = rest[2:] if joins_spaces else rest
    if splits or rest not in ([PREPEND_SPACE, TO_SPACE], [TO_SPACE]):
        steps = (*before, *splits)
        kinds = [step.get("type") if isinstance(step, dict) else step for step in steps]
        raise OtherKind(f"{path} normalizes or splits texts by {shown(kinds)}")
    fields = {"characters": characters, "joins_spaces": joins_spaces}
    return fields | {"adds_space": PREPEND_SPACE in rest}, False


def _characters(step: Any) -> bytes:
    """Return the compiled table of a step that replaces characters; empty if it is another step."""
    table = step.get("precompiled_charsmap") if isinstance(step, dict) else None
    try:
        return base64.b64decode(table, validate=True) if isinstance(table, str) else b""
    except ValueError:
        return b""


def _steps(value: Any, key: str) -> list[Any]:
    """Return one step, or a sequence of them, as a list."""
    if isinstance(value, dict) and value.get("type") == "Sequence":
        value = value.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _read_vocab(path: Path, vocab: Any) -> dict[str, int]:
    """Return the ids of all pieces but the added ones."""
    if not isinstance(vocab, dict):
        raise UserError(f"{path}: model.vocab is {shown(vocab)}; expected ids by piece")
    for text, token in vocab.items():
        if not _is_id(token) or not _is_text(text):
            entry = f"{shown(text)}: {shown(token)}"
            raise UserError(f"{path}: model.vocab has {entry}; expected an id")
    if len(set(vocab.values())) < len(vocab):
        raise UserError(f"{path}: model.vocab gives one id to several pieces; copy it again")
    if sum(len(text) ** 2 for text in vocab) > MAX_WORK:
        raise UserError(f"{path}: the pieces in model.vocab are too long; {INSTEAD}")
    return vocab


def _read_merges(path: Path, merges: Any, vocab: Mapping[str, int]) -> list[bpe.Pair]:
    """Return pairs of pieces, which are stored as such or with a space between."""
    if not isinstance(merges, list):
        raise UserError(f"{path}: model.merges is {shown(merges)}; expected a list")
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        is_pair = isinstance(parts, list) and len(parts) == 2
        if not is_pair or not all(isinstance(part, str) and part in vocab for part in parts):
            raise UserError(f"{path}: model.merges has {shown(merge)}; expected two pieces")
        if "".join(parts) not in vocab:
            raise UserError(f"{path}: model.merges has {shown(merge)}, which makes no piece")
        pairs.append((parts[0], parts[1]))
    return pairs
