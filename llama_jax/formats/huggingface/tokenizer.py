"""Reading the tokenizer.json of Hugging Face, where a folder has no SentencePiece model.

Only the kind that Llama 2 has is understood: BPE that falls back to bytes, with ▁ for a space. Of
that kind SentencePiece encodes every text as the file says (see `bpe_merges`), but for a text that
begins with a space where the file does not put another before it, as newer ones do not.
"""

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.errors import UserError
from llama_jax.formats import vocabulary as bpe_merges
from llama_jax.formats.huggingface.files import find
from llama_jax.formats.huggingface.tokenizer_writer import (
    FIRST_SPACE,
    ONE_SPACE,
    STRIPPED,
    TO_SPACE,
)
from llama_jax.formats.json_files import Fields, read_object, shown
from llama_jax.formats.llama2c.tokenizer import tokenizer_model
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.tokenizer import SPACE

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


# The tokenizer of a Hugging Face folder, found and made to fit the model.
#
# It is a SentencePiece model, or a tokenizer.json that says the same. Does not know either's
# layout.

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
