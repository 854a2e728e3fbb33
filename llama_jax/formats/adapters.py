"""Adapters in and out: merged into a model that is converted, and as folders of PEFT.

A folder of PEFT has adapter_config.json and adapter_model.safetensors. Its matrices are those of
Hugging Face's models, [outputs, inputs], with rotary pairs in halves as ours: nothing is permuted.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from llama_jax.checkpoints.load import read_adapters, read_fingerprint, require_base
from llama_jax.checkpoints.metadata import Description, read_description
from llama_jax.checkpoints.restore import folder_and_step
from llama_jax.config import LoraConfig, ModelConfig
from llama_jax.errors import UsageError, UserError, warn
from llama_jax.files import new_path
from llama_jax.formats import checkpoint
from llama_jax.formats.huggingface import safetensors
from llama_jax.formats.huggingface.model import TABLE
from llama_jax.formats.json_files import read_object, shown, write_object
from llama_jax.formats.rules import KERNEL, WEIGHT
from llama_jax.formats.weights import BLOCKS, DTYPES, Tensor, Weights, find_file, of_layer
from llama_jax.model.lora import Adapters, init_adapters, scale_of, targets
from llama_jax.text.tokenizer import read_file, tokenizer_path

SETTINGS, ARRAYS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of PEFT's names
COPIES = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
# Settings of PEFT that change what an adapter computes, and the values with which they do not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "trainable_token_indices": (None, []),
}


@dataclasses.dataclass(frozen=True)
class AdapterFolder:
    """Adapters read from a folder of ours or of PEFT."""

    adapters: Adapters
    lora: LoraConfig
    base: str  # path of the model that they belong to, as recorded
    fingerprint: str = ""  # of its parameters; "": unknown
    description: Description | None = None  # of ours: how the tuned model is prompted


def is_adapter(path: Path) -> bool:
    """Return whether a folder holds adapters, ours or PEFT's."""
    if (path / SETTINGS).is_file():
        return True
    try:
        return read_description(folder_and_step(path)[0]).lora.rank > 0
    except UserError:
        return False


def read(path: Path, config: ModelConfig | None = None) -> AdapterFolder:
    """Return the adapters of a folder.

    Args:
      config: of the model that they belong to, for PEFT's, which do not say; not used for ours.

    Raises:
      UserError: if they are damaged, of a kind that is not known, or do not fit the model.
    """
    if (path / SETTINGS).is_file():
        assert config is not None
        return _read_peft(path, config)
    stored = read_adapters(path)
    found = stored.description
    return AdapterFolder(stored.adapters, found.lora, found.base, stored.base, found)


# ---- merging ----


def merged(weights: Weights, path: Path, source: Path, keeps_dtype: bool = True) -> Weights:
    """Return a model with the adapters of a folder added to its matrices, tensor by tensor.

    Args:
      weights: the model that they belong to, read from `source`.
      keeps_dtype: round the sums to the dtypes of the model; else they are float32, for a target
        that rounds them to its own.

    Raises:
      UserError: if the model is quantized, or is not that of the adapters.
    """
    if weights.is_rounded:
        raise UserError(
            f"{source} is quantized, and merging {path} into it would round the sums again; name"
            " the model that it was quantized from with --base"
        )
    folder = read(path, weights.config)
    _require_base(folder, path, source)
    tensors = dict(weights.tensors)
    for name, a, b in _by_layer(folder.adapters):
        full = name + KERNEL if name.startswith(BLOCKS) else name
        tensors[full] = _added(tensors[full], a, b, folder.lora, keeps_dtype)
    changes: dict[str, Any] = {"tensors": tensors}
    if own := folder.description:
        changes |= {"bos": own.bos, "stop_ids": own.stop_ids, "generation": own.generation}
        changes["chat_template"] = own.chat_template
    return dataclasses.replace(weights, **changes)


def _added(
    tensor: Tensor, a: np.ndarray, b: np.ndarray, lora: LoraConfig, keeps_dtype: bool
) -> Tensor:
    """Return a tensor plus scale · a · b, computed in float32."""

    def read() -> np.ndarray:
        R = a.shape[-1]
        product = (a.reshape(-1, R) @ b.reshape(R, -1)).reshape(tensor.shape)
        return tensor.read().astype(np.float32) + np.float32(scale_of(lora)) * product

    wide = Tensor(tensor.shape, DTYPES["float32"], read)
    return wide.astype(tensor.dtype) if keeps_dtype else wide


def _require_base(folder: AdapterFolder, path: Path, source: Path) -> None:
    """Raise `UserError` if adapters are known to belong to another model than that at `source`."""
    try:
        found = read_fingerprint(source)
    except UserError:  # of another format, whose parameters have no fingerprint
        warn(f"it cannot be checked that the adapters of {path} belong to {source}")
        return
    require_base(found, folder.fingerprint or found, path, source)


def _by_layer(adapters: Adapters) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name of each adapted matrix, such as blocks.3.attention.wq, and its a and b."""
    for name, adapter in adapters.items():
        a, b = (np.asarray(adapter[part][...], np.float32) for part in ("a", "b"))
        if name.startswith(BLOCKS):
            yield from ((of_layer(name, layer), *pair) for layer, pair in enumerate(zip(a, b)))
        else:
            yield name, a, b


# ---- PEFT ----


def _peft_names(config: ModelConfig) -> dict[str, str]:
    """Return the names of PEFT's modules by ours, such as blocks.3.attention.wq → …q_proj."""
    found = {}
    for rule in TABLE:
        if rule.ours.endswith(KERNEL) or rule.ours in ("embedding", "output"):
            layers = range(config.num_layers) if "{layer}" in rule.ours else (0,)
            for layer in layers:
                theirs = rule.theirs.format(layer=layer).removesuffix(WEIGHT)
                found[rule.ours.format(layer=layer).removesuffix(KERNEL)] = theirs
    return found


def write_peft(path: Path, output: Path) -> int:
    """Write adapters of ours as a new folder that PEFT opens; return how many numbers it holds.

    Raises:
      UserError: if it exists, belongs to a model without rotary embeddings, which transformers has
        not, or holds an adapter of a tied embedding, which PEFT has not.
    """
    folder = read(path)
    assert folder.description is not None
    config, lora = folder.description.model, folder.lora
    if config.position != "rope":
        raise UserError(
            f"{path} adapts a model with model.position={config.position!r}, and the Llama of"
            " transformers, which PEFT adapts, has 'rope' only; use the adapter here, or merge it"
            " with --merge and --to ckpt"
        )
    if config.tied_embeddings and "embedding" in folder.adapters:
        raise UserError(
            f"{path} adapts an embedding that is the output matrix too, which PEFT cannot express;"
            " use --merge"
        )
    names, tensors, modules = _peft_names(config), dict[str, Tensor](), set[str]()
    for name, a, b in _by_layer(folder.adapters):
        modules.add(names[name].rpartition(".")[2])
        tensors |= _to_peft(name, PREFIX + names[name], a, b)
    with new_path(output) as place:
        place.mkdir()
        safetensors.write(place / ARRAYS, tensors)
        write_object(place / SETTINGS, _peft_settings(lora, sorted(modules), folder.base))
    return sum(int(np.prod(tensor.shape)) for tensor in tensors.values())


def _to_peft(name: str, theirs: str, a: np.ndarray, b: np.ndarray) -> dict[str, Tensor]:
    """Return PEFT's two tensors of an adapter; both are stored outputs first."""
    R = a.shape[-1]
    a_IR, b_RO = a.reshape(-1, R), b.reshape(R, -1)
    if name == "embedding":
        pair = {".lora_embedding_A": a_IR.T, ".lora_embedding_B": b_RO.T}
    elif name == "output":  # a table of ours: a has the outputs
        pair = {".lora_A.weight": b_RO, ".lora_B.weight": a_IR}
    else:
        pair = {".lora_A.weight": a_IR.T, ".lora_B.weight": b_RO.T}
    return {
        theirs + part: Tensor(x.shape, x.dtype, partial(np.ascontiguousarray, x))
        for part, x in pair.items()
    }


def _peft_settings(lora: LoraConfig, modules: list[str], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def _read_peft(path: Path, config: ModelConfig) -> AdapterFolder:
    """Return the adapters of a folder of PEFT for a model of this shape."""
    settings_path, arrays_path = (find_file(path, name) for name in (SETTINGS, ARRAYS))
    assert settings_path is not None
    values = read_object(settings_path)
    if arrays_path is None:
        raise UserError(f"{path} has no {ARRAYS}; save the adapter with safe_serialization=True")
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"{settings_path}: peft_type={shown(values.get('peft_type'))}; expected LORA"
        )
    for key, neutral in NEUTRAL.items():
        if values.get(key, neutral[0]) not in neutral:
            message = f"{settings_path}: {key}={shown(values[key])} is not supported"
            raise UserError(f"{message}; merge it with PEFT's merge_and_unload")
    stored = safetensors.read(arrays_path)
    ours = {theirs: name for name, theirs in _peft_names(config).items()}
    found: dict[str, dict[str, np.ndarray]] = {}
    table = (config.vocab_size, config.dim)
    for key, tensor in stored.items():
        if key.endswith(COPIES) and tensor.shape == table:  # of the base's, beside its adapter
            continue
        theirs, part = _split(key.removeprefix(PREFIX))
        name = ours.get(theirs)
        if name is None or not part:
            raise UserError(f"{arrays_path} holds {shown(key)}, which is no adapter of this model")
        found.setdefault(name, {})[part] = tensor.read().astype(np.float32)
    lora = _lora_config(values, found, settings_path)
    shapes = jax.eval_shape(partial(init_adapters, config, lora, jax.random.key(0)))
    adapters: Adapters = {}
    for matrix in targets(config, lora):
        layers = [of_layer(matrix.name, layer) for layer in range(config.num_layers)]
        named = layers if matrix.per_layer else [matrix.name]
        pairs = [_from_peft(matrix.name, found.get(name, {}), arrays_path) for name in named]
        adapters[matrix.name] = {
            part: _param(pairs, number, shapes[matrix.name][part], arrays_path, matrix.name)
            for number, part in enumerate(("a", "b"))
        }
    return AdapterFolder(adapters, lora, str(values.get("base_model_name_or_path") or ""))


def _split(key: str) -> tuple[str, str]:
    """Return a module's name and which matrix of its adapter a key names: "A", "B" or ""."""
    for part in ("A", "B"):
        for ending in (
            f".lora_{part}.weight",
            f".lora_{part}.default.weight",
            f".lora_embedding_{part}",
        ):
            if key.endswith(ending):
                return key.removesuffix(ending), part
    return key, ""


def _lora_config(values: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> LoraConfig:
    """Return the settings of adapters as a config, with the targets that arrays are there for."""
    rank, alpha, rate = values.get("r"), values.get("lora_alpha"), values.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path}: r={shown(rank)} and lora_alpha={shown(alpha)}; expected numbers")
    names = sorted({name.rpartition(".")[2] for name in found})
    try:
        return LoraConfig(
            rank=rank,
            alpha=float(alpha),
            rslora=values.get("use_rslora") is True,
            dropout=float(rate) if type(rate) in (int, float) else 0.0,
            targets=",".join(names),
        )
    except (UsageError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error


def _from_peft(name: str, pair: Mapping[str, np.ndarray], path: Path) -> tuple[Any, Any]:
    """Return (a, b) as matrices [·, R] and [R, ·] of what PEFT stores."""
    if set(pair) != {"A", "B"}:
        raise UserError(f"{path} has not both matrices of each layer's {name}; copy it again")
    if name == "output":
        return pair["B"], pair["A"]
    return pair["A"].T, pair["B"].T


def _param(
    pairs: list[tuple[Any, Any]], number: int, shape: nnx.Param, path: Path, name: str
) -> nnx.Param:
    """Return one factor of all layers' adapters as a parameter of the expected shape."""
    arrays, dims = [pair[number] for pair in pairs], shape.shape[name.startswith(BLOCKS) :]
    split = (len(dims) - 1, 1)[number]  # a is [inputs, R], b [R, outputs]
    expected = math.prod(dims[:split]), math.prod(dims[split:])
    for array in arrays:
        if array.shape != expected:
            message = f"{path} has {list(array.shape)} for {name}, expected {list(expected)}"
            raise UserError(f"{message}; it belongs to another model")
    return nnx.Param(jnp.asarray(np.stack(arrays).reshape(shape.shape)), axes=shape.axes)


def from_peft(path: Path, base: Path, output: Path) -> int:
    """Write the adapters of a folder of PEFT as a new folder of ours; return their numbers.

    Args:
      base: a checkpoint of ours of the model that they belong to.

    Raises:
      UserError: if it exists, the base is missing, or the adapters do not fit it.
    """
    home = folder_and_step(base)[0]
    description = read_description(home)
    if description.lora.rank:
        raise UserError(f"{base} holds adapters; name the model that they belong to with --base")
    folder = _read_peft(path, description.model)
    own = dataclasses.replace(description, quantization=None, lora=folder.lora, base=str(base))
    found = read_fingerprint(base)
    with new_path(output) as place:
        checkpoint.write_adapters(
            place, own, folder.adapters, found, read_file(tokenizer_path(home))
        )
    return sum(leaf.size for leaf in jax.tree.leaves(folder.adapters))
