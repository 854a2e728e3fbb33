"""Every `model.position` against the oracle by every way a model runs, and the laws of each."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import slow_but
from tiny_model import TINY, make_model, parameters, plain

from llama_jax.config import POSITIONS, LoraConfig, ModelConfig, RopeScaling
from llama_jax.errors import UsageError
from llama_jax.kernels import blockwise
from llama_jax.kernels.attention import xla_attention
from llama_jax.kernels.blockwise import blockwise_attention
from llama_jax.model.cache import KVCache
from llama_jax.model.execution import Execution
from llama_jax.model.lora import attach, init_adapters, merge
from llama_jax.model.parameters import count_parameters, flops_per_token, matrices, named_leaves
from llama_jax.model.positions import Positions, alibi_slopes, sinusoids
from llama_jax.model.slot_cache import OneSlot, SlotCache
from llama_jax.model.transformer import unstack
from llama_jax.quantization import quantize
from llama_jax.training.optimizer import is_matrix

B, T, V = 2, 11, 53
TOKENS_BT = np.random.default_rng(1).integers(0, V, (B, T))
OTHERS = [kind for kind in POSITIONS if kind != "rope"]
WAVES = 0.3  # so large an `init_std` that sinusoids matter beside these embeddings
BY_BLOCKS = Execution(attention=blockwise_attention)


def model_of(position, **changes):
    return make_model(position=position, init_std=WAVES, **changes)


def oracle(model, tokens_T, window=0):
    return reference.forward(
        plain(model), tokens_T, window=window, position=model.config.position, wave_scale=WAVES
    )


@jax.jit
def logits_of(model, tokens_BT):
    return model(tokens_BT)[0]


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (8, [2.0**-i for i in range(1, 9)]),  # section 3 of the paper
        (16, [2.0 ** (-i / 2) for i in range(1, 17)]),
        (12, [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (1, [2.0**-8]),
    ],
)
def test_slopes_are_those_of_press_et_al(heads, slopes):
    np.testing.assert_allclose(alibi_slopes(heads), slopes, rtol=1e-6)


def test_sinusoids_have_the_wavelengths_of_vaswani_et_al():
    positions_BT = np.array([[0, 1, 30], [2, 500, 7]])
    waves_BTD = np.asarray(sinusoids(jnp.asarray(positions_BT), 7))
    for index in np.ndindex(positions_BT.shape):
        expected = reference.sinusoid(positions_BT[index], 7)
        np.testing.assert_allclose(waves_BTD[index], expected, atol=1e-4)


@pytest.mark.parametrize("position", slow_but(["relative"], OTHERS))
def test_logits_agree_with_the_oracle_by_every_way(position, monkeypatch):
    """Whole, by blocks, in a cache and in slots; with a window too where it meets slopes."""
    monkeypatch.setattr(blockwise, "SMALLEST_BLOCK", 4)
    window = 5 if position == "alibi" else 0
    model = model_of(position, sliding_window=window, num_layers=2)
    expected = np.stack([oracle(model, row, window) for row in TOKENS_BT])
    for execution in (Execution(), BY_BLOCKS):
        logits_BTV = jax.jit(lambda m, e=execution: m(TOKENS_BT, execution=e)[0])(model)
        close(logits_BTV, expected)
    listed = unstack(model)
    run = jax.jit(lambda m, tokens, cache: m(tokens, cache))
    cache, parts = KVCache.empty(model.config, B, 16), []
    for part_BT in (TOKENS_BT[:, :7], TOKENS_BT[:, 7:8], TOKENS_BT[:, 8:9]):
        logits_BTV, cache = run(listed, part_BT, cache)
        parts.append(logits_BTV)
    close(np.concatenate(parts, axis=1), expected[:, :9])
    close(in_slots(listed, TOKENS_BT[1], prompt=(4, 4)), expected[1])


def in_slots(model, tokens_T, prompt):
    """Logits [T, V] from the second of two slots: a prompt in chunks, then steps, with a flush."""
    slots, start, logits = SlotCache.empty(model.config, 2, 32), 0, []
    read = jax.jit(lambda m, tokens, cache: m(tokens, cache))
    for size in prompt:
        view = OneSlot(slots.layers, jnp.int32(1), jnp.array([start]))
        logits_1TV, view = read(model, tokens_T[None, start : start + size], view)
        slots, start = dataclasses.replace(slots, layers=view.layers), start + size
        logits.append(logits_1TV[0])
    length_B = jnp.array([0, start], jnp.int32)
    slots = dataclasses.replace(slots, length_B=length_B, stored_B=length_B)
    for step, token in enumerate(tokens_T[start:]):
        logits_B1V, slots = read(model, np.array([[3], [token]]), slots)
        logits.append(logits_B1V[1])
        slots = slots.flush(jnp.array([False, True])) if step == 1 else slots
    return np.concatenate(logits)


@pytest.mark.parametrize("position", slow_but(["absolute", "alibi"], OTHERS))
def test_packed_documents_are_what_they_are_alone(position):
    model = model_of(position, num_layers=1)
    segments_BT = jnp.asarray([[1] * 4 + [2] * 7, [1] * 8 + [2] * 3], jnp.int32)
    for execution in (Execution(), BY_BLOCKS):

        def logits(model, execution=execution):
            hidden_BTD, _ = model.hidden(TOKENS_BT, segments_BT=segments_BT, execution=execution)
            return model.logits(hidden_BTD)

        logits_BTV = jax.jit(logits)(model)
        for b, split in enumerate((4, 8)):
            for part in (slice(0, split), slice(split, T)):
                close(logits_BTV[b, part], oracle(model, TOKENS_BT[b, part]))


@pytest.mark.parametrize("packed", slow_but([True], [True, False]))
def test_gradients_by_blocks_are_those_of_all_scores_at_once(packed, monkeypatch):
    """Of queries, keys, values and slopes, over several blocks and in groups of heads."""
    monkeypatch.setattr(blockwise, "SMALLEST_BLOCK", 4)
    random = np.random.default_rng(0)
    q, k, v, out = (jnp.asarray(random.standard_normal((B, T, n, 4)), "f4") for n in (6, 2, 2, 6))
    slopes_N = jnp.asarray(random.standard_normal(6), "f4")
    segments_BT = jnp.asarray([[1] * 4 + [2] * 7, [1] * 11], jnp.int32) if packed else None

    def gradients(kernel):
        def total(q, k, v, slopes_N):
            return (kernel(q, k, v, segments_BT, window=6, slopes_N=slopes_N) * out).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(q, k, v, slopes_N)

    expected = gradients(xla_attention)
    assert all(np.abs(array).max() > 0.1 for array in expected)
    jax.tree.map(close, gradients(blockwise_attention), expected)


@pytest.mark.slow
def test_slopes_and_tables_are_learned_by_every_kernel():
    for position, name in (("relative", "slopes"), ("absolute", "position_embedding")):
        model = model_of(position, num_layers=2)

        def total(model, execution):
            return model(TOKENS_BT, execution=execution)[0].max(axis=-1).sum()

        grads = [
            parameters(jax.jit(jax.grad(lambda m, e=execution: total(m, e)))(model))[name][...]
            for execution in (Execution(), dataclasses.replace(BY_BLOCKS, remat="block"))
        ]
        used = grads[0][:T] if position == "absolute" else grads[0]
        assert np.abs(used).min() > 0
        np.testing.assert_allclose(*grads, rtol=1e-3, atol=1e-4)


def test_without_positions_the_order_of_earlier_tokens_does_not_matter():
    """In one layer, where earlier tokens have not seen each other's order."""
    moved_T = np.array([4, 0, 8, 2, 6, 1, 9, 5, 3, 7, 10])
    rows_BT = np.stack([TOKENS_BT[0], TOKENS_BT[0, moved_T]])
    for position in POSITIONS:
        logits_BTV, _ = jax.jit(lambda m: m(rows_BT))(model_of(position, num_layers=1))
        difference = np.abs(logits_BTV[0, -1] - logits_BTV[1, -1]).max()
        assert difference < 1e-5 if position == "none" else difference > 1e-3, position


@pytest.mark.parametrize("position", ["sinusoidal", "alibi", "relative", "none"])
def test_positions_without_a_table_go_on_beyond_the_context(position):
    model = model_of(position, context_length=5)
    close(logits_of(model, TOKENS_BT[:1])[0], oracle(model, TOKENS_BT[0]))
    model.config = dataclasses.replace(model.config, context_length=9)  # what was learned stays
    close(logits_of(model, TOKENS_BT[:1])[0], oracle(make_model_again(model, 5), TOKENS_BT[0]))


def make_model_again(model, context_length):
    again = jax.tree.map(lambda leaf: leaf, model)
    again.config = dataclasses.replace(model.config, context_length=context_length)
    return again


def test_a_table_ends_where_its_positions_end():
    model = model_of("absolute", context_length=T - 1, num_layers=1)
    with pytest.raises(UsageError, match=r"sequence has 11 tokens.* 10 positions; shorten"):
        model(TOKENS_BT)
    cache = KVCache.empty(model.config, B, 32)  # padding may lie beyond it
    padded_BT = np.pad(TOKENS_BT, ((0, 0), (0, 9)))
    logits_BTV, _ = jax.jit(lambda m, cache: m(padded_BT, cache))(unstack(model), cache)
    close(logits_BTV[0, : T - 1], oracle(model, TOKENS_BT[0, : T - 1]))


def test_rope_has_the_same_parameters_as_before_and_others_share_them():
    rope = named_leaves(make_fresh("rope"))
    for position in OTHERS:
        other = named_leaves(make_fresh(position))
        extra = {"relative": {"blocks.attention.slopes"}, "absolute": {"position_embedding"}}
        assert other.keys() - rope.keys() == extra.get(position, set())
        for name, leaf in rope.items():
            np.testing.assert_array_equal(leaf, other[name])
    assert make_fresh("relative").blocks.attention.slopes[...].tolist() == [[1.0] * 6] * 3


def make_fresh(position):
    from flax import nnx

    from llama_jax.model.transformer import Llama

    return Llama(ModelConfig(**TINY, position=position), rngs=nnx.Rngs(3))


def test_tables_and_slopes_are_counted_and_are_no_matrices():
    usual = ModelConfig(**TINY)
    absolute, relative = (dataclasses.replace(usual, position=p) for p in ("absolute", "relative"))
    assert count_parameters(absolute) == count_parameters(usual) + 32 * 24
    assert count_parameters(relative) == count_parameters(usual) + 3 * 6
    assert matrices(absolute) == matrices(relative) == matrices(usual)
    assert flops_per_token(absolute, 8) == flops_per_token(usual, 8)
    decays = named_leaves(is_matrix(make_fresh("absolute")))
    assert decays["position_embedding"]  # as the embedding that it is added to
    assert not named_leaves(is_matrix(make_fresh("relative")))["blocks.attention.slopes"]


@pytest.mark.parametrize("position", slow_but(["relative"], ["absolute", "relative"]))
def test_quantized_models_keep_their_positions(position):
    model = model_of(position)
    small = quantize(model, "int8")
    logits, expected = (jax.jit(lambda m: m(TOKENS_BT)[0])(m) for m in (small, model))
    assert np.linalg.norm(logits - expected) < 0.1 * np.linalg.norm(expected)
    kept = small.position_embedding if position == "absolute" else small.blocks[2].attention.slopes
    own = plain(model)[{"absolute": "position_embedding", "relative": "slopes"}[position]]
    np.testing.assert_allclose(kept, own if position == "absolute" else own[2] * 32, rtol=1e-6)


@pytest.mark.slow
def test_adapters_are_beside_positions_that_they_do_not_change():
    model, lora = model_of("absolute"), LoraConfig(rank=2, targets="linear,embedding")
    adapters = init_adapters(model.config, lora, jax.random.key(0))
    for adapted in (attach(model, adapters, lora), merge(model, adapters, lora)):
        close(adapted(TOKENS_BT)[0], model(TOKENS_BT)[0])


def test_odd_heads_are_for_positions_that_rotate_nothing():
    odd = TINY | {"head_dim": 3}
    with pytest.raises(UsageError, match=r"head_dim=3 is odd"):
        ModelConfig(**odd)
    model = make_model(head_dim=3, position="alibi")
    close(logits_of(model, TOKENS_BT[:1])[0], oracle(model, TOKENS_BT[0]))


def test_hooks_of_rope_add_nothing():
    config = ModelConfig(**TINY)
    positions = Positions.of(config, jnp.arange(3)[None])
    x_BTD = jnp.ones((1, 3, 24))
    assert positions.embed(x_BTD, None) is x_BTD and positions.bias(None) is None


def test_rope_scaling_needs_rope_and_unknown_positions_are_named():
    with pytest.raises(
        UsageError, match=r"scales rotary embeddings, which a model with model.position='alibi'"
    ):
        ModelConfig(**TINY, position="alibi", rope_scaling=RopeScaling(kind="linear", factor=2.0))
    with pytest.raises(
        UsageError, match=r"model.position='nope' is unknown; expected one of 'rope'"
    ):
        ModelConfig(**TINY, position="nope")
