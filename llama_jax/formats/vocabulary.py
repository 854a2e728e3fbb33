"""The pieces of a SentencePiece tokenizer as data: what tokenizer files of all formats agree on.

The only file that knows how SentencePiece lays a model out; what pieces do is `tokenizer`'s.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Collection, Mapping, Sequence

from llama_jax.errors import UserError


class Kind(enum.IntEnum):
    """What a piece is for; SentencePiece's numbers, and GGUF's."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry: its text with ▁ for a space, how willingly it is merged, and its kind."""

    text: str
    score: float  # float32
    kind: Kind = Kind.NORMAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A BPE vocabulary with byte fallback, as Llama 2's. Ids are places in `pieces`; -1: none."""

    pieces: tuple[Piece, ...]
    unknown_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    adds_space: bool = True  # a space goes before every text
    joins_spaces: bool = False  # runs of spaces count as one, at the ends as none
    characters: bytes = b""  # SentencePiece's compiled table of characters to replace first

    @classmethod
    def from_model(cls, model: bytes) -> "Vocabulary":
        """The pieces of a SentencePiece model; `UserError` if it is none, or is not BPE."""
        proto = _proto()
        try:
            proto.ParseFromString(model)
        except Exception as error:
            raise UserError(f"the tokenizer is not a SentencePiece model: {error}") from error
        trainer = proto.trainer_spec
        if trainer.model_type != trainer.BPE:
            raise UserError("the tokenizer is a SentencePiece model but not BPE, as Llama 2's is")
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
        """A SentencePiece model that encodes and decodes with these pieces."""
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

    @functools.cached_property
    def ids(self) -> dict[str, int]:
        """The id of each text."""
        return {piece.text: token for token, piece in enumerate(self.pieces)}


def _proto():  # type: ignore[no-untyped-def]
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    return ModelProto()


# Two ways to say which pieces a text falls into: scores of pieces, and a ranked list of merges.
#
# SentencePiece joins the neighbours whose joint piece scores best; Hugging Face those whose merge
# ranks first; both the leftmost of equals. Does not know files, kinds of pieces or ids.
#
# Why ranks can become scores: what happens within the span of a piece does not depend on what is
# around it, since nothing is ever joined across its ends. So a piece arises everywhere by the one
# merge that makes it of its own text alone, and the rank of that merge is its score. A piece that
# its own text does not give can never arise.

Pair = tuple[str, str]


def merges(scores: Mapping[str, float]) -> list[Pair]:
    """Every way to join two pieces into a third, best first.

    Of equal scores the longest piece comes first: then a run of spaces, all lengths of which score
    the same in Llama 2, grows from the left like in SentencePiece.
    """
    found = []
    for text, score in scores.items():
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, -len(text), text, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def ranks(merges: Sequence[Pair], unreachable: Collection[str] = ()) -> dict[str, int]:
    """The rank by which each piece arises, of those that do.

    Args:
      unreachable: pieces that do not arise for another reason.
    """
    by_pair = {pair: rank for rank, pair in enumerate(merges)}
    texts = {left + right for left, right in merges} - set(unreachable)
    arising = {text: _last_rank(text, by_pair) for text in texts}
    return {text: rank for text, rank in arising.items() if rank >= 0}


def _last_rank(text: str, by_pair: Mapping[Pair, int]) -> int:
    """The rank of the merge that joins the whole text, or -1 if it stays in parts."""
    parts, none, rank = list(text), len(by_pair), -1
    while len(parts) > 1:
        found = [by_pair.get(pair, none) for pair in itertools.pairwise(parts)]
        rank = min(found)
        if rank == none:
            return -1
        place = found.index(rank)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return rank
