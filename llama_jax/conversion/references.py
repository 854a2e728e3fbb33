"""Other people's Llamas as functions from tokens to logits, to compare ours with.

The only file that imports torch and transformers, each where it is needed. Everything is float32.
"""

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llama_jax.checkpoints.layout import first_line
from llama_jax.config import ModelConfig
from llama_jax.formats import meta_shards
from llama_jax.positions import frequencies

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

    T, H = len(tokens_T), config.head_dim
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
