"""The keys of a GGUF file that hold a SentencePiece vocabulary, in both directions."""

from typing import Any

import numpy as np

from llama_jax.errors import UserError
from llama_jax.formats.gguf.header import Keys, Value
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary

PREFIX = "tokenizer.ggml."
MODEL = f"{PREFIX}model"
TOKENS, SCORES, KINDS = f"{PREFIX}tokens", f"{PREFIX}scores", f"{PREFIX}token_type"
IDS = {"unknown_id": "unknown", "bos_id": "bos", "eos_id": "eos", "pad_id": "padding"}
ADDS_SPACE, ADDS_BOS = f"{PREFIX}add_space_prefix", f"{PREFIX}add_bos_token"
JOINS_SPACES = f"{PREFIX}remove_extra_whitespaces"
CHARACTERS = f"{PREFIX}precompiled_charsmap"
NONE = (-1, 2**32 - 1)  # what writers put for an id that there is not


def read_pieces(keys: Keys) -> Vocabulary:
    """The vocabulary that keys hold; `UserError` if they hold none, or another kind's."""
    if (model := keys.text(MODEL)) != "llama":
        raise UserError(
            f"{keys.path} has a tokenizer of kind {model[:64]!r}; expected 'llama', SentencePiece's"
        )
    texts, scores, kinds = keys.texts(TOKENS), keys.numbers(SCORES), keys.numbers(KINDS)
    if not len(texts) == len(scores) == len(kinds):
        sizes = f"{len(texts)} tokens, {len(scores)} scores and {len(kinds)} token types"
        raise UserError(f"{keys.path} has {sizes}; expected as many of each")
    if not set(kinds.tolist()) <= set(Kind):
        raise UserError(f"{keys.path} has a token type other than 1 to 6 in {KINDS}")
    if not np.isfinite(scores).all():
        raise UserError(f"{keys.path} has a score in {SCORES} that is not a number")
    pieces = zip(texts, scores.tolist(), kinds.tolist())
    ids: dict[str, Any] = {ours: _read_id(keys, ours, len(texts)) for ours in IDS}
    return Vocabulary(
        pieces=tuple(Piece(text, float(score), Kind(kind)) for text, score, kind in pieces),
        adds_space=keys.flag(ADDS_SPACE, True),
        joins_spaces=keys.flag(JOINS_SPACES, False),
        characters=keys.numbers(CHARACTERS).tobytes() if CHARACTERS in keys else b"",
        **ids,
    )


def tokenizer_keys(vocabulary: Vocabulary, bos: bool) -> dict[str, Value]:
    """The keys that hold a vocabulary; `bos`: whether texts begin with BOS."""
    pieces = vocabulary.pieces
    keys: dict[str, Value] = {MODEL: "llama", f"{PREFIX}pre": "default"}
    keys[TOKENS] = [piece.text for piece in pieces]
    keys[SCORES] = np.array([piece.score for piece in pieces], np.float32)
    keys[KINDS] = np.array([piece.kind for piece in pieces], np.int32)
    for ours in IDS:
        if (token := getattr(vocabulary, ours)) >= 0:
            keys[_key(ours)] = token
    keys |= {ADDS_BOS: bos, f"{PREFIX}add_eos_token": False, ADDS_SPACE: vocabulary.adds_space}
    keys |= {JOINS_SPACES: vocabulary.joins_spaces}  # known to few readers
    if vocabulary.characters:
        keys[CHARACTERS] = np.frombuffer(vocabulary.characters, np.uint8)
    return keys


def _key(ours: str) -> str:
    return f"{PREFIX}{IDS[ours]}_token_id"


def _read_id(keys: Keys, ours: str, size: int) -> int:
    """A special piece's id, -1 for none."""
    default: int = getattr(Vocabulary, ours)
    token = keys.integer(_key(ours), default)
    if token in NONE:
        return -1
    if not 0 <= token < size:
        raise UserError(f"{keys.path} has {_key(ours)} = {token}; expected 0 to {size - 1}")
    return token
