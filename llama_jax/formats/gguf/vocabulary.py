"""The keys of a GGUF file that hold its tokenizer, in both directions.

Of GGUF's kinds of tokenizers, "llama" is SentencePiece and "gpt2" byte-level BPE.
"""

import re
from pathlib import Path

import numpy as np

from llama_jax.errors import UserError, did_you_mean
from llama_jax.formats import byte_level
from llama_jax.formats.byte_level import PRE_TOKENIZERS
from llama_jax.formats.gguf.header import Keys, Value
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary
from llama_jax.text.huggingface import parse_json, pieces, special_roles
from llama_jax.text.tokenizer import JSON, tokenizer_file_name

PREFIX = "tokenizer.ggml."
MODEL = f"{PREFIX}model"
TOKENS, SCORES, KINDS = f"{PREFIX}tokens", f"{PREFIX}scores", f"{PREFIX}token_type"
IDS = {  # ours, theirs
    "unknown_id": f"{PREFIX}unknown_token_id",
    "bos_id": f"{PREFIX}bos_token_id",
    "eos_id": f"{PREFIX}eos_token_id",
    "pad_id": f"{PREFIX}padding_token_id",
}
MERGES, PRE = f"{PREFIX}merges", f"{PREFIX}pre"
ADDS_SPACE, ADDS_BOS = f"{PREFIX}add_space_prefix", f"{PREFIX}add_bos_token"
JOINS_SPACES = f"{PREFIX}remove_extra_whitespaces"
CHARACTERS = f"{PREFIX}precompiled_charsmap"
NO_ID = (-1, 2**32 - 1)  # what writers put for an id that does not exist
BYTE = re.compile("<0x[0-9A-F]{2}>")
CONTROL = re.compile(r"<\|[^ ]*\|>")  # how control tokens of byte-level vocabularies look


def read_tokenizer(keys: Keys) -> bytes:
    """Return the content of a tokenizer.model, or a tokenizer.json; empty if there is neither.

    Raises:
      UserError: if its kind or pre-tokenizer is unknown, or the keys contradict each other.
    """
    kind = keys.get(MODEL, str, "no_vocab")
    if kind == "no_vocab":
        return b""
    if kind == "llama":
        return _read_sentencepiece(keys).to_model()
    if kind == "gpt2":
        return _read_byte_level(keys)
    raise UserError(
        f"{keys.path} has a tokenizer of kind {kind[:64]!r}; expected 'llama' (SentencePiece) or"
        " 'gpt2' (byte-level BPE)"
    )


def adds_bos(keys: Keys) -> bool:
    """Return whether texts begin with BOS."""
    if keys.get(MODEL, str, "llama") != "gpt2":
        return keys.get(ADDS_BOS, bool, True)
    known = PRE_TOKENIZERS.get(keys.get(PRE, str, "default"))
    return keys.get(ADDS_BOS, bool, known is not None and known.adds_bos)


def _read_sentencepiece(keys: Keys) -> Vocabulary:
    texts, kinds, ids = _read_pieces(keys, {"unknown_id": 0, "bos_id": 1, "eos_id": 2})
    scores = keys.get(SCORES, np.ndarray, np.zeros(len(texts)))
    if len(scores) != len(texts):
        raise UserError(f"{keys.path} has {len(texts)} tokens and {len(scores)} scores")
    if not np.isfinite(scores).all():
        raise UserError(f"{keys.path} has a score in {SCORES} that is not a number")
    if KINDS not in keys.values:
        kinds = [Kind.BYTE if BYTE.fullmatch(text) else kind for text, kind in zip(texts, kinds)]
        if ids["unknown_id"] >= 0:
            kinds[ids["unknown_id"]] = Kind.UNKNOWN
    for token in (ids["bos_id"], ids["eos_id"]):  # user-defined ones in some files
        if token >= 0 and kinds[token] not in (Kind.BYTE, Kind.UNKNOWN):
            kinds[token] = Kind.CONTROL
    last = {text: token for token, text in enumerate(texts)}
    listed = [
        Piece(text, float(score), Kind(kind))
        if last[text] == token  # SentencePiece has no two equal pieces
        else Piece(byte_level.unused_name(token, last), float(score), Kind.UNUSED)
        for token, (text, score, kind) in enumerate(zip(texts, scores.tolist(), kinds))
    ]
    return Vocabulary(
        pieces=tuple(listed),
        adds_space=keys.get(ADDS_SPACE, bool, True),
        joins_spaces=keys.get(JOINS_SPACES, bool, False),
        characters=(
            keys.get(CHARACTERS, np.ndarray).tobytes() if CHARACTERS in keys.values else b""
        ),
        **ids,
    )


def _read_byte_level(keys: Keys) -> bytes:
    name = _pre_tokenizer(keys)
    texts, kinds, ids = _read_pieces(keys, {})
    if KINDS not in keys.values:
        kinds = [Kind.CONTROL if CONTROL.fullmatch(text) else Kind.NORMAL for text in texts]
    merges = keys.get(MERGES, list)
    known = set(texts)
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= known:
            raise UserError(f"{keys.path} has {merge[:64]!r} in {MERGES}, which makes no piece")
    if keys.get(ADDS_SPACE, bool, False):
        raise UserError(
            f"{keys.path} has {ADDS_SPACE} with a tokenizer of kind 'gpt2'; convert it"
            " to GGUF again"
        )
    roles = {role: ids[f"{role}_id"] for role in ("bos", "eos") if ids[f"{role}_id"] >= 0}
    return byte_level.to_json(texts, kinds, merges, PRE_TOKENIZERS[name], roles, adds_bos(keys))


def _pre_tokenizer(keys: Keys) -> str:
    """Return the name of the pre-tokenizer; `UserError` if it is unknown."""
    name = keys.get(PRE, str, "default")
    if name not in PRE_TOKENIZERS:
        known = f"expected one of {', '.join(PRE_TOKENIZERS)}{did_you_mean(name, PRE_TOKENIZERS)}"
        raise UserError(f"{keys.path} has an unknown pre-tokenizer, {name[:64]!r}; {known}")
    return name


def _read_pieces(
    keys: Keys, defaults: dict[str, int]
) -> tuple[list[str], list[int], dict[str, int]]:
    """Return the texts and kinds of all pieces, and the ids of `IDS`."""
    texts = keys.get(TOKENS, list)
    kinds = keys.get(KINDS, np.ndarray, np.full(len(texts), int(Kind.NORMAL)))
    if len(kinds) != len(texts):
        raise UserError(f"{keys.path} has {len(texts)} tokens and {len(kinds)} token types")
    if not set(kinds.tolist()) <= set(Kind):
        raise UserError(f"{keys.path} has a token type other than 1 to 6 in {KINDS}")
    ids = {}
    for ours, key in IDS.items():
        token = keys.get(key, int, defaults.get(ours, -1))
        ids[ours] = -1 if token in NO_ID else token
        if not -1 <= ids[ours] < len(texts):
            raise UserError(f"{keys.path} has {key} = {token}; expected 0 to {len(texts) - 1}")
    return texts, kinds.tolist(), ids


# ---- writing ----


def tokenizer_keys(content: bytes, bos: bool) -> dict[str, Value]:
    """Return the keys that hold a tokenizer.

    Args:
      content: of a tokenizer.model or a tokenizer.json.
      bos: whether texts begin with BOS.

    Raises:
      UserError: if a tokenizer.json is not byte-level BPE with a known pre-tokenizer.
    """
    is_json = tokenizer_file_name(content) == JSON
    keys = _byte_level_keys(content) if is_json else _keys(Vocabulary.from_model(content))
    return keys | {ADDS_BOS: bos, f"{PREFIX}add_eos_token": False}


def _keys(vocabulary: Vocabulary) -> dict[str, Value]:
    pieces = vocabulary.pieces
    keys: dict[str, Value] = {MODEL: "llama", PRE: "default"}
    keys[TOKENS] = [piece.text for piece in pieces]
    keys[SCORES] = np.array([piece.score for piece in pieces], np.float32)
    keys[KINDS] = np.array([piece.kind for piece in pieces], np.int32)
    keys |= {key: token for ours, key in IDS.items() if (token := getattr(vocabulary, ours)) >= 0}
    keys = {IDS["bos_id"]: NO_ID[1]} | keys  # without the key, readers take id 1
    keys |= {ADDS_SPACE: vocabulary.adds_space}
    keys |= {JOINS_SPACES: vocabulary.joins_spaces}  # known to few readers
    if vocabulary.characters:
        keys[CHARACTERS] = np.frombuffer(vocabulary.characters, np.uint8)
    return keys


def _byte_level_keys(content: bytes) -> dict[str, Value]:
    path = Path(JSON)
    values = parse_json(content, path)
    model, texts = values["model"], pieces(values, path)
    patterns = byte_level.patterns(values.get("pre_tokenizer"))
    found = patterns, bool(model.get("ignore_merges"))
    names = [n for n, pre in PRE_TOKENIZERS.items() if (pre.patterns, pre.ignore_merges) == found]
    normalizer = values.get("normalizer") or {}
    is_plain = not any(
        model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    if not (names and is_plain and model.get("type", "BPE") == "BPE" and "merges" in model):
        raise UserError(
            "GGUF cannot hold this tokenizer: it is not byte-level BPE with a pre-tokenizer that"
            " GGUF has a name for; choose another format"
        )
    if normalizer.get("type", "NFC") != "NFC":  # which llama.cpp leaves out in Qwen's too
        raise UserError(
            f"GGUF cannot hold this tokenizer: it normalizes texts by {normalizer.get('type')};"
            " choose another format"
        )
    added = {token["id"]: token.get("special", False) for token in values["added_tokens"]}
    roles = special_roles(values, texts)
    size = max(texts) + 1
    kinds = {
        token: Kind.CONTROL if special else Kind.USER_DEFINED for token, special in added.items()
    }
    kinds |= dict.fromkeys(roles.values(), Kind.CONTROL)
    kinds |= {token: Kind.UNUSED for token in range(size) if token not in texts}
    taken = dict.fromkeys(texts.values())
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return {
        MODEL: "gpt2",
        PRE: names[0],
        TOKENS: [texts.get(n) or byte_level.unused_name(n, taken) for n in range(size)],
        KINDS: np.array([kinds.get(n, Kind.NORMAL) for n in range(size)], np.int32),
        MERGES: merges,
        ADDS_SPACE: False,
        **{IDS[f"{role}_id"]: token for role, token in roles.items()},
    }
