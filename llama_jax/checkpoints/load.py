"""Which arrays a checkpoint must hold to be the model that its folder describes.

Descriptions come from anywhere: what the files cannot hold is refused before it is made room for.
Does not know how arrays are read.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoints import layout
from llama_jax.checkpoints.layout import damaged, other_numbers
from llama_jax.checkpoints.metadata import Description, read_description
from llama_jax.checkpoints.restore import Restored, folder_and_step, newest_whole, restore
from llama_jax.checkpoints.run_folder import TOKENIZER, require_tokenizer
from llama_jax.config import MeshConfig, ModelConfig, require
from llama_jax.distributed.mesh import make_mesh, placed, shardings
from llama_jax.errors import UsageError, UserError, warn, whole_number
from llama_jax.model.parameters import abstract, count_parameters, named_leaves
from llama_jax.model.transformer import Llama, unstack
from llama_jax.quantization import QuantizedMatrix, abstract_quantized, quantize, require_kind
from llama_jax.text.tokenizer import Tokenizer

MODEL = "model"  # the item of a step


def stored_model(step: Path, description: Description) -> Llama:
    """A step's model with shapes in place of arrays; a quantised one's blocks are a list.

    Raises:
      UserError: when the step is damaged, or far too small for such a model.
    """
    try:
        return _stored_model(step / MODEL, description)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise layout.damaged(step, error) from error


def _stored_model(item: Path, description: Description) -> Llama:
    config, quantization = description.model, description.quantization
    layout.require_plausible(item, count_parameters(config))
    if quantization is None:
        return abstract(config)
    arrays = len(layout.names(item))
    if arrays < config.num_layers:  # which are traced one by one
        raise ValueError(f"it has {arrays} arrays for {config.num_layers} layers")
    return abstract_quantized(config, quantization.kind, quantization.group_size)


# A model from a checkpoint folder, trained or converted, with all that is needed to use it.

DTYPES = ("", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint folder holds."""

    model: Llama  # blocks stacked, or a list if quantised; `unstack` makes the list
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    bos: bool  # documents it learnt from begin with BOS
    chat_template: str  # see `checkpoints.metadata.Description`


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
    require_tokenizer(folder, restored.meta)
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


# A checkpoint made ready to write: arranged for decoding, and on the devices it is to use.


def tensor_mesh(tensor: int) -> Mesh | None:
    """The first devices as a mesh that matrices are cut over; none for one device.

    Raises:
      UsageError: when there are not so many.
    """
    devices = jax.device_count()
    whole_number("tensor", tensor, lambda n: 1 <= n <= devices, f"1 to {devices}, the devices")
    if tensor == 1:
        return None
    return make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])


def deploy(
    checkpoint: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    max_context: int = 0,
    mesh: Mesh | None = None,
) -> Loaded:
    """What a folder holds, its model's blocks a list as decoding wants them; see `llm.LLM`.

    On a mesh each device reads its own parts, and keeps no others.
    """
    loaded = load(checkpoint, dtype, quantize=quantize, mesh=mesh)
    context = loaded.config.context_length
    expected = f"2 to {context}, the model's context; 0: all of it"
    in_range = lambda n: n == 0 or 2 <= n <= context  # noqa: E731
    max_context = whole_number("max_context", max_context, in_range, expected)
    model = unstack(loaded.model)
    if mesh is not None:
        model = jax.device_put(model, shardings(model, mesh))
    model.config = dataclasses.replace(model.config, context_length=max_context or context)
    return dataclasses.replace(loaded, model=model)
