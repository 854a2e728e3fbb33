"""A model from a checkpoint folder, trained or converted, with all that is needed to use it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from llama_jax.checkpoint import Restored, restore, restore_newest
from llama_jax.config import ModelConfig, require
from llama_jax.description import read_description
from llama_jax.errors import UserError
from llama_jax.metrics import warn
from llama_jax.model import Llama, abstract
from llama_jax.run_folder import TOKENIZER
from llama_jax.steps import folder_and_step
from llama_jax.tokenizer import Tokenizer

DTYPES = ("", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds."""

    model: Llama  # blocks stacked; see `model.unstack` for decoding
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    bos: bool  # documents it learnt from begin with BOS


def load(path: str | Path, dtype: str = "") -> Loaded:
    """The newest whole checkpoint of a folder, or the one of a step's folder.

    Nothing is written. A damaged checkpoint is reported and passed over for the one before it.

    Args:
      dtype: of parameters and arithmetic, "float32" or "bfloat16". If empty, both are as stored,
        but for what the device has no fast arithmetic for.

    Raises:
      UsageError: for another dtype.
      UserError: when there is no finished checkpoint, all are damaged, or the tokenizer is not the
        model's.
    """
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown; expected 'float32' or 'bfloat16'")
    folder, step = folder_and_step(path)
    description = read_description(folder)
    compute_dtype = dtype or _fast_dtype(description.model.compute_dtype)
    config = dataclasses.replace(description.model, compute_dtype=compute_dtype)
    restored = _restore(folder, step, config)
    tokenizer = Tokenizer(folder / TOKENIZER)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} pieces and the model"
            f" {config.vocab_size}; restore the tokenizer it was trained with"
        )
    model = _cast(restored.trees.pop("model"), jnp.dtype(compute_dtype), cast_all=bool(dtype))
    return Loaded(model, config, tokenizer, restored.step, description.bos)


def _fast_dtype(compute_dtype: str) -> str:
    """The dtype to compute in where none is asked for."""
    # XLA has no fast bfloat16 matmuls on CPU: 10 to 20 times slower than float32.
    return "float32" if jax.default_backend() == "cpu" else compute_dtype


def _restore(folder: Path, step: Path | None, config: ModelConfig) -> Restored:
    """A step's arrays on the first device, each in the dtype it is stored in."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract(config)
    )
    if step is not None:
        return restore(step, {"model": wanted})
    restored = restore_newest(folder, {"model": wanted}, report=warn)
    if restored is None:
        raise UserError(f"{folder} has no finished checkpoint; train for longer, or look elsewhere")
    return restored


def _cast(model: Llama, dtype: jnp.dtype, cast_all: bool) -> Llama:
    """The model with its half-precision parameters, or all, in a dtype; the old ones are freed.

    Arithmetic would turn a half-precision parameter into its own dtype at each use.
    """

    def cast(array: jax.Array) -> jax.Array:
        if array.dtype == dtype or not (cast_all or array.dtype.itemsize == 2):
            return array
        new = array.astype(dtype).block_until_ready()
        array.delete()
        return new

    return jax.tree.map(cast, model)
