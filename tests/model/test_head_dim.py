"""Models whose heads are wider or narrower than dim / num_heads, and the formats that hold them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny_model import make_model, plain
from tiny_weights import same, tiny_weights

from llama_jax.errors import UserError
from llama_jax.formats.gguf import model as gguf
from llama_jax.formats.huggingface import model as huggingface
from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.meta import model as meta
from llama_jax.model.cache import KVCache
from llama_jax.model.transformer import unstack

TOKENS_BT = np.random.default_rng(0).integers(0, 53, (2, 7))


def test_logits_agree_with_the_reference_with_and_without_a_cache():
    head_dim = 10
    model = make_model(head_dim=head_dim)
    assert model.blocks.attention.wo.kernel.shape == (3, 6, head_dim, 24)
    expected = np.stack([reference.forward(plain(model), row) for row in TOKENS_BT])
    logits, _ = jax.jit(lambda model: model(TOKENS_BT))(model)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    decoder, cache = jax.jit(unstack(model)), KVCache.empty(model.config, 2, 32)
    for part in np.split(TOKENS_BT, [4], axis=1):
        last, cache = decoder(jnp.asarray(part), cache)
    np.testing.assert_allclose(last, expected[:, 4:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("format_", "name"), [(gguf, "x.gguf"), (huggingface, "x")])
def test_formats_with_a_place_for_it_keep_it(format_, name, tmp_path):
    weights = tiny_weights(head_dim=10)
    format_.write(weights, tmp_path / name)
    read = format_.read(tmp_path / name)
    assert read.config.head_dim == 10
    same(read, weights)


@pytest.mark.parametrize(("format_", "name"), [(gguf, "x.gguf"), (huggingface, "x")])
def test_heads_as_wide_as_usual_are_read_as_the_default(format_, name, tmp_path):
    weights = tiny_weights()
    explicit = dataclasses.replace(weights.config, head_dim=4)
    format_.write(dataclasses.replace(weights, config=explicit), tmp_path / name)
    assert format_.read(tmp_path / name).config.head_dim == 0


def test_formats_without_a_place_for_it_refuse_it(tmp_path):
    weights = tiny_weights(head_dim=10)
    with pytest.raises(UserError, match=r"head_dim=10 .* no place in Meta's params\.json"):
        meta.write(weights, tmp_path / "meta")
    with pytest.raises(UserError, match=r"llama2\.c has no place for head_dim=10"):
        llama2c.write(weights, tmp_path / "model.bin", 1)
    assert not list(tmp_path.iterdir())
