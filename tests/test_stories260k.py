"""A model that others trained: llama2.c's stories260K must say here what it says there."""

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import parameters
from flax import nnx

from llama_jax.config import ModelConfig
from llama_jax.generation import generate
from llama_jax.model import Llama, unstack
from llama_jax.sampling import make_sampler
from llama_jax.tokenizer import Tokenizer

LILY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    " One day, she saw a big, red ball."
)


def halves(w_LDNH):
    """Heads whose rotated pairs lie next to each other, with the pairs half a head apart."""
    return np.concatenate([w_LDNH[..., ::2], w_LDNH[..., 1::2]], axis=-1)


@pytest.fixture(scope="module")
def model(shared_data):
    """The model in a file of llama2.c's first format: seven int32, then float32 by kind."""
    raw = (shared_data / "stories260K.bin").read_bytes()
    D, F, L, N, K, V, T = np.frombuffer(raw, np.int32, 7).tolist()
    rest, H = np.frombuffer(raw, np.float32, offset=28), D // N
    shapes = {"embedding": (V, D), "attention_norm": (L, D)}
    shapes |= {"wq": (L, N, H, D), "wk": (L, K, H, D), "wv": (L, K, H, D), "wo": (L, D, N, H)}
    shapes |= {"ffn_norm": (L, D), "gate": (L, F, D), "down": (L, D, F), "up": (L, F, D)}
    arrays = {}
    for name, shape in (shapes | {"norm": (D,)}).items():
        arrays[name], rest = rest[: np.prod(shape)].reshape(shape), rest[np.prod(shape) :]
    assert rest.size == T * H, "what is left are tables of cosines and sines"
    for name in ("wq", "wk", "wv"):
        arrays[name] = np.moveaxis(arrays[name], -1, 1)
    for name in ("wq", "wk"):
        arrays[name] = halves(arrays[name])
    for name in ("gate", "up", "down"):
        arrays[name] = arrays[name].swapaxes(1, 2)
    arrays["wo"] = np.moveaxis(arrays["wo"], 1, -1)
    sizes = {"vocab_size": V, "dim": D, "num_layers": L, "num_heads": N, "num_kv_heads": K}
    config = ModelConfig(**sizes, context_length=T, hidden_dim=F)
    model = Llama(config, rngs=nnx.Rngs(0))
    for name, param in parameters(model).items():
        param[...] = jnp.asarray(arrays[name])
    return model


def test_the_likeliest_first_tokens(model):
    logits_V = model(jnp.asarray([[1]]))[0][0, -1]
    best = np.argsort(-logits_V)[:5]
    assert best.tolist() == [403, 385, 410, 317, 407]
    expected = [17.0235, 15.4062, 13.1083, 12.7692, 12.4181]
    np.testing.assert_allclose(logits_V[best], expected, atol=1e-3)


def test_the_likeliest_story(model, shared_data):
    tokenizer = Tokenizer(shared_data / "tok512.model")
    chunks = generate(
        unstack(model),
        [[tokenizer.bos_id]],
        make_sampler(temperature=0),
        max_tokens=80,
        seeds=[0],
        stop_ids=[tokenizer.bos_id],
    )
    ids = [token for chunk in chunks for token in chunk.rows[0]]
    assert tokenizer.decode(ids).startswith(LILY)
