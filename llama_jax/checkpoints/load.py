"""Load a model from a checkpoint folder, trained or converted, with its tokenizer and config.

A `config.json` may come from anywhere: sizes that the files cannot hold are refused before memory
is allocated for them.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llama_jax.checkpoints import layout
from llama_jax.checkpoints.metadata import PROMPTING, Description, read_description
from llama_jax.checkpoints.restore import (
    Restored,
    folder_and_step,
    read_checkpoint,
    restore,
    stored_arrays,
)
from llama_jax.checkpoints.run_folder import require_tokenizer
from llama_jax.config import MAX_INT, ModelConfig
from llama_jax.distributed.mesh import placed, shardings
from llama_jax.errors import UsageError, UserError, require, whole_number
from llama_jax.model.lora import Adapters, attach, detach, init_adapters
from llama_jax.model.parameters import abstract, count_parameters, named_leaves
from llama_jax.model.transformer import Llama, unstack
from llama_jax.quantization import QuantizedMatrix, abstract_quantized, require_kind, shard_matmuls
from llama_jax.quantization import quantize as quantize_model
from llama_jax.text.tokenizer import Tokenizer, load_tokenizer, tokenizer_path

MODEL = "model"  # the item of a step
BASE = "base"  # of a step: the fingerprint of the model that its run started from
LAYER = re.compile(r"(?<=^blocks\.)\d+\.")  # in the name of an unstacked array
DTYPES = ("", "float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what is needed to use it."""

    model: Llama  # blocks stacked, or a list if quantised or loaded for inference
    config: ModelConfig
    tokenizer: Tokenizer
    step: int
    fingerprint: str  # of the stored parameters
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
    base: str = "",
) -> Loaded:
    """Load the newest intact checkpoint of a folder, or the one of a step's folder.

    Nothing is written. A damaged checkpoint is reported, and the one before it loaded. Adapters are
    loaded with the model that they were trained for, and attached to it.

    Args:
      dtype: of parameters and arithmetic, "float32" or "bfloat16". If empty, both are as stored,
        except that half precision becomes float32 on a CPU.
      quantize: "int8", "int4" or "nf4" quantises matrices; None leaves them as stored.
      mesh: devices that parameters are sharded over; each reads its own shards. None: the first
        device.
      base: of adapters, the checkpoint that they belong to; "": where it was in training.

    Raises:
      UsageError: for another dtype, or another kind of quantisation than the stored one.
      UserError: when there is no checkpoint, all are damaged, the tokenizer is not the model's, or
        adapters belong to another model.
    """
    loaded, adapt = _load(path, dtype, quantize, mesh, base)
    return dataclasses.replace(loaded, model=adapt(loaded.model))


def _load(
    path: str | Path, dtype: str, quantize: str | None, mesh: Mesh | None, base: str
) -> tuple[Loaded, Callable[[Llama], Llama]]:
    """Return what `load` does without adapters, and a function that attaches them."""
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown; expected 'float32' or 'bfloat16'")
    if quantize is not None:
        require_kind(quantize)
    folder, step = folder_and_step(path)
    description = read_description(folder)
    if description.lora.rank:
        own = read_adapters(path, mesh)
        origin = base or description.base
        _require_model(origin, folder)
        loaded = load(origin, dtype, quantize=quantize, mesh=mesh)
        require_base(loaded.fingerprint, own.base, folder, origin)
        prompting = {name: getattr(description, name) for name in PROMPTING if name != "eos"}
        attached = partial(attach, adapters=own.adapters, lora=description.lora)
        return dataclasses.replace(loaded, step=own.step, **prompting), attached
    require(not base, f"{folder} is no adapter; leave out the base")
    return _load_model(folder, step, description, dtype, quantize, mesh), lambda model: model


def _require_model(origin: str, adapters: Path) -> None:
    """Raise `UserError` unless the base of some adapters exists and is a model."""
    folder, _ = folder_and_step(origin)
    wrong = "" if folder.exists() else "does not exist"
    if not wrong and read_description(folder).lora.rank:  # attached, they would be added twice
        wrong = "holds adapters itself"
    if wrong:
        raise UserError(
            f"{origin}, named as the model of the adapters in {adapters}, {wrong}; name the model"
            " with --base"
        )


def _load_model(
    folder: Path,
    step: Path | None,
    description: Description,
    dtype: str,
    quantize: str | None,
    mesh: Mesh | None,
) -> Loaded:
    stored = description.quantization
    if stored and quantize not in (None, stored.kind):
        raise UsageError(
            f"quantize={quantize!r} does not fit: {folder} is stored as {stored.kind}; leave it"
            " out, or quantise the model that it was made from"
        )
    description = _with_compute_dtype(description, dtype)
    config = description.model
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
    model = _cast(model, jnp.dtype(config.compute_dtype), cast_all=bool(dtype))
    return Loaded(
        model=model,
        config=config,
        tokenizer=tokenizer,
        step=restored.step,
        fingerprint=fingerprint(restored.meta),
        bos=description.bos,
        chat_template=description.chat_template,
        stop_ids=description.stop_ids,
        generation=description.generation,
    )


def _with_compute_dtype(description: Description, dtype: str) -> Description:
    """Return the description with the dtype of the model's arithmetic; "": as `load` chooses it."""
    # XLA has no fast bfloat16 matmuls on CPU: 10 to 20 times slower than float32.
    is_slow = jax.default_backend() == "cpu"
    compute_dtype = dtype or ("float32" if is_slow else description.model.compute_dtype)
    config = dataclasses.replace(description.model, compute_dtype=compute_dtype)
    return dataclasses.replace(description, model=config)


# ---- adapters ----


@dataclasses.dataclass(frozen=True)
class StoredAdapters:
    """The adapters of a step, and the model that they belong to."""

    adapters: Adapters
    step: int
    base: str  # fingerprint of its parameters
    description: Description


def read_adapters(path: str | Path, mesh: Mesh | None = None) -> StoredAdapters:
    """Return the adapters of the newest intact checkpoint of a folder, or of a step's folder.

    Raises:
      UsageError: if it holds a model, not adapters.
      UserError: as for `load`.
    """
    folder, step = folder_and_step(path)
    description = read_description(folder)
    lora = description.lora
    require(lora.rank > 0, f"{folder} holds a model; expected the folder of a run with lora.rank")
    make = partial(init_adapters, description.model, lora, jax.random.key(0))
    adapters = jax.eval_shape(make)
    items = {MODEL: placed(adapters, _places(adapters, mesh))}
    restored = read_checkpoint(folder, step, lambda path: restore(path, items))
    require_tokenizer(folder, restored.meta)
    base = restored.meta.get(BASE, "")
    return StoredAdapters(restored.trees[MODEL], restored.step, base, description)


def require_base(found: str, expected: str, folder: Path, model: object) -> None:
    """Raise `UserError` if a model has another fingerprint than that of the adapters in a folder.

    Args:
      model: what the message calls it.
    """
    if found != expected:
        raise UserError(
            f"the adapters in {folder} were trained for another model than {model} (its fingerprint"
            f" is {found[:12]}, expected {expected[:12]}); name theirs with --base"
        )


def replace_adapters(
    model: Llama, found: str, path: str | Path, mesh: Mesh | None
) -> tuple[Llama, Description]:
    """Return a model with the adapters of a checkpoint, in place of those it may have.

    Args:
      found: the fingerprint of the model's own parameters.
      mesh: that the model's parameters are sharded over.

    Raises:
      UsageError, UserError: as for `read_adapters`, or if they belong to another model.
    """
    stored = read_adapters(path, mesh)
    require_base(found, stored.base, Path(path), "the one loaded")
    return attach(detach(model), stored.adapters, stored.description.lora), stored.description


def fingerprint(meta: dict[str, Any]) -> str:
    """Return what two steps share if their models have the same parameters."""
    return layout.json_checksum(meta["checksums"][MODEL])


def read_fingerprint(path: str | Path) -> str:
    """Return the fingerprint of the parameters that `load` loads, without reading them.

    Raises:
      UserError: when there is no checkpoint.
    """

    def of_step(step: Path) -> str:
        try:
            return fingerprint(layout.read_json(step / "meta"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise layout.damaged(step, error) from error

    folder, step = folder_and_step(path)
    read_description(folder)
    return read_checkpoint(folder, step, of_step)


def _restore_model(step: Path, description: Description, mesh: Mesh | None) -> Restored:
    """Restore a step's model, each array in the dtype it is stored in."""
    model = abstract_model(step, description)
    restored = restore(step, {MODEL: placed(model, _places(model, mesh))})
    expected = named_leaves(model)
    for name, leaf in named_leaves(restored.trees[MODEL]).items():
        dtypes = np.dtype(leaf.dtype), np.dtype(expected[name].dtype)
        if why := layout.dtype_mismatch(name, *dtypes):
            raise layout.damaged(step, why)
    return restored


def _places(tree: Any, mesh: Mesh | None) -> Any:
    """Return the sharding of each array: on the mesh, or on the first device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return shardings(tree, mesh) if mesh else jax.tree.map(lambda _: here, tree)


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

    def cast(array: jax.Array) -> jax.Array:
        if not _is_cast(array, dtype, cast_all):
            return array
        new = array.astype(dtype).block_until_ready()
        array.delete()
        return new

    return jax.tree.map(cast, model, is_leaf=_is_quantized)


def _is_cast(leaf: Any, dtype: jnp.dtype, cast_all: bool) -> bool:
    """Return whether `_cast` changes a leaf."""
    return (
        not _is_quantized(leaf) and leaf.dtype != dtype and (cast_all or leaf.dtype.itemsize == 2)
    )


def _is_quantized(leaf: object) -> bool:
    return isinstance(leaf, QuantizedMatrix)


def load_for_inference(
    checkpoint: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    max_context: int = 0,
    mesh: Mesh | None = None,
    base: str = "",
) -> Loaded:
    """Load a checkpoint as `load` does, its blocks unstacked for decoding.

    Args:
      max_context: positions of prompt and completion together, at most the model's where it has
        rotary or learned positions; 0: the model's.
    """
    loaded, adapt = _load(checkpoint, dtype, quantize, mesh, base)
    context = _context(loaded.config, max_context)
    model = adapt(unstack(loaded.model, consume=True))
    if mesh is not None:
        model = shard_matmuls(jax.device_put(model, shardings(model, mesh)))
    model.config = dataclasses.replace(model.config, context_length=context)
    return dataclasses.replace(loaded, model=model)


def _context(config: ModelConfig, max_context: int) -> int:
    """Return the positions that a model is used with; arguments as for `load_for_inference`."""
    context = config.context_length
    expected = f"2 to {context}, the model's context; 0: all of it"
    most = context if config.position in ("rope", "absolute") else MAX_INT
    in_range = lambda n: n == 0 or 2 <= n <= most  # noqa: E731
    return whole_number("max_context", max_context, in_range, expected) or context


def abstract_for_inference(
    checkpoint: str | Path,
    dtype: str = "",
    *,
    quantize: str | None = None,
    max_context: int = 0,
) -> Llama | None:
    """Return the model of `load_for_inference` with shapes instead of arrays, for the first device.

    Little is read, so that programs can be compiled for it while it is loaded.

    Returns:
      None for adapters, and for a checkpoint without a finished step.
    """
    folder, step = folder_and_step(checkpoint)
    description = read_description(folder)
    steps = layout.finished_steps(folder)
    if description.lora.rank or not (step or steps):
        return None
    description = _with_compute_dtype(description, dtype)
    step, config, cast_all = step or folder / str(steps[-1]), description.model, bool(dtype)
    model = abstract_model(step, description)
    if quantize and not description.quantization:
        model = abstract_quantized(config, quantize)
    model = jax.eval_shape(unstack, model)
    stored, wide = stored_arrays(step / MODEL), jnp.dtype(config.compute_dtype)

    def loaded(name: str, leaf: Any) -> Any:
        if _is_quantized(leaf):
            return leaf
        leaf = leaf.update(dtype=(stored.get(name) or stored[LAYER.sub("", name)]).dtype)
        return leaf.update(dtype=wide) if _is_cast(leaf, wide, cast_all) else leaf

    leaves = [loaded(*each) for each in named_leaves(model, _is_quantized).items()]
    structure = jax.tree.structure(model, is_leaf=_is_quantized)
    model = jax.tree.unflatten(structure, leaves)
    model = placed(model, _places(model, None))
    model.config = dataclasses.replace(config, context_length=_context(config, max_context))
    return model
