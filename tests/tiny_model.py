"""A tiny model with pairwise different sizes, and its parameters by name."""

import jax.numpy as jnp
import numpy as np

from llama_jax.config import ModelConfig
from llama_jax.model.parameters import abstract

TINY = {"vocab_size": 53, "dim": 24, "num_heads": 6, "num_kv_heads": 2, "hidden_dim": 40}
TINY |= {"num_layers": 3, "context_length": 32}


def parameters(model):
    """Return the parameters by their names in `reference`; those of blocks are stacked, [L, …]."""
    attention, ffn = model.blocks.attention, model.blocks.ffn
    linears = {name: getattr(attention, name) for name in ("wq", "wk", "wv", "wo")}
    linears |= {name: getattr(ffn, name) for name in ("gate", "up", "down")}
    named = {name: linear.kernel for name, linear in linears.items()}
    named |= {f"{name}_bias": x.bias for name, x in linears.items() if hasattr(x, "bias")}
    named |= {name: getattr(model.blocks, name).scale for name in ("attention_norm", "ffn_norm")}
    named |= {"embedding": model.embedding, "norm": model.norm.scale}
    named |= {"slopes": attention.slopes} if hasattr(attention, "slopes") else {}
    if hasattr(model, "position_embedding"):
        named["position_embedding"] = model.position_embedding
    return named if model.config.tied_embeddings else named | {"output": model.output}


def plain(model):
    """Return the parameters as NumPy arrays, as `reference` takes them."""
    found = {name: np.asarray(param[...]) for name, param in parameters(model).items()}
    if "slopes" in found:  # per context there, per position here
        found["slopes"] = found["slopes"] / model.config.context_length
    return found


def make_model(weights=None, **changes):
    """Return a model with these weights, or random ones so large that every part matters."""
    model = abstract(ModelConfig(**TINY | changes))
    random = np.random.default_rng(0)
    for name, param in parameters(model).items():
        noise = 0.15 * random.standard_normal(param.shape, np.float32)
        noise = 30 * noise if name == "slopes" else noise
        param.set_value(jnp.asarray(weights[name] if weights else noise + ("norm" in name)))
    return model
