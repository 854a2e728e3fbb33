"""What llama2.c's train.py saves, `ckpt.pt`: a pickle of tensors, the model's arguments and more.

It is read by `formats.torch.reader`, which runs nothing of it. The optimizer's state is not read.
"""

import dataclasses
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig
from llama_jax.config_parsing import parse
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.json_files import shown
from llama_jax.formats.torch import reader
from llama_jax.formats.weights import DTYPES, Tensor

COMPILED = "_orig_mod."  # before each name, where torch.compile made the model
EMBEDDING, OUTPUT, GATE = "tok_embeddings.weight", "output.weight", "feed_forward.w1.weight"
TABLES = ("freqs_cos", "freqs_sin")  # in checkpoints of 2023


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """The keys of `model_args`, with the defaults of llama2.c's model.py."""

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = -1  # -1: n_heads
    vocab_size: int = 32_000
    hidden_dim: int = -1  # -1: by `multiple_of`
    multiple_of: int = 256
    norm_eps: float = 1e-5
    max_seq_len: int = 2048
    dropout: float = 0.0


def read(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the config, and the tensors by llama2.c's names; of a tied model without the output.

    Raises:
      UserError: if the file is damaged or something else, or its arguments describe no Llama.
    """
    found = reader.read_object(path)
    args, state = (
        found.get(key) if isinstance(found, dict) else None for key in ("model_args", "model")
    )
    if not isinstance(args, dict) or not isinstance(state, dict):
        what = f"holds a {type(found).__name__} without model_args and model"
        raise UserError(f"{path} {what}; expected a ckpt.pt of llama2.c's train.py")
    tensors = {str(name).removeprefix(COMPILED): tensor for name, tensor in state.items()}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES.values():
            what = tensor.dtype.name if isinstance(tensor, Tensor) else type(tensor).__name__
            raise UserError(f"{path} holds {shown(name)}, {what}; expected {', '.join(DTYPES)}")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in TABLES}
    config = _config(path, args, tensors)
    if config.tied_embeddings:
        tensors.pop(OUTPUT, None)
    return config, tensors


def _config(path: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> ModelConfig:
    is_tied = OUTPUT not in tensors or _are_equal(tensors.get(EMBEDDING), tensors[OUTPUT])
    widths = [tensor.shape[0] for name, tensor in tensors.items() if name.endswith(GATE)]
    try:
        args = parse(ModelArgs, {key: value for key, value in values.items() if value is not None})
        config = ModelConfig(
            vocab_size=args.vocab_size,
            dim=args.dim,
            num_layers=args.n_layers,
            num_heads=args.n_heads,
            num_kv_heads=args.n_heads if args.n_kv_heads == -1 else args.n_kv_heads,
            context_length=args.max_seq_len,
            hidden_dim=max(args.hidden_dim, 0),
            multiple_of=args.multiple_of,
            norm_eps=args.norm_eps,
            tied_embeddings=is_tied,
            dropout=args.dropout,
        )
        if widths and config.ffn_dim != widths[0]:
            config = dataclasses.replace(config, hidden_dim=widths[0])
    except (UsageError, OverflowError) as error:
        raise UserError(f"{path}: model_args: {error}") from error
    if config.num_layers > len(tensors):
        message = f"{config.num_layers:,} layers in model_args and {len(tensors)} tensors"
        raise UserError(f"{path} has {message}; copy it again")
    return config


def _are_equal(one: Tensor | None, other: Tensor) -> bool:
    if one is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return one.read().tobytes() == other.read().tobytes()
