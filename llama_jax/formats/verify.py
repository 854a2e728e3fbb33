"""Comparison of a converted model with its source: the same tokens through both, in float32,
the same texts through their tokenizers, and what texts begin and end with.

A source from Hugging Face is run by transformers and one of Meta's by a forward pass in torch, if
these are installed; any other by our own model. One model is in memory at a time.
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

from llama_jax.config import ModelConfig
from llama_jax.errors import UserError, first_line
from llama_jax.formats.convert import FORMATS, TOKENIZER_BIN, Conversion, written_dtype
from llama_jax.formats.llama2c.tokenizer import differences
from llama_jax.formats.prompting import STOPS
from llama_jax.formats.vocabulary import Vocabulary
from llama_jax.formats.weights import Weights
from llama_jax.model.parameters import count_parameters, named_leaves
from llama_jax.model.positions import frequencies
from llama_jax.model.transformer import Llama
from llama_jax.text.tokenizer import parse_tokenizer

LENGTH, CONTINUED = 48, 16  # tokens in all, and how many of them the source's model chose
TOLERANCE = 1e-3  # of the largest logit, where no number was rounded
TEXTS = (  # whose ids are compared
    "The quick brown fox can't jump over 1234 lazy dogs, or 56.",
    "  naïve café\t日本語 한국어 🙂👍🏽\r\n\n x = {'a': [1, 2]}  # end ",
    "<s> [INST] <|im_end|> </s>",
)
Logits = Callable[[np.ndarray], np.ndarray]  # tokens [T] → float32 logits [T, V]


class CannotRun(Exception):
    """A library refuses a model."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the source's model computes for random tokens and its own continuation of them."""

    reference: str  # the program that ran it
    tokens_T: np.ndarray
    continued: int  # how many of them, the last, were its own greedy choice
    logits_TV: np.ndarray


def memory_needed(source: Weights) -> int:
    """Return about how many bytes `verify` holds at its peak: a model in float32, twice.

    The second is memory of the model before that is not returned, and files mapped by transformers.
    """
    return 8 * count_parameters(source.config) + 8 * LENGTH * source.config.vocab_size


def is_cheap(source: Weights) -> bool:
    """Return whether verifying takes less than half of this machine's memory."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory_needed(source) < installed / 2


def verify(job: Conversion, source: Weights) -> Iterator[str]:
    """Compare what a conversion wrote with its source; yield a line for each program that ran it.

    Args:
      source: the model as `convert` returned it.

    Raises:
      UserError: if the two differ although no number was rounded.
    """
    try:
        answer = _answer(job, source)
    except CannotRun as error:
        yield f"not verified: {error}"
        return
    dtype = written_dtype(job.target, source, job.options)
    target = FORMATS[job.target]
    is_kept = not (job.options.dtype or job.options.quantization or target.casts)
    is_held = all(tensor.dtype.name == dtype for tensor in source.tensors.values())
    is_exact = is_kept or is_held or dtype == "float32"
    beside = job.output.with_name(TOKENIZER_BIN)
    is_beside = job.target == "llama2c" and bool(source.tokenizer)
    written = target.read(job.output, beside if is_beside else None)
    _compare_texts(source, written, job)
    yield _compared(answer, our_logits(written), "llama_jax", is_exact)
    if job.target == "hf" and not missing("torch", "transformers"):
        try:
            theirs = transformers_logits(job.output)
        except CannotRun as error:
            raise UserError(f"{error}; please report it") from error
        yield _compared(answer, theirs, "transformers", is_exact)


def _compare_texts(source: Weights, written: Weights, job: Conversion) -> None:
    """Raise `UserError` if texts get other ids than in the source, or begin or end otherwise."""
    if not (source.tokenizer and written.tokenizer):
        return
    one = parse_tokenizer(source.tokenizer, job.input)
    other = parse_tokenizer(written.tokenizer, job.output)
    is_known = job.target == "llama2c" and differences(Vocabulary.from_model(source.tokenizer))
    for text in TEXTS[:1] if is_known else TEXTS:  # a warning said that odd ones differ
        if (ours := one.encode(text)) != (theirs := other.encode(text)):
            raise UserError(
                f"the tokenizer written to {job.output} encodes {text!r} as {theirs}, that of"
                f" {job.input} as {ours}; do not use it, and report it"
            )
    pairs: dict[str, tuple[object, object]] = {"BOS id": (one.bos_id, other.bos_id)}
    if FORMATS[job.target].holds_prompting:
        stops, found = (set(w.stop_ids or [t.eos_id]) for w, t in ((source, one), (written, other)))
        found -= {one.eos_id} - stops  # which a format may add
        if job.target != "gguf" or len(stops) <= len(STOPS):
            pairs["stop ids"] = sorted(stops), sorted(found)
        pairs["BOS before texts"] = source.bos, written.bos
    else:
        pairs["EOS id"] = one.eos_id, other.eos_id
    for name, (expected, read) in pairs.items():
        if expected != read:
            message = f"{name}: {job.output} has {read}, {job.input} {expected}"
            raise UserError(f"{message}; do not use it, and report it")


def _answer(job: Conversion, source: Weights) -> Answer:
    """Run the source on random tokens, and let it continue them."""
    kept = {path.suffix for path in job.input.glob("*")} if job.input.is_dir() else set()
    is_pickle = ".bin" in kept and ".safetensors" not in kept  # which transformers is not given
    if job.source == "hf" and not is_pickle and not missing("torch", "transformers"):
        name, logits = "transformers", transformers_logits(job.input)
    elif job.source == "meta" and not missing("torch"):
        name, logits = "Meta's forward pass in torch", meta_logits(job.input, source.config)
    else:
        name, logits = f"llama_jax on {job.source}", our_logits(source)
    length = _length(source.config)
    continued = min(CONTINUED, length // 2)
    random = np.random.default_rng(0)
    tokens_T = random.integers(0, source.config.vocab_size, length - continued)
    while len(tokens_T) < length:
        tokens_T = np.append(tokens_T, logits(tokens_T)[-1].argmax())
    return Answer(name, tokens_T, continued, logits(tokens_T))


def _length(config: ModelConfig) -> int:
    """Return how many tokens are compared; dynamic scaling beyond them would depend on padding."""
    is_dynamic = config.rope_scaling.kind == "dynamic"
    context = config.rope_scaling.original_context if is_dynamic else config.context_length
    return min(LENGTH, context)


def _compared(answer: Answer, logits: Logits, name: str, is_exact: bool) -> str:
    """Return the line about a program that ran what was written."""
    logits_TV, T = logits(answer.tokens_T), len(answer.tokens_T)
    if not np.isfinite(answer.logits_TV).all():
        return f"not verified: {answer.reference} computes logits that are NaN or infinite"
    difference = float(np.abs(logits_TV - answer.logits_TV).max())
    largest = float(np.abs(answer.logits_TV).max())
    chosen = logits_TV[-answer.continued - 1 : -1].argmax(-1)
    agree = int((chosen == answer.tokens_T[T - answer.continued :]).sum())
    found = (
        f"{name} on the output against {answer.reference}: max |Δlogit| {difference:.2g}"
        f" where logits reach {largest:.2g}, {agree} of {answer.continued} greedy tokens agree"
    )
    if is_exact and not difference <= TOLERANCE * max(largest, 1):
        raise UserError(f"{found}, although no number was rounded; do not use it, and report it")
    return f"verified: {found}"


# ---- programs that run a model ----


def missing(*libraries: str) -> list[str]:
    """Return those that are not installed."""
    return [name for name in libraries if importlib.util.find_spec(name) is None]


def our_logits(weights: Weights) -> Logits:
    """Return our model in float32 as a function of at most `LENGTH` tokens."""
    length = _length(weights.config)
    config = dataclasses.replace(weights.config, compute_dtype="float32")
    # Blocks as a list: its leaves have the names and shapes of `weights`, so that none is copied.
    shapes = jax.eval_shape(lambda: _unstacked(Llama(config, rngs=nnx.Rngs(0))))
    with jax.default_device(jax.devices("cpu")[0]):
        arrays = [
            jax.numpy.asarray(np.asarray(weights.tensors[name].read(), np.float32))
            for name in named_leaves(shapes)
        ]
        model = jax.tree.unflatten(jax.tree.structure(shapes), arrays)

    def logits(tokens_T: np.ndarray) -> np.ndarray:
        padded_BT = np.zeros((1, length), np.int32)
        padded_BT[0, : len(tokens_T)] = tokens_T  # one shape: one compilation
        with jax.default_matmul_precision("highest"):
            return np.asarray(_forward(model, padded_BT))[: len(tokens_T)]

    return logits


@jax.jit
def _forward(model: Llama, tokens_BT: jax.Array) -> jax.Array:
    """Return the logits [T, V] of the first sequence."""
    return model(tokens_BT)[0][0]


def _unstacked(model: Any) -> Any:
    layers = range(model.config.num_layers)
    blocks = [jax.tree.map(lambda array, i=i: array[i], model.blocks) for i in layers]
    model.blocks = nnx.List(blocks)
    return model


def transformers_logits(folder: Path) -> Logits:
    """Return a Hugging Face folder's model in transformers; `CannotRun` if it does not load."""
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
    """Return the model in Meta's folder as a forward pass in torch, written like Meta's code.

    It uses the tensors as they are in the files, with rotary pairs as complex numbers, so that a
    mistake in our layouts cannot be repeated here.
    """
    import torch

    from llama_jax.formats.meta import shards as meta_shards

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
    """Return the logits [T, V] of Meta's tensors."""
    import torch

    T, H = len(tokens_T), config.head_size
    turns = torch.from_numpy(frequencies(H, config.rope_theta, config.rope_scaling))
    angles = torch.outer(torch.arange(T, dtype=torch.float32), turns)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
    mask = torch.full((T, T), -math.inf).triu(1)

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * weights[name]

    def rotate(x: Any) -> Any:
        pairs = torch.view_as_complex(x.reshape(T, -1, H // 2, 2))
        return torch.view_as_real(pairs * rotation).reshape(T, -1, H)

    def attention(x: Any, prefix: str) -> Any:
        q, k, v = (x @ weights[f"{prefix}.w{name}.weight"].T for name in "qkv")
        repeats = config.num_heads // config.num_kv_heads
        k = rotate(k).repeat_interleave(repeats, dim=1)
        v = v.reshape(T, -1, H).repeat_interleave(repeats, dim=1)
        scores = torch.einsum("tnh,snh->nts", rotate(q), k) / math.sqrt(H) + mask
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
