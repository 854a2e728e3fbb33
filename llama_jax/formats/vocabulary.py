"""The pieces of a SentencePiece tokenizer as data: what tokenizer files of all formats agree on.

The only file that knows how SentencePiece lays a model out; what pieces do is `tokenizer`'s.
"""

import dataclasses
import enum
import functools

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
