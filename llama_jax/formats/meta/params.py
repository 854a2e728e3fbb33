"""Meta's params.json and our `ModelConfig`, in both directions."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama_jax.config import ModelConfig, RopeScaling
from llama_jax.config_parsing import parse
from llama_jax.errors import UsageError, UserError
from llama_jax.formats.json_files import read_object
from llama_jax.formats.meta.shards import EMBEDDING
from llama_jax.formats.rules import beyond_llama2
from llama_jax.formats.weights import Tensor

MAX_CONTEXT = 2**24  # tokens
LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0)  # that of `use_scaled_rope`
GATE = "layers.0.feed_forward.w1.weight"
LAYER = re.compile(r"layers\.([0-9]{1,9})\..*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    """The keys of params.json, by Meta's names."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = -1  # -1: n_heads
    vocab_size: int = -1  # -1: that of the tokenizer, which is the embedding's
    multiple_of: int = 256
    ffn_dim_multiplier: float = 1.0
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    use_scaled_rope: bool = False
    max_seq_len: int = -1  # -1: see `_context_length`
    max_batch_size: int = -1  # of Meta's own program; not used


def read(path: Path) -> Params:
    """Return the params in a file.

    Raises:
      UserError: if it is missing, not JSON, of another architecture, or has a wrong value.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; expected the params.json beside the .pth files")
    tree = read_object(path)
    known = {field.name for field in dataclasses.fields(Params)}
    if unknown := [key for key in tree if key not in known]:
        listed = ascii(", ".join(unknown)[:200])[1:-1]
        raise UserError(f"{path} is of another architecture than Llama 2: it has {listed}")
    try:
        return parse(Params, {key: value for key, value in tree.items() if value is not None})
    except (UsageError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error


def to_config(params: Params, foreign: Mapping[str, Tensor], source: Path) -> ModelConfig:
    """Return the config of a model with these params and merged tensors, by Meta's names.

    The width of the feed-forward is that of w1, and set by `multiple_of` if that gives the same.

    Raises:
      UserError: if layers or vocabulary are not those of the tensors, or a value is out of range.
    """
    layers = {match[1] for name in foreign if (match := LAYER.fullmatch(name))}
    if params.n_layers != len(layers):
        raise UserError(f"{source} says n_layers={params.n_layers}, the .pth hold {len(layers)}")
    rows = {name: tensor.shape[0] for name, tensor in foreign.items() if tensor.shape}
    pieces = rows.get(EMBEDDING, params.vocab_size)
    if params.vocab_size not in (-1, pieces):
        raise UserError(
            f"{source} says vocab_size={params.vocab_size}, but the embedding has {pieces} rows"
        )
    matrices = foreign[EMBEDDING].dtype.name if EMBEDDING in foreign else "float32"
    try:
        config = ModelConfig(
            vocab_size=pieces,
            dim=params.dim,
            num_layers=params.n_layers,
            num_heads=params.n_heads,
            num_kv_heads=params.n_heads if params.n_kv_heads == -1 else params.n_kv_heads,
            context_length=_context_length(params),
            multiple_of=params.multiple_of,
            ffn_dim_multiplier=params.ffn_dim_multiplier,
            norm_eps=params.norm_eps,
            rope_theta=params.rope_theta,
            rope_scaling=LLAMA3_SCALING if params.use_scaled_rope else RopeScaling(),
            tied_embeddings="output.weight" not in foreign,
            compute_dtype="float32" if matrices == "float32" else "bfloat16",
        )
        width = rows.get(GATE, config.ffn_dim)
        return config if width == config.ffn_dim else dataclasses.replace(config, hidden_dim=width)
    except (UsageError, OverflowError) as error:
        raise UserError(f"{source}: {error}") from error


def _context_length(params: Params) -> int:
    """Return `max_seq_len` if set, which Meta's files never do, else that of the likely model.

    Code Llama has a rope_theta of 1e6, Llama 3 one of 5e5, and 3.1 scales it; Llama 1 has a
    norm_eps of 1e-6 and Llama 2 one of 1e-5.
    """
    if params.max_seq_len != -1:
        if not 1 <= params.max_seq_len <= MAX_CONTEXT:
            raise UsageError(f"max_seq_len={params.max_seq_len} is out of range")
        return params.max_seq_len
    if params.use_scaled_rope:
        return 131072
    by_theta = {1e6: 16384, 5e5: 8192}
    return by_theta.get(params.rope_theta, 4096 if params.norm_eps == 1e-5 else 2048)


def from_config(config: ModelConfig) -> dict[str, Any]:
    """Return the params of a model, with the few keys that Meta's file of such a model has.

    `max_seq_len` is among them only if a reader would infer another: Meta's own program does not
    accept it there.

    Raises:
      UserError: if there are no params for what the model has beyond Llama 2, or its hidden_dim.
    """
    scaling = config.rope_scaling
    plain = scaling if scaling != LLAMA3_SCALING else RopeScaling()
    if lost := beyond_llama2(dataclasses.replace(config, rope_scaling=plain)):
        raise UserError(
            f"{', '.join(lost)} has no place in Meta's params.json; choose another format"
        )
    multiple_of, multiplier = _width_rule(config)
    params = Params(
        dim=config.dim,
        n_layers=config.num_layers,
        n_heads=config.num_heads,
        n_kv_heads=config.num_kv_heads if config.num_kv_heads != config.num_heads else -1,
        vocab_size=config.vocab_size,
        multiple_of=multiple_of,
        ffn_dim_multiplier=multiplier,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        use_scaled_rope=scaling == LLAMA3_SCALING,
    )
    if _context_length(params) != config.context_length:
        params = dataclasses.replace(params, max_seq_len=config.context_length)
    always = {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
    return {
        field.name: getattr(params, field.name)
        for field in dataclasses.fields(params)
        if field.name in always or getattr(params, field.name) != field.default
    }


def _width_rule(config: ModelConfig) -> tuple[int, float]:
    """Return a multiple_of and an ffn_dim_multiplier that give the model's hidden_dim.

    The config's own, or the largest power of two that divides the width, with a short multiplier.
    """
    width = config.ffn_dim
    power = math.gcd(width, 4096)
    plain = dataclasses.replace(config, hidden_dim=0, ffn_dim_multiplier=1.0, multiple_of=1).ffn_dim
    choices = [(config.multiple_of, config.ffn_dim_multiplier), (power, 1.0)]
    choices += [(power, round(width / plain, digits)) for digits in range(1, 9)]
    choices += [(1, (width + 0.5) / plain)]
    for multiple_of, multiplier in choices:
        if 1e-3 <= multiplier <= 1e3:
            ruled = dataclasses.replace(
                config, hidden_dim=0, multiple_of=multiple_of, ffn_dim_multiplier=multiplier
            )
            if ruled.ffn_dim == width:
                return multiple_of, multiplier
    raise UserError(f"model.hidden_dim={width} is not a width that Meta's rule gives for dim")
