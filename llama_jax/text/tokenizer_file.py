"""The bytes of a tokenizer's file, and what is wrong with a file that is not one.

Knows how a SentencePiece file is laid out, not what it means.
"""

from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.stand_ins import stand_in

LARGEST_MODEL = 64 * 2**20  # bytes; Llama 2's has 0.5 MB


def read_model(path: Path) -> bytes:
    """The bytes of a model file, refused with the reason if they are evidently something else."""
    if path.is_dir():
        raise UserError(f"tokenizer {path} is a folder; give the tokenizer.model in it")
    if not path.is_file():
        raise UserError(f"tokenizer {path} does not exist; expected a SentencePiece model file")
    if path.stat().st_size > LARGEST_MODEL:
        raise UserError(not_a_model(path, f": it has {path.stat().st_size:,} bytes"))
    model = path.read_bytes()
    if why := stand_in(model[:512]):
        raise UserError(f"tokenizer {path} is {why}")
    fields, is_whole = _protobuf_fields(model)
    if 1 in fields and not (is_whole and fields >= {1, 2, 3}):
        raise UserError(f"tokenizer {path} is cut short after {len(model):,} bytes; copy it again")
    return model


def _protobuf_fields(data: bytes) -> tuple[set[int], bool]:
    """The field numbers at the top of a protobuf message, and whether the last field is whole.

    A SentencePiece model is pieces (1), then the trainer's (2) and normalizer's (3) settings. One
    that is cut between two fields loads without complaint, and then encodes differently.
    """
    fields, position = set(), 0
    while position < len(data) and data[position] & 7 == 2:  # all its fields have a length
        fields.add(data[position] >> 3)
        length, shift = 0, 0
        while (position := position + 1) < len(data) and shift < 63:
            length |= (data[position] & 127) << shift
            shift += 7
            if data[position] < 128:
                break
        position += 1 + length
    return fields, position == len(data)


def not_a_model(path: Path, why: str = "") -> str:
    """The complaint about a file that is no SentencePiece model."""
    return f"tokenizer {path} is not a SentencePiece model{why}; give a file like tokenizer.model"
