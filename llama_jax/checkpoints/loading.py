"""A model from a checkpoint folder, trained or converted, with all that is needed to use it."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoints.description import Description, read_description
from llama_jax.checkpoints.layout import damaged, other_numbers
from llama_jax.checkpoints.reader import Restored, restore
from llama_jax.checkpoints.run_folder import TOKENIZER
from llama_jax.checkpoints.steps import folder_and_step, newest_whole
from llama_jax.checkpoints.stored_model import MODEL, stored_model
from llama_jax.config import ModelConfig, require
from llama_jax.errors import UsageError, UserError
from llama_jax.instruments.metrics import warn
from llama_jax.model import Llama
from llama_jax.names import named_leaves
from llama_jax.parallel.sharding import placed, shardings
from llama_jax.quantization import QuantizedMatrix, quantize, require_kind
from llama_jax.text.tokenizer import Tokenizer

DTYPES = ("", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds."""

    model: Llama  # blocks stacked, or a list if quantised; see `model.unstack` for decoding
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    bos: bool  # documents it learnt from begin with BOS
    chat_template: str  # see `description.Description`


def load(
    path: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """The newest whole checkpoint of a folder, or the one of a step's folder.

    Nothing is written. A damaged checkpoint is reported and passed over for the one before it.

    Args:
      dtype: of parameters and arithmetic, "float32" or "bfloat16". If empty, both are as stored,
        but for what the device has no fast arithmetic for.
      quantize: "int8" or "int4" makes matrices integers; None leaves them as stored.
      mesh: devices that parameters are cut over; each reads its own parts. None: the first device.

    Raises:
      UsageError: for another dtype, or a kind of integers other than those stored.
      UserError: when there is no finished checkpoint, all are damaged, or the tokenizer is not the
        model's.
    """
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown; expected 'float32' or 'bfloat16'")
    if quantize is not None:
        require_kind(quantize)
    folder, step = folder_and_step(path)
    description = read_description(folder)
    _require_same_kind(folder, description, quantize)
    compute_dtype = dtype or _fast_dtype(description.model.compute_dtype)
    config = dataclasses.replace(description.model, compute_dtype=compute_dtype)
    description = dataclasses.replace(description, model=config)
    restored = _restore(folder, step, description, mesh)
    tokenizer = Tokenizer(folder / TOKENIZER)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} pieces and the model"
            f" {config.vocab_size}; restore the tokenizer it was trained with"
        )
    model = restored.trees.pop("model")
    if quantize and not description.quantization:
        model = _quantized(model, quantize)
    model = _cast(model, jnp.dtype(compute_dtype), cast_all=bool(dtype))
    return Loaded(
        model, config, tokenizer, restored.step, description.bos, description.chat_template
    )


_quantized = quantize  # `load` has an argument of that name


def _require_same_kind(folder: Path, description: Description, kind: str | None) -> None:
    stored = description.quantization
    if stored and kind not in (None, stored.kind):
        raise UsageError(
            f"quantize={kind!r} does not fit: {folder} is stored as {stored.kind}; leave it out,"
            " or quantise the model that it was made from"
        )


def _fast_dtype(compute_dtype: str) -> str:
    """The dtype to compute in where none is asked for."""
    # XLA has no fast bfloat16 matmuls on CPU: 10 to 20 times slower than float32.
    return "float32" if jax.default_backend() == "cpu" else compute_dtype


def _restore(
    folder: Path, step: Path | None, description: Description, mesh: Mesh | None
) -> Restored:
    """A step's arrays, each in the dtype it is stored in."""

    def read(step: Path) -> Restored:
        return _restore_step(step, description, mesh)

    restored = read(step) if step else newest_whole(folder, read, report=warn)
    if restored is None:
        raise UserError(f"{folder} has no finished checkpoint; train for longer, or look elsewhere")
    return restored


def _restore_step(step: Path, description: Description, mesh: Mesh | None) -> Restored:
    model = stored_model(step, description)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = shardings(model, mesh) if mesh else jax.tree.map(lambda _: here, model)
    restored = restore(step, {MODEL: placed(model, places)})
    expected, found = named_leaves(model), named_leaves(restored.trees[MODEL])
    for name, leaf in found.items():
        if why := other_numbers(name, np.dtype(leaf.dtype), np.dtype(expected[name].dtype)):
            raise damaged(step, why)
    return restored


def _cast(model: Llama, dtype: jnp.dtype, cast_all: bool) -> Llama:
    """The model with its half-precision parameters, or all, in a dtype; the old ones are freed.

    Arithmetic would turn a half-precision parameter into its own dtype at each use. Quantised
    matrices stay as they are, for their products know what to make of them.
    """

    def is_quantized(leaf: object) -> bool:
        return isinstance(leaf, QuantizedMatrix)

    def cast(array: jax.Array) -> jax.Array:
        if is_quantized(array) or array.dtype == dtype:
            return array
        if not (cast_all or array.dtype.itemsize == 2):
            return array
        new = array.astype(dtype).block_until_ready()
        array.delete()
        return new

    return jax.tree.map(cast, model, is_leaf=is_quantized)
