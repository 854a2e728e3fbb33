"""Reading a tokenizer.json of Llama 2's kind as a vocabulary, which every format can hold.

That is BPE that falls back to bytes, with ▁ for a space. The vocabulary encodes every text as the
file describes (see `formats.vocabulary`), except a text that begins with a space if the file puts
no other before it.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.formats import vocabulary as bpe
from llama_jax.formats.huggingface.tokenizer_writer import (
    ONE_SPACE,
    PREPEND_SPACE,
    STRIP,
    TO_SPACE,
)
from llama_jax.formats.json_files import Fields, read_object, shown
from llama_jax.formats.vocabulary import LOWEST, Kind, Piece
from llama_jax.text.decoding import SPACE

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
        raise UserError(f"{path} holds no vocabulary: model is {shown(model)}; expected an object")
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
    added = read_added(path, values.get("added_tokens", []))
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
            return user_defined(text) if is_user_defined else Piece(text, 0.0, kinds[text])
        if text in scores:
            return Piece(text, scores[text])
        return Piece(text, LOWEST, Kind.UNUSED)  # SentencePiece merges it last, then splits it

    return {token: piece(text) for token, text in ids.items()}, normalization


def user_defined(text: str) -> Piece:
    """Return a piece that is found in texts before all others, as SentencePiece writes it."""
    return Piece(text.replace(" ", SPACE), 0.0, Kind.USER_DEFINED)


def read_added(path: Path, listed: Any) -> Added:
    """Return the tokens in a list of ids and contents; `UserError` if it is none."""
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
