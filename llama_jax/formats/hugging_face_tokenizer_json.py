"""Reading the tokenizer.json of Hugging Face, where a folder has no SentencePiece model.

Only the kind that Llama 2 has is understood: BPE that falls back to bytes, with ▁ for a space. Of
that kind SentencePiece encodes every text as the file says (see `bpe_merges`), but for a text that
begins with a space where the file does not put another before it, as newer ones do not.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.formats import bpe_merges
from llama_jax.formats.hugging_face_tokenizer_writer import (
    FIRST_SPACE,
    ONE_SPACE,
    STRIPPED,
    TO_SPACE,
)
from llama_jax.formats.json_fields import Fields
from llama_jax.formats.json_object import read_object, shown
from llama_jax.formats.vocabulary import Kind, Piece
from llama_jax.text.token_decoder import SPACE

MOST_WORK = 10**8  # squares of pieces' lengths, summed; those of Llama 2 give 2 million
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
EXPECTED = {
    "type": "BPE",
    "byte_fallback": True,
    "dropout": None,
    "ignore_merges": False,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
}
LAST = -1e10  # a score below all others; Llama 2's lowest is -1e9
Added = dict[int, tuple[str, bool]]  # by id, a text and whether it is a control piece
INSTEAD = "give Llama 2's kind, or a SentencePiece model by --tokenizer"


def read_pieces(path: Path, rows: int) -> tuple[dict[int, Piece], dict[str, Any]]:
    """The pieces by id, and what happens to a text first, as fields of `Vocabulary`.

    Args:
      rows: of the model's embedding; tokens that were added beyond it are left out.

    Raises:
      UserError: one line, if the file is not sound or its kind is not Llama 2's.
    """
    values = read_object(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise UserError(f"{path}: model is {shown(model)}; expected an object")
    fields = Fields({key: value for key, value in model.items() if value != ""}, within="model")
    for key, expected in EXPECTED.items():
        fields.require(key, expected)
    fields.raise_problems(f"{path} is another kind of tokenizer; {INSTEAD}:")
    normalization, keeps_words = _normalization(path, values)
    vocab = _vocab(path, model.get("vocab"))
    if missing := BYTES - vocab.keys():
        raise UserError(f"{path} lacks {len(missing)} of the 256 byte pieces; {INSTEAD}")
    added = read_added(path, values.get("added_tokens", []))
    kinds = {
        text: Kind.CONTROL if special else Kind.USER_DEFINED for text, special in added.values()
    }
    kinds |= dict.fromkeys(BYTES, Kind.BYTE) | {_unknown(path, model, vocab): Kind.UNKNOWN}
    ids = {token: text for token, (text, _) in added.items() if text not in vocab and token < rows}
    ids |= {token: text for text, token in vocab.items()}
    inside = [text for text in vocab if keeps_words and SPACE in text[1:]]
    merges = _merges(path, model.get("merges"), vocab)
    scores = _scores(vocab, bpe_merges.ranks(merges, unreachable=inside))
    return {token: _piece(text, kinds, scores) for token, text in ids.items()}, normalization


def read_added(path: Path, listed: Any) -> Added:
    """The tokens added to a vocabulary: by id, the text and whether it is a control piece."""
    if not isinstance(listed, list):
        raise UserError(f"{path}: added_tokens is {shown(listed)}; expected a list")
    added = {}
    for entry in listed:
        fields = Fields(entry if isinstance(entry, dict) else {})
        token, text = fields.value("id", -1), fields.value("content", "")
        if type(token) is not int or token < 0 or not isinstance(text, str) or not is_text(text):
            raise UserError(f"{path}: added_tokens has {shown(entry)}; expected id and content")
        added[token] = text, fields.flag("special", False)
    return added


def is_text(text: str) -> bool:
    """Whether a piece can have this text: some, and expressible in UTF-8."""
    return bool(text) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _normalization(path: Path, values: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """What happens to a text first, as fields of `Vocabulary`, and whether words stay apart."""
    before = _steps(values.get("normalizer"), "normalizers")
    cuts = _steps(values.get("pre_tokenizer"), "pretokenizers")
    if not before and len(cuts) == 1 and isinstance(cuts[0], dict):
        step: dict[str, Any] = {"replacement": SPACE, "add_prefix_space": True, "split": True}
        step |= cuts[0]
        scheme = step.get("prepend_scheme", "always" if step["add_prefix_space"] else "never")
        is_known = scheme in ("always", "first", "never") and type(step["split"]) is bool
        if step.get("type") == "Metaspace" and step["replacement"] == SPACE and is_known:
            return {"adds_space": scheme != "never"}, step["split"]
    characters = _table(before[0]) if before else b""
    rest = before[1:] if characters else before
    joins_spaces = rest[:2] == [STRIPPED, ONE_SPACE]
    rest = rest[2:] if joins_spaces else rest
    if cuts or rest not in ([FIRST_SPACE, TO_SPACE], [TO_SPACE]):
        kinds = [step.get("type") if isinstance(step, dict) else step for step in (*before, *cuts)]
        raise UserError(f"{path} normalizes or cuts texts by {shown(kinds)}; {INSTEAD}")
    fields = {"characters": characters, "joins_spaces": joins_spaces}
    return fields | {"adds_space": FIRST_SPACE in rest}, False


def _table(step: Any) -> bytes:
    """The compiled table of characters that a step replaces by; empty if it is another step."""
    table = step.get("precompiled_charsmap") if isinstance(step, dict) else None
    try:
        return base64.b64decode(table, validate=True) if isinstance(table, str) else b""
    except ValueError:
        return b""


def _steps(value: Any, key: str) -> list[Any]:
    """One step or a sequence of them as a list."""
    if isinstance(value, dict) and value.get("type") == "Sequence":
        value = value.get(key)
    return value if isinstance(value, list) else [] if value is None else [value]


def _vocab(path: Path, vocab: Any) -> dict[str, int]:
    """The ids of all pieces but the added ones."""
    if not isinstance(vocab, dict):
        raise UserError(f"{path}: model.vocab is {shown(vocab)}; expected ids by piece")
    for text, token in vocab.items():
        if type(token) is not int or token < 0 or not is_text(text):
            raise UserError(
                f"{path}: model.vocab has {shown(text)}: {shown(token)}; expected an id"
            )
    if len(set(vocab.values())) < len(vocab):
        raise UserError(f"{path}: model.vocab gives one id to several pieces; copy it again")
    if sum(len(text) ** 2 for text in vocab) > MOST_WORK:
        raise UserError(f"{path}: the pieces in model.vocab are too long; {INSTEAD}")
    return vocab


def _unknown(path: Path, model: Mapping[str, Any], vocab: Mapping[str, int]) -> str:
    text = model.get("unk_token") or "<unk>"
    if not isinstance(text, str) or text not in vocab or text in BYTES:
        raise UserError(f"{path}: model.unk_token {shown(text)} is no piece for it; {INSTEAD}")
    return text


def _merges(path: Path, merges: Any, vocab: Mapping[str, int]) -> list[bpe_merges.Pair]:
    """Pairs of pieces, written as such or with a space between."""
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


def _scores(vocab: Mapping[str, int], ranks: Mapping[str, int]) -> dict[str, float]:
    """A score for each piece that a text can contain: merged ones by rank, then characters."""
    merged = sorted(ranks, key=ranks.__getitem__)
    letters = [text for text in vocab if len(text) == 1]
    return {text: -float(place) for place, text in enumerate([*merged, *letters])}


def _piece(text: str, kinds: Mapping[str, Kind], scores: Mapping[str, float]) -> Piece:
    if text in kinds:
        is_found = kinds[text] == Kind.USER_DEFINED
        return user_defined(text) if is_found else Piece(text, 0.0, kinds[text])
    return Piece(text, scores[text]) if text in scores else unused(text)


def user_defined(text: str) -> Piece:
    """A piece that is found in texts before all else, as SentencePiece spells it."""
    return Piece(text.replace(" ", SPACE), 0.0, Kind.USER_DEFINED)


def unused(text: str) -> Piece:
    """A piece that no text is encoded to; SentencePiece joins its parts last, then cuts again."""
    return Piece(text, LAST, Kind.UNUSED)
