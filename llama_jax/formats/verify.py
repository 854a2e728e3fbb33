"""Other people's Llamas as functions from tokens to logits, to compare ours with.

The only file that imports torch and transformers, each where it is needed. Everything is float32.
"""

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from llama_jax.checkpoints.layout import first_line
from llama_jax.config import ModelConfig
from llama_jax.errors import UserError
from llama_jax.formats.convert import Conversion
from llama_jax.formats.meta import shards as meta_shards
from llama_jax.formats.registry import FORMATS, written_dtype
from llama_jax.formats.weights import Weights
from llama_jax.model.parameters import count_parameters, named_leaves
from llama_jax.model.positions import frequencies
from llama_jax.model.transformer import Llama

Logits = Callable[[np.ndarray], np.ndarray]  # tokens [T] → float32 logits [T, V]


class CannotRun(Exception):
    """A program refuses a model; told in one line."""


def missing(*libraries: str) -> list[str]:
    """Those that are not installed."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def transformers_logits(folder: Path) -> Logits:
    """A Hugging Face folder's model by transformers; `CannotRun` if that does not open it."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,  # never a pickle
            attn_implementation="eager",
        )
    except Exception as error:
        raise CannotRun(f"transformers cannot open {folder}: {first_line(error)}") from error

    def logits(tokens_T: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens_T)[None], use_cache=False).logits[0].numpy()

    return logits


def meta_logits(path: Path, config: ModelConfig) -> Logits:
    """A folder of Meta's by a plain forward pass in torch, as Meta's code has it.

    Works on the tensors as they lie in the files, pairs side by side and turned as complex numbers,
    so that a mistake in our layouts cannot be made here too.
    """
    import torch

    shards, _ = meta_shards.find(path)
    tensors = meta_shards.merged(shards, config.dim)
    weights = {
        name: torch.from_numpy(np.array(tensor.read(), np.float32))
        for name, tensor in tensors.items()
        if name.endswith(".weight")
    }

    def logits(tokens_T: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return _meta_forward(weights, config, torch.from_numpy(tokens_T)).numpy()

    return logits


def _meta_forward(weights: dict[str, Any], config: ModelConfig, tokens_T: Any) -> Any:
    """Logits [T, V] of Meta's tensors."""
    import torch

    T, H = len(tokens_T), config.head_size
    turns = torch.from_numpy(frequencies(H, config.rope_theta, config.rope_scaling))
    angles = torch.outer(torch.arange(T, dtype=torch.float32), turns)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    mask = torch.full((T, T), -math.inf).triu(1)

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weights[name]

    def turned(x: Any) -> Any:
        pairs = torch.view_as_complex(x.reshape(T, -1, H // 2, 2))
        return torch.view_as_real(pairs * turn).reshape(T, -1, H)

    def attention(x: Any, prefix: str) -> Any:
        q, k, v = (x @ weights[f"{prefix}.w{name}.weight"].T for name in "qkv")
        repeats = config.num_heads // config.num_kv_heads
        k = turned(k).repeat_interleave(repeats, dim=1)
        v = v.reshape(T, -1, H).repeat_interleave(repeats, dim=1)
        scores = torch.einsum("tnh,snh->nts", turned(q), k) / math.sqrt(H) + mask
        mixed = torch.einsum("nts,snh->tnh", scores.softmax(-1), v)
        return mixed.reshape(T, -1) @ weights[f"{prefix}.wo.weight"].T

    def feed_forward(x: Any, prefix: str) -> Any:
        w1, w2, w3 = (weights[f"{prefix}.w{number}.weight"] for number in (1, 2, 3))
        return (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T

    x = weights["tok_embeddings.weight"][tokens_T]
    for layer in (f"layers.{index}" for index in range(config.num_layers)):
        x = x + attention(norm(x, f"{layer}.attention_norm.weight"), f"{layer}.attention")
        x = x + feed_forward(norm(x, f"{layer}.ffn_norm.weight"), f"{layer}.feed_forward")
    output = weights.get("output.weight", weights["tok_embeddings.weight"])
    return norm(x, "norm.weight") @ output.T


# Does a converted model compute what its source does? The same tokens through both, in float32.
#
# The source is run by its own reference where that can be imported: by transformers if it is
# Hugging
# Face's, by Meta's forward pass in torch if it is Meta's; else by our model, read from the source.
# Models are in memory one after the other, never two at once.

LENGTH, CONTINUED = 48, 16  # tokens in all, and how many of them the source's model chose
TOLERANCE = 1e-3  # as a share of the largest logit, where no number was rounded


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the source's model makes of random tokens."""

    reference: str  # whose program ran it
    tokens_T: np.ndarray
    continued: int  # how many of them, the last, were its own greedy choice
    logits_TV: np.ndarray


def memory_needed(source: Weights) -> int:
    """Bytes that verifying holds at its peak, about: a model in float32, and as much again.

    The rest is what is not given back of the model before, and files that transformers maps.
    """
    return 8 * count_parameters(source.config) + 8 * LENGTH * source.config.vocab_size


def is_cheap(source: Weights) -> bool:
    """Whether verifying takes less than half of this machine's memory."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory_needed(source) < installed / 2


def verify(job: Conversion, source: Weights) -> Iterator[str]:
    """Compare what a conversion wrote with its source; a line for each program that ran it.

    Args:
      source: the model as `convert` returned it.

    Raises:
      UserError: when the two differ although no number was rounded.
    """
    try:
        answer = _ask(job, source)
    except CannotRun as error:
        yield f"not verified: {error}"
        return
    dtype = written_dtype(job.target, source, job.options)
    target = FORMATS[job.target]
    is_kept = not (job.options.dtype or job.options.quantization or target.casts)
    is_held = all(tensor.dtype.name == dtype for tensor in source.tensors.values())
    is_exact = is_kept or is_held or dtype == "float32"
    written = target.read(job.output, None)
    yield _compared(answer, our_logits(written), "llama_jax", is_exact)
    if job.target == "hf" and not missing("torch", "transformers"):
        try:
            theirs = transformers_logits(job.output)
        except CannotRun as error:
            raise UserError(f"{error}; please report it") from error
        yield _compared(answer, theirs, "transformers", is_exact)


def _ask(job: Conversion, source: Weights) -> Answer:
    """Let the source's own program continue random tokens."""
    config = source.config
    length = min(LENGTH, config.context_length)
    continued = min(CONTINUED, length // 2)
    tokens_T = np.random.default_rng(0).integers(0, config.vocab_size, length - continued)
    name, logits = _reference(job, source)
    while len(tokens_T) < length:
        tokens_T = np.append(tokens_T, logits(tokens_T)[-1].argmax())
    return Answer(name, tokens_T, continued, logits(tokens_T))


def _reference(job: Conversion, source: Weights) -> tuple[str, Logits]:
    """The program to run the source with, and the model in it."""
    if job.source == "hf" and not missing("torch", "transformers"):
        return "transformers", transformers_logits(job.input)
    if job.source == "meta" and not missing("torch"):
        return "Meta's forward pass in torch", meta_logits(job.input, source.config)
    return f"llama_jax on {job.source}", our_logits(source)


def our_logits(weights: Weights) -> Logits:
    """Our model in float32 as a function from at most `LENGTH` tokens to their logits [T, V]."""
    length = min(LENGTH, weights.config.context_length)
    with jax.default_device(jax.devices("cpu")[0]):
        model = _built(weights)

    def logits(tokens_T: np.ndarray) -> np.ndarray:
        padded_BT = np.zeros((1, length), np.int32)
        padded_BT[0, : len(tokens_T)] = tokens_T  # one shape: one compilation
        with jax.default_matmul_precision("highest"):
            return np.asarray(_forward(model, padded_BT))[: len(tokens_T)]

    return logits


@jax.jit
def _forward(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Logits [T, V] of the first row."""
    return model(tokens_BT)[0][0]


def _built(weights: Weights) -> Llama:
    """Our model with these weights, as float32; its blocks are a list, so that none is copied."""
    config = dataclasses.replace(weights.config, compute_dtype="float32")
    shapes = jax.eval_shape(lambda: _in_layers(Llama(config, rngs=nnx.Rngs(0))))
    arrays = [
        jax.numpy.asarray(np.asarray(weights.tensors[name].read(), np.float32))
        for name in named_leaves(shapes)
    ]
    return jax.tree.unflatten(jax.tree.structure(shapes), arrays)


def _in_layers(model: Any) -> Any:
    """A model with its blocks apart: its leaves have the names and shapes that weights have."""
    layers = range(model.config.num_layers)
    blocks = [jax.tree.map(lambda array, i=i: array[i], model.blocks) for i in layers]
    model.blocks = nnx.List(blocks)
    return model


def _compared(answer: Answer, logits: Logits, name: str, is_exact: bool) -> str:
    """The line about a program that ran what was written."""
    logits_TV, T = logits(answer.tokens_T), len(answer.tokens_T)
    if not np.isfinite(answer.logits_TV).all():
        return f"not verified: {answer.reference} finds logits that are NaN or infinite"
    difference = float(np.abs(logits_TV - answer.logits_TV).max())
    largest = float(np.abs(answer.logits_TV).max())
    chosen = logits_TV[-answer.continued - 1 : -1].argmax(-1)
    agree = int((chosen == answer.tokens_T[T - answer.continued :]).sum())
    found = (
        f"{name} on what was written against {answer.reference}: max |Δlogit| {difference:.2g}"
        f" where logits reach {largest:.2g}, {agree} of {answer.continued} greedy tokens agree"
    )
    if is_exact and not difference <= TOLERANCE * max(largest, 1):
        raise UserError(f"{found}, although no number was rounded; do not use it, and report it")
    return f"verified: {found}"
