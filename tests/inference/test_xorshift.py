"""The sampler of llama2.c: random numbers, choices by hand and by loops, and real runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_jax.formats.llama2c import model as llama2c
from llama_jax.formats.weights import BLOCKS, of_layer
from llama_jax.inference.xorshift import (
    XorshiftSampler,
    advance,
    choose_from_all,
    choose_from_nucleus,
    softmax,
    uniform,
)
from llama_jax.model.cache import KVCache
from llama_jax.model.parameters import abstract, named_leaves
from llama_jax.model.transformer import unstack
from llama_jax.text.tokenizer import load_tokenizer

# What `run` of llama2.c prints, compiled by gcc with -O3 or -Ofast, for (-t, -p, -s) and steps.
RUNS = {
    (1.0, 0.9, 133742, 256): (
        "Once upon a time, there was a little boy named Timmy. Timmy loved to play with his toys"
        " and eat sandwiches. One day, Timmy's mom told him it was time to rest for a while."
        " Timmy's friend Billy came over and took him a down.\nTimmy's mom saw that Timmy was sad,"
        ' but Timmy said, "I didn\'t understand what is it! We need to find some leafs." Timmy'
        " thought about it and took a deep breath on a spoon. He hoped it was important to be kind"
        " and continued to find its image next time.\nAfter they finished getting, Timmy's dad"
        " came up to his house and promised to help Timmy."
    ),
    (1.0, 1.0, 7, 60): (
        "Once upon a time, there was a little girl named Lily. She loved to play with her toys"
        " all day long. One sunny day, she went to the park to play with her friend, Timmy."
        " She went to the"
    ),
    (0.7, 0.5, 7, 60): (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the"
        " sunshine. One day, she found a big box of box on the ground. She was so"
    ),
}


@pytest.fixture(scope="module")
def model(shared_data):
    weights = llama2c.read(shared_data / "stories260K.bin")

    def read(name):
        if not name.startswith(BLOCKS):
            return jnp.asarray(weights.tensors[name].read())
        layers = [of_layer(name, layer) for layer in range(weights.config.num_layers)]
        return jnp.stack([weights.tensors[layer].read() for layer in layers])

    shapes = abstract(weights.config)
    arrays = [read(name) for name in named_leaves(shapes)]
    return unstack(jax.tree.unflatten(jax.tree.structure(shapes), arrays))


@pytest.mark.parametrize(("options", "text"), slow_but([*RUNS.items()][1:2], RUNS.items()))
def test_a_run_of_llama2c_is_reproduced(model, shared_data, options, text):
    tokenizer = load_tokenizer(shared_data / "tok512.model")
    *numbers, steps = options
    sampler = XorshiftSampler(*numbers)
    step = jax.jit(lambda model, token, cache: model(token, cache), donate_argnums=2)
    cache, ids = KVCache.empty(model.config, 1, 256), [tokenizer.bos_id]
    for _ in range(steps):
        logits_11V, cache = step(model, jnp.asarray([ids[-1:]], jnp.int32), cache)
        ids.append(sampler.choose(np.asarray(logits_11V)[0, 0]))
    assert tokenizer.bos_id not in ids[1:]
    assert tokenizer.decode(ids[1:]).strip() == text


def test_random_numbers():
    state, seen = 133742, []
    for _ in range(5):
        state = advance(state)
        seen.append(uniform(state))
    assert all(number.dtype == np.float32 for number in seen)
    expected = [0.706299007, 0.622677088, 0.538505733, 0.532580435, 0.327928662]
    np.testing.assert_array_equal(seen, np.asarray(expected, np.float32))
    assert state == 2560431681778104398

    state, seen = 2**64 - 1, []  # where an int of more than 64 bits would show
    for _ in range(5):
        state = advance(state)
        seen.append(int(uniform(state) * 2**24))
    outputs = [4180462053, 2415166680, 879531507, 3310800028, 1814914367]
    assert seen == [output >> 8 for output in outputs]
    assert state == 17803801406600052339


@pytest.mark.parametrize(
    ("top_p", "point", "expected"),
    {
        "the most likely": (0.6, 0.0, 1),
        "kept .5 and .3, so .8 × .62 is still in the first": (0.6, 0.62, 1),
        "and .8 × .63 in the second": (0.6, 0.63, 3),
        "and so is the largest point": (0.6, 0.9999999, 3),
        "a sum equal to top_p does not exceed it": (0.5, 0.9999999, 3),
        "a sum above it does": (0.4999, 0.9999999, 1),
        "of equals the lower id first": (0.9, 0.88, 0),
        "then the higher": (0.9, 0.95, 2),
        "below (1 - .9) / 4 = .025 nothing counts": (0.9, 0.9999999, 2),
    }.values(),
)
def test_the_nucleus_by_hand(top_p, point, expected):
    probabilities = np.asarray([0.095, 0.5, 0.095, 0.3, 0.01], np.float32)
    assert choose_from_nucleus(probabilities, np.float32(top_p), np.float32(point)) == expected


@pytest.mark.parametrize(
    ("probabilities", "point", "expected"),
    [([0.25, 0.25, 0], 0.9, 1), ([0.25, 0.125, 0.0625], 0.9, 0)],
)
def test_tokens_below_the_cutoff_are_excluded(probabilities, point, expected):
    # (1 - .5) / 2 = .25; that the sum does not exceed .5 can be, by rounding, in a real one too
    found = choose_from_nucleus(np.float32(probabilities), np.float32(0.5), np.float32(point))
    assert found == expected


def test_lower_ids_come_first_among_ties():
    probabilities = np.full(64, 1 / 64, np.float32)
    for token in range(32):
        point = np.float32((token + 0.5) / 33)  # through the 33rd, the first to exceed a half
        assert choose_from_nucleus(probabilities, np.float32(0.5), point) == token


def test_the_most_likely_token_is_chosen_where_c_keeps_none():
    probabilities = np.asarray([0.45, 0.55], np.float32)  # both below (1 - .05) / 1
    assert choose_from_nucleus(probabilities, np.float32(0.05), np.float32(0.9)) == 1
    assert choose_from_nucleus(np.ones(1, np.float32), np.float32(0.5), np.float32(0.9)) == 0


@pytest.mark.parametrize(("point", "expected"), [(0, 0), (0.249, 0), (0.25, 2), (0.7499, 2)])
def test_all_tokens_by_hand(point, expected):
    probabilities = np.asarray([0.25, 0, 0.5, 0.1875], np.float32)
    assert choose_from_all(probabilities, np.float32(point)) == expected


def test_a_point_beyond_the_rounded_sum_gives_the_last_token():
    assert choose_from_all(np.asarray([0.5, 0.25, 0.125], np.float32), np.float32(0.99)) == 2


def looped(probabilities, top_p, point):
    """The choice as loops over single float32 numbers."""
    zero = np.float32(0)
    ids = range(len(probabilities))
    if 0 < top_p < 1:
        cutoff = np.float32(np.float32(1) - top_p) / np.float32(len(probabilities) - 1)
        ids = sorted(
            (i for i in ids if probabilities[i] >= cutoff), key=lambda i: -probabilities[i]
        )
        kept, mass = [], zero
        for i in ids:
            kept.append(i)
            mass = np.float32(mass + probabilities[i])
            if mass > top_p:
                break
        ids, point = kept, np.float32(point * mass)
    reached = zero
    for i in ids:
        reached = np.float32(reached + probabilities[i])
        if point < reached:
            return i
    return ids[-1]


@given(
    seed=st.integers(0, 2**32 - 1),
    V=st.integers(7, 900),
    top_p=st.sampled_from([0, 0.3, 0.5, 0.9, 0.999, 1]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_choices_equal_those_of_loops(seed, V, top_p):
    random = np.random.default_rng(seed)
    logits = (random.choice([0.5, 2, 5]) * random.normal(size=V)).astype(np.float32)
    logits = np.round(logits) if seed % 2 else logits  # many ties
    sampler, state = XorshiftSampler(0.8, top_p, seed + 1), seed + 1
    probabilities = softmax(logits / np.float32(0.8))
    for _ in range(5):
        state = advance(state)
        assert sampler.choose(logits) == looped(probabilities, np.float32(top_p), uniform(state))


def test_softmax_adds_in_order():
    # After 1, each 2^-25 is lost when added alone; together they would count.
    logits = np.asarray([0, *[-25 * np.log(2)] * 64], np.float32)
    probabilities = softmax(logits)
    assert probabilities.dtype == np.float32 and probabilities[0] == 1


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-38])
def test_low_temperatures_are_greedy_and_draw_no_number(temperature):
    sampler = XorshiftSampler(temperature, 0.9, 5)
    assert sampler.choose(np.asarray([1, 30, 7], np.float32)) == 1
    assert sampler.state == 5
