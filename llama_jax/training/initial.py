"""The weights that a run starts from: random ones, or those of the checkpoint `run.init_from`."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax.checkpoints.load import load, read_fingerprint
from llama_jax.checkpoints.metadata import Description, read_description
from llama_jax.checkpoints.restore import folder_and_step
from llama_jax.config import FLOAT_BASES, STORED, Config, MeshConfig, ModelConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.errors import UsageError
from llama_jax.model.transformer import Llama
from llama_jax.training.optimizer import make_optimizer
from llama_jax.training.step import (
    Programs,
    TrainState,
    abstract_state,
    as_base,
    first_adapters,
    state_shardings,
)

OWN = ("compute_dtype", "dropout", "context_length")  # settings of a model that a run may change
FIXED_CONTEXT = ("absolute", "relative")  # positions learned for one context length


def base_description(config: Config) -> Description | None:
    """Return the description of the checkpoint that a run starts from; None: it has none.

    Raises:
      UsageError: if its model has another shape than the config's, it holds adapters, or it is of
        this run itself.
      UserError: if it is missing or damaged.
    """
    if not config.run.init_from:
        return None
    folder, _ = folder_and_step(config.run.init_from)
    found = read_description(folder)
    if folder.resolve() == Path(config.run.checkpoint_dir).expanduser().resolve():
        raise UsageError(
            f"run.init_from={config.run.init_from} is in run.checkpoint_dir, which the run writes"
            " to; choose another folder with --config.run.checkpoint_dir=…"
        )
    if found.lora.rank:
        raise UsageError(
            f"run.init_from={config.run.init_from} holds adapters; merge them with"
            " convert.py --merge, and start from the result"
        )
    own = OWN[:-1] if config.model.position in FIXED_CONTEXT else OWN
    for field in dataclasses.fields(ModelConfig):
        theirs, ours = getattr(found.model, field.name), getattr(config.model, field.name)
        if field.name not in own and theirs != ours:
            raise UsageError(
                f"model.{field.name}={ours} is not that of {folder}, which is {theirs}; leave it"
                " out, and it is taken from there"
            )
    _require_base_kind(config, found, folder)
    return found


def _require_base_kind(config: Config, found: Description, folder: Path) -> None:
    """Raise `UsageError` if a checkpoint's storage does not fit `lora.base`."""
    kind, stored = config.lora.base, ""
    if found.quantization:
        q = found.quantization
        stored = STORED + (q.kind if q.kind == "int8" else f"{q.kind}-{q.group_size}")
    if stored and not config.lora.rank:
        raise UsageError(
            f"{folder} is stored as {found.quantization.kind}, and all weights are trained; start"  # type: ignore[union-attr]
            " from the model that it was quantized from, or train adapters with lora.rank"
        )
    if config.lora.rank and stored != (kind if kind.startswith(STORED) else ""):
        expected = repr(stored) if stored else "a kind without 'stored-'"
        raise UsageError(f"lora.base={kind!r} does not fit {folder}; expected {expected}")


def load_frozen(config: Config, mesh: Mesh) -> tuple[Any, str]:
    """Return the frozen part of a run's state, or None, and the fingerprint of `run.init_from`.

    Raises:
      UserError: if the checkpoint cannot be loaded.
    """
    expected, places = abstract_state(config).frozen, state_shardings(config, mesh).frozen
    if expected is None:
        return None, read_fingerprint(config.run.init_from) if config.run.init_from else ""
    if config.lora.base in FLOAT_BASES:
        loaded = load(config.run.init_from, jax.tree.leaves(expected)[0].dtype.name, mesh=mesh)
        model = as_base(loaded.model, config, consume=True)
    else:  # in the host's memory, since the floats may not fit on a device
        host = make_mesh(MeshConfig(data=1), jax.local_devices(backend="cpu")[:1])
        loaded = load(config.run.init_from, mesh=host)
        model = as_base(loaded.model, config)
    return _placed(model, expected, places), loaded.fingerprint


def first_state(config: Config, programs: Programs, mesh: Mesh, frozen: Any) -> TrainState:
    """Return the state before the first step, with the frozen part that `load_frozen` returned."""
    if not config.run.init_from:
        return programs.init()
    places = state_shardings(config, mesh)
    if config.lora.rank:
        make = partial(first_adapters, config)
        trainable = jax.jit(make, out_shardings=places.trainable)()
    else:
        model = load(config.run.init_from, "float32", mesh=mesh).model
        trainable = _placed(model, abstract_state(config).trainable, places.trainable)
    init = jax.jit(make_optimizer(config.optimizer).init, out_shardings=places.optimizer)
    step, healthy = jax.device_put((jnp.int32(0), jnp.bool(True)), (places.step, places.healthy))
    return TrainState(step, healthy, trainable, frozen, init(trainable))


def _placed(model: Llama, expected: Llama, places: Any) -> Llama:
    """Return a model on its devices, with the settings of an abstract one, such as its dropout."""
    same = jax.tree.unflatten(jax.tree.structure(expected), jax.tree.leaves(model))
    return jax.device_put(same, places)
