"""Models as GGUF files, which llama.cpp runs: in floats, Q8_0, or (read only) Q4_0 and Q6_K.

Reading needs nothing but NumPy; writing needs the `gguf` package.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.gguf.blocks import BF16, F16, F32, Q8_0
from llama_jax.formats.gguf.config import config_keys, read_config, stretches_of
from llama_jax.formats.gguf.files import promised, scan_all, stream
from llama_jax.formats.gguf.header import Keys, Value, scan
from llama_jax.formats.gguf.tokenizer import ADDS_BOS, MODEL, read_pieces, tokenizer_keys
from llama_jax.formats.rules import (
    AS_IS,
    HEADS_IN,
    INTERLEAVED,
    MATRIX,
    Layout,
    Rule,
    export_tensors,
    import_tensors,
)
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import Tensor, Weights

ARCHITECTURE = "llama"
EMBEDDING, OUTPUT, STRETCHES = "token_embd.weight", "output.weight", "rope_freqs.weight"
BLOCKS_VERSION = 2  # of ggml's quantisation
FAR_BEYOND = 1000  # times what a file holds
WRITTEN = {"float32": (F32, 0), "float16": (F16, 1), "bfloat16": (BF16, 32), "q8_0": (Q8_0, 7)}


def _of_block(ours: str, theirs: str, layout: Layout = AS_IS) -> Rule:
    return Rule(f"blocks.{{layer}}.{ours}", f"blk.{{layer}}.{theirs}.weight", layout)


TABLE = (
    Rule("embedding", EMBEDDING),
    _of_block("attention_norm.scale", "attn_norm"),
    _of_block("attention.wq.kernel", "attn_q", INTERLEAVED),
    _of_block("attention.wk.kernel", "attn_k", INTERLEAVED),
    _of_block("attention.wv.kernel", "attn_v", MATRIX),
    _of_block("attention.wo.kernel", "attn_output", HEADS_IN),
    _of_block("ffn_norm.scale", "ffn_norm"),
    _of_block("ffn.gate.kernel", "ffn_gate", MATRIX),
    _of_block("ffn.up.kernel", "ffn_up", MATRIX),
    _of_block("ffn.down.kernel", "ffn_down", MATRIX),
    Rule("norm.scale", "output_norm.weight"),
    Rule("output", OUTPUT),
)


def read(path: Path) -> Weights:
    """The model in a file, or in the files of which it is the first; quantised ones as float32.

    An output that is stored is taken as such, even where it repeats the embedding.

    Raises:
      UserError: if the file is broken, or holds something else than a Llama 2.
    """
    header = scan_all(path)
    keys, tensors = header.keys, header.tensors
    _check_architecture(keys)
    if not tensors:
        raise UserError(f"{path} holds no tensors, only a vocabulary; expected a whole model")
    foreign = promised(path, tensors)
    if EMBEDDING not in foreign:
        raise UserError(f"{path} holds no {EMBEDDING}; expected a whole model")
    stretches = _small(foreign.pop(STRETCHES)) if STRETCHES in foreign else np.zeros(0)
    embedding = foreign[EMBEDDING]
    config = read_config(
        keys,
        vocab_size=embedding.shape[0],
        tied=OUTPUT not in foreign,
        compute_dtype="float32" if embedding.dtype == F32.dtype else "bfloat16",
        stretches=stretches,
    )
    _check_sizes(path, config, foreign)
    return Weights(
        config=config,
        tensors=import_tensors(TABLE, config, foreign, path),
        tokenizer=_read_tokenizer(keys, config.vocab_size),
        bos=keys.flag(ADDS_BOS, True),
    )


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary of a file, which need not hold tensors, or ones that `read` can read.

    Raises:
      UserError: if the file is broken, or has another kind of tokenizer than SentencePiece's BPE.
    """
    return read_pieces(scan(path).keys)


def write(
    weights: Weights,
    path: Path,
    dtype: str = "",
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Write a file, tensor by tensor.

    Norm scales are float32 always; rows of a length that Q8_0's blocks do not divide are float16.
    A tokenizer that joins spaces or replaces characters says so; llama.cpp does not listen.

    Args:
      path: does not exist yet.
      dtype: of the matrices, a key of `WRITTEN`; empty: that of the weights, but float16 for
        bfloat16, which older hardware runs slowly.
      report: is given the bytes of `weights` written so far, after each tensor.

    Raises:
      UserError: if the `gguf` package or the tokenizer is missing, or a number does not fit.
    """
    dtype = dtype or ("float32" if weights.dtype == F32.dtype else "float16")
    if dtype not in WRITTEN:
        raise UserError(f"dtype {dtype!r} is unknown to GGUF; expected one of {', '.join(WRITTEN)}")
    kind, file_type = WRITTEN[dtype]
    keys: dict[str, Value] = {"general.name": path.stem, "general.file_type": file_type}
    keys |= {"general.quantization_version": BLOCKS_VERSION, **config_keys(weights.config)}
    keys |= tokenizer_keys(_vocabulary(weights), weights.bos)
    tensors = export_tensors(TABLE, weights.config, weights.tensors)
    if weights.config.rope_scaling.kind == "llama3":
        stretches = stretches_of(weights.config)
        tensors[STRETCHES] = Tensor(stretches.shape, stretches.dtype, lambda: stretches)
    stream(path, ARCHITECTURE, keys, tensors, kind, report)


def _check_architecture(keys: Keys) -> None:
    if (found := keys.text("general.architecture")) != ARCHITECTURE:
        raise UserError(f"{keys.path} is a model of kind {found[:64]!r}; expected {ARCHITECTURE!r}")
    if experts := keys.integer("llama.expert_count", 0):
        raise UserError(f"{keys.path} mixes {experts} experts, as Mixtral does; Llama 2 has none")


def _check_sizes(path: Path, config: ModelConfig, foreign: Mapping[str, Tensor]) -> None:
    """Refuse a shape beyond all that the file holds, before anything is made of it."""
    heads = config.num_heads + config.num_kv_heads
    matrices = 2 * config.dim * heads * config.head_size + 3 * config.dim * config.ffn_dim
    described, held = config.num_layers * matrices, sum(map(_numbers, foreign.values()))
    if config.num_layers > len(foreign) or described > FAR_BEYOND * held:
        blocks = f"{config.num_layers:,} blocks of {matrices:,} numbers"
        message = f"describes {blocks} and holds {held:,} numbers in {len(foreign)} tensors"
        raise UserError(f"{path} {message}; copy or convert it again")


def _read_tokenizer(keys: Keys, vocab_size: int) -> bytes:
    """A SentencePiece model of the pieces in keys; empty if there are none."""
    if keys.text(MODEL, "no_vocab") == "no_vocab":
        return b""
    vocabulary = read_pieces(keys)
    if len(vocabulary.pieces) != vocab_size:
        pieces = f"{len(vocabulary.pieces)} pieces in its vocabulary"
        raise UserError(f"{keys.path} has {pieces} and {vocab_size} rows in {EMBEDDING}")
    return vocabulary.to_model()


def _vocabulary(weights: Weights) -> Vocabulary:
    """The pieces that go into a file."""
    if not weights.tokenizer:
        raise UserError("GGUF holds the tokenizer and this model has none; name a --tokenizer")
    vocabulary = Vocabulary.from_model(weights.tokenizer)
    if len(vocabulary.pieces) != weights.config.vocab_size:
        sizes = f"{len(vocabulary.pieces)} pieces and the model {weights.config.vocab_size}"
        raise UserError(f"the tokenizer has {sizes}; use the one the model was trained with")
    return vocabulary


def _numbers(tensor: Tensor) -> int:
    """How many there are in a tensor."""
    return math.prod(tensor.shape)


def _small(tensor: Tensor) -> np.ndarray:
    """A tensor of a few numbers, as float32."""
    return np.array(tensor.read() if tensor.nbytes < 2**16 else np.nan, np.float32)
