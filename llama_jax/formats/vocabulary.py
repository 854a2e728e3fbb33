"""The pieces of a SentencePiece tokenizer as data, which tokenizer files of all formats contain."""

import dataclasses
import enum
import itertools
from collections.abc import Collection, Mapping, Sequence

from llama_jax.errors import UserError
from llama_jax.text.tokenizer import JSON, tokenizer_file_name

NOT_BPE = (
    "the tokenizer is a SentencePiece model but not BPE, as Llama 2's is; only the formats ckpt and"
    " meta can hold it"
)


class Kind(enum.IntEnum):
    """The type of a piece, by SentencePiece's and GGUF's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


LOWEST = -1e10  # a score below all others; Llama 2's lowest is -1e9


@dataclasses.dataclass(frozen=True)
class Piece:
    """An entry of a vocabulary; pieces with higher scores are merged first."""

    text: str  # with ▁ for a space
    score: float  # float32
    kind: Kind = Kind.NORMAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A BPE vocabulary with byte fallback, as Llama 2's. Ids are indices of `pieces`; -1: none."""

    pieces: tuple[Piece, ...]
    unknown_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    adds_space: bool = True  # a space is put before every text
    joins_spaces: bool = False  # several spaces become one, at the ends of a text none
    characters: bytes = b""  # SentencePiece's compiled table of characters to replace first

    @classmethod
    def from_model(cls, model: bytes) -> "Vocabulary":
        """Return the vocabulary of a SentencePiece model; `UserError` if it is none, or not BPE."""
        if tokenizer_file_name(model) == JSON:
            raise UserError(
                "the format holds SentencePiece vocabularies alone, and this model has a"
                " tokenizer.json; convert it to ckpt, hf or gguf"
            )
        proto = _proto()
        try:
            proto.ParseFromString(model)
        except Exception as error:
            raise UserError(f"the tokenizer is not a SentencePiece model: {error}") from error
        trainer = proto.trainer_spec
        if trainer.model_type != trainer.BPE:
            raise UserError(NOT_BPE)
        return cls(
            pieces=tuple(Piece(p.piece, p.score, Kind(p.type)) for p in proto.pieces),
            unknown_id=trainer.unk_id,
            bos_id=trainer.bos_id,
            eos_id=trainer.eos_id,
            pad_id=trainer.pad_id,
            adds_space=proto.normalizer_spec.add_dummy_prefix,
            joins_spaces=proto.normalizer_spec.remove_extra_whitespaces,
            characters=proto.normalizer_spec.precompiled_charsmap,
        )

    def to_model(self) -> bytes:
        """Return a SentencePiece model with these pieces."""
        proto = _proto()
        for piece in self.pieces:
            proto.pieces.add(piece=piece.text, score=piece.score, type=int(piece.kind))
        trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
        trainer.model_type = trainer.BPE
        trainer.vocab_size = len(self.pieces)
        trainer.byte_fallback = any(piece.kind == Kind.BYTE for piece in self.pieces)
        trainer.split_digits = True
        trainer.allow_whitespace_only_pieces = True
        trainer.unk_surface = " \u2047 "
        trainer.unk_id, trainer.pad_id = self.unknown_id, self.pad_id
        trainer.bos_id, trainer.eos_id = self.bos_id, self.eos_id
        for name in ("unk", "bos", "eos", "pad"):
            token = getattr(trainer, f"{name}_id")
            if 0 <= token < len(self.pieces):
                setattr(trainer, f"{name}_piece", self.pieces[token].text)
        normalizer.name = "user_defined" if self.characters else "identity"
        normalizer.precompiled_charsmap = self.characters
        normalizer.add_dummy_prefix = self.adds_space
        normalizer.remove_extra_whitespaces = self.joins_spaces
        normalizer.escape_whitespaces = True
        return proto.SerializeToString(deterministic=True)


def _proto():  # type: ignore[no-untyped-def]
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto()


# ---- scores of pieces and ranked lists of merges ----
#
# SentencePiece joins the neighbours whose joint piece has the highest score, Hugging Face those
# whose merge has the lowest rank; both the leftmost of equals. Ranks can become scores: nothing is
# joined across the ends of a piece, so what happens within it does not depend on its neighbours,
# and a piece always arises by the same merge, the last one in its own text. The rank of that merge
# is its score. A piece that its own text does not give can never arise.

Pair = tuple[str, str]


def merges(scores: Mapping[str, float]) -> list[Pair]:
    """Return every way to join two pieces into a third, the first to be tried first.

    Of equal scores the longest piece comes first: then several spaces, which have the same score at
    all lengths in Llama 2, are joined from the left as in SentencePiece.
    """
    found = []
    for text, score in scores.items():
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, -len(text), text, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def ranks(merges: Sequence[Pair], unreachable: Collection[str] = ()) -> dict[str, int]:
    """Return the rank of the merge by which each piece arises, for those that do.

    Args:
      unreachable: pieces that never arise for another reason.
    """
    by_pair = {pair: rank for rank, pair in enumerate(merges)}
    texts = {left + right for left, right in merges} - set(unreachable)
    arising = {text: _last_rank(text, by_pair) for text in texts}
    return {text: rank for text, rank in arising.items() if rank >= 0}


def _last_rank(text: str, by_pair: Mapping[Pair, int]) -> int:
    """Return the rank of the merge that joins all of a text, or -1 if it stays in parts."""
    parts, none, rank = list(text), len(by_pair), -1
    while len(parts) > 1:
        found = [by_pair.get(pair, none) for pair in itertools.pairwise(parts)]
        rank = min(found)
        if rank == none:
            return -1
        place = found.index(rank)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return rank
