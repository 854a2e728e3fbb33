"""The tokenizer that a user names for a model whose files carry none.

Does not know models; it compares vocabulary sizes.
"""

from pathlib import Path

from llama_jax.errors import UserError
from llama_jax.formats import tokenizer_bin
from llama_jax.text.tokenizer import Tokenizer


def tokenizer_model(path: Path, vocab_size: int) -> bytes:
    """A SentencePiece model from a tokenizer.model, or made from llama2.c's tokenizer.bin.

    Args:
      vocab_size: of the model; 0 if it is not known.

    Raises:
      UserError: if the file is neither, is damaged, or has another number of pieces.
    """
    if _is_bin(path):
        model = tokenizer_bin.read(path, vocab_size).to_model()
        _require_loadable(path, model)
        return model
    tokenizer = Tokenizer(path)
    if vocab_size and tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces and the model {vocab_size};"
            " give the tokenizer it was trained with"
        )
    return path.read_bytes()


def _is_bin(path: Path) -> bool:
    """Whether a file begins with a small int32, as none of SentencePiece's can."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(4)
    return len(head) == 4 and head[2:] == b"\0\0"


def _require_loadable(path: Path, model: bytes) -> None:
    """`UserError` if SentencePiece refuses a model, for bytes that lack or a piece that repeats."""
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().LoadFromSerializedProto(model)
    except RuntimeError as error:
        why = " ".join(str(error).split())
        raise UserError(f"tokenizer {path} is damaged, says SentencePiece: {why}") from error
