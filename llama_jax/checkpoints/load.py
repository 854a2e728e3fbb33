"""Load a model from a checkpoint folder, trained or converted, with its tokenizer and config.

A `config.json` may come from anywhere: sizes that the files cannot hold are refused before memory
is allocated for them.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoints import layout
from llama_jax.checkpoints.metadata import Description, read_description
from llama_jax.checkpoints.restore import Restored, folder_and_step, read_checkpoint, restore
from llama_jax.checkpoints.run_folder import require_tokenizer
from llama_jax.config import MeshConfig, ModelConfig, require
from llama_jax.distributed.mesh import make_mesh, placed, shardings
from llama_jax.errors import UsageError, UserError, whole_number
from llama_jax.model.parameters import abstract, count_parameters, named_leaves
from llama_jax.model.transformer import Llama, unstack
from llama_jax.quantization import QuantizedMatrix, abstract_quantized, require_kind
from llama_jax.quantization import quantize as quantize_model
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_path

MODEL = "model"  # the item of a step
DTYPES = ("", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what is needed to use it."""

    model: Llama  # blocks stacked, or a list if quantised or loaded for inference
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    bos: bool  # documents in training began with BOS
    chat_template: str  # this and the next as in `checkpoints.metadata.Description`
    stop_ids: tuple[int, ...]
    generation: dict[str, float]


def load(
    path: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    mesh: Mesh | None = None,
) -> Loaded:
    """Load the newest intact checkpoint of a folder, or the one of a step's folder.

    Nothing is written. A damaged checkpoint is reported, and the one before it loaded.

    Args:
      dtype: of parameters and arithmetic, "float32" or "bfloat16". If empty, both are as stored,
        except that half precision becomes float32 on a CPU.
      quantize: "int8" or "int4" quantises matrices; None leaves them as stored.
      mesh: devices that parameters are sharded over; each reads its own shards. None: the first
        device.

    Raises:
      UsageError: for another dtype, or another kind of quantisation than the stored one.
      UserError: when there is no checkpoint, all are damaged, or the tokenizer is not the model's.
    """
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown; expected 'float32' or 'bfloat16'")
    if quantize is not None:
        require_kind(quantize)
    folder, step = folder_and_step(path)
    description = read_description(folder)
    stored = description.quantization
    if stored and quantize not in (None, stored.kind):
        raise UsageError(
            f"quantize={quantize!r} does not fit: {folder} is stored as {stored.kind}; leave it"
            " out, or quantise the model that it was made from"
        )
    # XLA has no fast bfloat16 matmuls on CPU: 10 to 20 times slower than float32.
    is_slow = jax.default_backend() == "cpu"
    compute_dtype = dtype or ("float32" if is_slow else description.model.compute_dtype)
    config = dataclasses.replace(description.model, compute_dtype=compute_dtype)
    description = dataclasses.replace(description, model=config)
    read = partial(_restore_model, description=description, mesh=mesh)
    restored = read_checkpoint(folder, step, read)
    require_tokenizer(folder, restored.meta)
    tokenizer = load_tokenizer(tokenizer_path(folder))
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces and the model"
            f" {config.vocab_size}; restore the tokenizer it was trained with"
        )
    model = restored.trees.pop(MODEL)
    if quantize and not stored:
        model = quantize_model(model, quantize)
    model = _cast(model, jnp.dtype(compute_dtype), cast_all=bool(dtype))
    return Loaded(
        model=model,
        config=config,
        tokenizer=tokenizer,
        step=restored.step,
        bos=description.bos,
        chat_template=description.chat_template,
        stop_ids=description.stop_ids,
        generation=description.generation,
    )


def _restore_model(step: Path, description: Description, mesh: Mesh | None) -> Restored:
    """Restore a step's model, each array in the dtype it is stored in."""
    model = abstract_model(step, description)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = shardings(model, mesh) if mesh else jax.tree.map(lambda _: here, model)
    restored = restore(step, {MODEL: placed(model, places)})
    expected = named_leaves(model)
    for name, leaf in named_leaves(restored.trees[MODEL]).items():
        dtypes = np.dtype(leaf.dtype), np.dtype(expected[name].dtype)
        if why := layout.dtype_mismatch(name, *dtypes):
            raise layout.damaged(step, why)
    return restored


def abstract_model(step: Path, description: Description) -> Llama:
    """Return a step's model with shapes in place of arrays; blocks of a quantised one are a list.

    Raises:
      UserError: when the step is damaged, or far too small for such a model.
    """
    item, config, quantization = step / MODEL, description.model, description.quantization
    try:
        layout.require_plausible(item, count_parameters(config))
        if quantization is None:
            return abstract(config)
        arrays = len(layout.names(item))
        if arrays < config.num_layers:  # layers are traced one by one
            raise ValueError(f"it has {arrays} arrays for {config.num_layers} layers")
        return abstract_quantized(config, *dataclasses.astuple(quantization))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise layout.damaged(step, error) from error


def _cast(model: Llama, dtype: jnp.dtype, cast_all: bool) -> Llama:
    """Return the model with its half-precision parameters, or all, in a dtype; frees the old ones.

    Otherwise each use would convert a half-precision parameter again. Quantised matrices stay as
    they are: their matmuls take them in any dtype.
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


def load_for_inference(
    checkpoint: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    max_context: int = 0,
    mesh: Mesh | None = None,
) -> Loaded:
    """Load a checkpoint as `load` does, its blocks unstacked for decoding.

    Args:
      max_context: positions of prompt and completion together, at most the model's; 0: those.
    """
    loaded = load(checkpoint, dtype, quantize=quantize, mesh=mesh)
    context = loaded.config.context_length
    expected = f"2 to {context}, the model's context; 0: all of it"
    in_range = lambda n: n == 0 or 2 <= n <= context  # noqa: E731
    max_context = whole_number("max_context", max_context, in_range, expected)
    model = unstack(loaded.model, consume=True)
    if mesh is not None:
        model = jax.device_put(model, shardings(model, mesh))
    model.config = dataclasses.replace(model.config, context_length=max_context or context)
    return dataclasses.replace(loaded, model=model)


def tensor_mesh(tensor: int) -> Mesh | None:
    """Return a mesh of the first devices that matrices are sharded over; None for one device.

    Raises:
      UsageError: when there are not so many.
    """
    devices = jax.device_count()
    whole_number("tensor", tensor, lambda n: 1 <= n <= devices, f"1 to {devices}, the devices")
    if tensor == 1:
        return None
    return make_mesh(MeshConfig(data=1, tensor=tensor), jax.devices()[:tensor])
