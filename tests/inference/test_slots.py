"""Slots: what is decoded in them is what a plain cache gives, whoever is in the other slots."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from tiny_model import make_model

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh, shardings
from llama_jax.inference.decode import NO_TOKEN, ON_MESH, state_shardings
from llama_jax.inference.request import SamplingParams
from llama_jax.inference.sampler import Level, Sampler
from llama_jax.inference.slots import (
    CHUNK_SIZES,
    activate,
    chunk_size,
    copy_prefix,
    decode_slots,
    empty_slots,
    read_chunk,
)
from llama_jax.model.cache import KVCache
from llama_jax.model.slot_cache import BLOCK, CHUNK
from llama_jax.model.transformer import ONE_DEVICE, unstack

SLOTS, CONTEXT = 3, 400
TEXT = np.random.default_rng(3).integers(0, 40, CONTEXT).tolist()
# Lengths around the ends of the chunks in which a prompt is read and attention reads, and steps.
CASES = [(1, 5), (2, BLOCK), (CHUNK - 3, 4), (CHUNK + 1, BLOCK), (300, 1)]

# Equality to the bit is promised for what users run.
pytestmark = [pytest.mark.optimized, pytest.mark.as_used]


QUICK = {"xla_backend_optimization_level": 0}  # of the compiler
plain = jax.jit(lambda model, *rest: model(*rest), compiler_options=QUICK)


@cache
def model(**changes):
    made = make_model(**{"num_layers": 2, "context_length": CONTEXT} | changes)
    made.embedding[...] *= 0.1  # so that it does not just repeat its last token
    return unstack(made)


def enter(model, state, slot, prompt, *, start=0, max_tokens=40, seed=0, execution=ONE_DEVICE):
    last = len(prompt) - 1
    while start < last:
        size = chunk_size(last - start)
        ids_T = np.zeros(size, np.int32)
        ids_T[: len(prompt[start : min(start + size, last)])] = prompt[
            start : min(start + size, last)
        ]
        state, _ = read_chunk(model, state, np.int32(slot), np.int32(start), ids_T, execution)
        start += size
    counts_V = np.bincount(prompt, minlength=model.config.vocab_size).astype(np.int32)
    numbers = map(np.int32, (slot, prompt[-1], last, len(prompt) + max_tokens))
    return activate(state, *numbers, np.uint32(seed), counts_V)


def decode(
    model,
    state,
    active,
    steps,
    level=Level.GREEDY,
    params=None,
    stop_ids=(),
    execution=ONE_DEVICE,
):
    """The state after a block, and its tokens as the host sees them, with their logits' traces."""
    params = params or [SamplingParams(temperature=0)] * SLOTS
    stops_BS = np.full((SLOTS, 4), NO_TOKEN, np.int32)
    stops_BS[:, : len(stop_ids)] = stop_ids
    active_B = np.isin(np.arange(SLOTS), active)
    logprobs = 3 if level is Level.ALL else None
    sampler, count = Sampler.of(params, level), np.int32(steps)
    state, tokens, stopped_B = decode_slots(
        model, state, active_B, sampler, stops_BS, count, logprobs, execution
    )
    ids = [[i for i in row if i != NO_TOKEN] for row in np.asarray(tokens.token).tolist()]
    return state, ids, tokens, np.asarray(stopped_B)


def run(model, state, active, tokens, steps, **options):
    gained = [[] for _ in range(SLOTS)]
    for _ in range(0, tokens, steps):
        state, ids, *_ = decode(model, state, active, steps, **options)
        gained = [old + new for old, new in zip(gained, ids)]
    return state, gained


def expected(model, prompt, count):
    """What a plain cache of one sequence gives, greedily."""
    slots = KVCache.empty(model.config, 1, CONTEXT)
    logits, kept = plain(model, jnp.asarray([prompt]), slots)
    ids = [int(logits[0, -1].argmax())]
    while len(ids) < count:
        logits, kept = plain(model, jnp.asarray([ids[-1:]]), kept)
        ids.append(int(logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize(("length", "steps"), slow_but(CASES[3:4], CASES))
def test_a_slot_decodes_what_a_plain_cache_does(length, steps):
    state = empty_slots(model().config, SLOTS, CONTEXT)
    state = enter(model(), state, 1, TEXT[:length])
    _, gained = run(model(), state, [1], 40, steps)
    assert gained == [[], expected(model(), TEXT[:length], 40), []]


@pytest.mark.slow
def test_on_a_mesh_slots_decode_what_one_device_does():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    placed = jax.device_put(model(), shardings(model(), mesh))
    with jax.set_mesh(mesh):
        state = empty_slots(model().config, SLOTS, CONTEXT)
        state = jax.device_put(state, state_shardings(state, mesh))
        state = enter(placed, state, 1, TEXT[: CHUNK + 1], execution=ON_MESH)
        _, gained = run(placed, state, [1], 24, 8, execution=ON_MESH)
    assert gained == [[], expected(model(), TEXT[: CHUNK + 1], 24), []]


@pytest.mark.slow
def test_a_sliding_window_hides_what_it_hides_from_a_plain_cache():
    windowed = model(sliding_window=7)
    for length in (3, CHUNK + 2):
        state = enter(windowed, empty_slots(windowed.config, SLOTS, CONTEXT), 0, TEXT[:length])
        _, gained = run(windowed, state, [0], 30, 10)
        assert gained[0] == expected(windowed, TEXT[:length], 30)
        assert gained[0] != expected(model(), TEXT[:length], 30)


@pytest.mark.slow
def test_an_int8_cache_holds_a_fourth_and_gives_nearly_the_same():
    states = [empty_slots(model().config, SLOTS, CONTEXT, dtype) for dtype in ("", "int8")]
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state.cache.layers)) for state in states]
    H = model().config.head_size
    assert sizes[1] == sizes[0] * (H + 4) // (4 * H)  # a float32 scale for each H numbers
    tokens = []
    for state in states:
        state = enter(model(), state, 2, TEXT[:200])
        *_, found, _ = decode(model(), state, [2], 1, Level.ALL)
        tokens.append(np.asarray(found.logprobs.top)[2, 0])
    np.testing.assert_allclose(*tokens, atol=0.05)


def test_neighbours_change_not_a_bit():
    """Log-probabilities alone and beside longer, shorter, ending and inactive sequences."""
    params = [SamplingParams(temperature=0, logprobs=3)] * SLOTS

    def logprobs(neighbours):
        state = empty_slots(model().config, SLOTS, CONTEXT)
        for slot, prompt, max_tokens in neighbours:
            state = enter(model(), state, slot, prompt, max_tokens=max_tokens)
        state = enter(model(), state, 1, TEXT[7:30])
        active = [1, *(slot for slot, *_ in neighbours)]
        found = []
        for _ in range(4):
            state, _, tokens, _ = decode(model(), state, active, 5, Level.ALL, params)
            found.append(jax.tree.map(lambda x: np.asarray(x)[1, :5], tokens))
        return found

    alone = logprobs([])
    crowd = logprobs([(0, TEXT[:350], 40), (2, TEXT[90:95], 3)])
    jax.tree.map(np.testing.assert_array_equal, alone, crowd)


def test_a_slot_that_is_not_active_keeps_what_it_has():
    state = empty_slots(model().config, SLOTS, CONTEXT)
    state = enter(model(), state, 0, TEXT[:150])
    state = enter(model(), state, 2, TEXT[200:220])
    before = [np.asarray(x[:, 0, :149]) for x in jax.tree.leaves(state.cache.layers[1].stored)]
    state, _ = run(model(), state, [2], 40, BLOCK)
    after = [np.asarray(x[:, 0, :149]) for x in jax.tree.leaves(state.cache.layers[1].stored)]
    jax.tree.map(np.testing.assert_array_equal, before, after)
    state = enter(model(), state, 0, TEXT[:150], start=149)  # all of it is there already
    _, gained = run(model(), state, [0], 20, 4)
    assert gained[0] == expected(model(), TEXT[:150], 20)


def test_a_slot_is_used_again_without_a_trace():
    state = empty_slots(model().config, SLOTS, CONTEXT)
    state = enter(model(), state, 0, TEXT[:300])
    state, _ = run(model(), state, [0], 32, BLOCK)
    state = enter(model(), state, 0, TEXT[310:330])
    _, gained = run(model(), state, [0], 20, BLOCK)
    fresh = enter(model(), empty_slots(model().config, SLOTS, CONTEXT), 0, TEXT[310:330])
    assert gained == run(model(), fresh, [0], 20, BLOCK)[1]


@pytest.mark.parametrize("length", slow_but([CHUNK], [1, 20, CHUNK, CHUNK + 60]))
def test_a_copied_prefix_is_as_good_as_a_read_one(length):
    state = empty_slots(model().config, SLOTS, CONTEXT)
    state = enter(model(), state, 2, TEXT[:250])
    state = copy_prefix(state, np.int32(2), np.int32(0), np.int32(length))
    prompt = [*TEXT[:length], 3, 1, 4]
    state = enter(model(), state, 0, prompt, start=length)
    state, gained = run(model(), state, [0, 2], 20, 5)
    assert gained[0] == expected(model(), prompt, 20)
    assert gained[2] == expected(model(), TEXT[:250], 20)


def test_a_sequence_ends_at_its_limit_or_a_stop_token():
    state = empty_slots(model().config, SLOTS, CONTEXT)
    whole = expected(model(), TEXT[:10], 20)
    stop = next(token for token in whole[5:] if token not in whole[:5])
    for slot, most in ((0, 3), (1, 20)):
        state = enter(model(), state, slot, TEXT[:10], max_tokens=most)
    state, ids, _, stopped_B = decode(model(), state, [0, 1], BLOCK, stop_ids=[stop])
    assert ids == [whole[:3], whole[: whole.index(stop)], []]
    assert stopped_B.tolist() == [False, True, True]  # the last one is not active
    _, ids, *_ = decode(model(), state, [0, 1], BLOCK, stop_ids=[stop])
    assert ids == [[], [], []]


@pytest.mark.slow
def test_a_level_has_more_steps_and_the_same_tokens():
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0.9, top_p=0.8, seed=4),
        SamplingParams(temperature=1.3, top_k=7, min_p=0.01, seed=9),
    ]
    assert [Level.of(each) for each in params] == [Level.GREEDY, Level.DRAW, Level.DRAW]
    assert Level.of(dataclasses.replace(params[0], logprobs=0)) is Level.ALL
    assert Level.of(dataclasses.replace(params[1], presence_penalty=1)) is Level.ALL

    def tokens(level):
        state = empty_slots(model().config, SLOTS, CONTEXT)
        for slot, each in enumerate(params):
            state = enter(model(), state, slot, TEXT[slot : slot + 9], seed=each.seed)
        return run(model(), state, [0, 1, 2], 24, 8, level=level, params=params)[1]

    assert tokens(Level.DRAW) == tokens(Level.ALL)
    assert tokens(Level.DRAW)[0] == expected(model(), TEXT[:9], 24)


@pytest.mark.parametrize("level", Level)
def test_a_step_writes_the_cache_at_one_place_for_all(level):
    """No scatter into the cache, which TPUs run one sequence after the other."""
    state = empty_slots(model().config, SLOTS, CONTEXT)
    params = [SamplingParams(temperature=0)] * SLOTS
    arguments = (np.zeros(SLOTS, bool), Sampler.of(params, level), np.zeros((SLOTS, 4), np.int32))
    jaxpr = jax.make_jaxpr(decode_slots, static_argnums=(6, 7))(
        model(), state, *arguments, np.int32(4)
    )
    ranks = {
        len(eqn.invars[0].aval.shape)
        for eqn in equations(jaxpr.jaxpr)
        if "scatter" in str(eqn.primitive)
    }
    assert max(ranks, default=0) <= 2  # token counts and biases; the cache has more dims
    writes = [eqn for eqn in equations(jaxpr.jaxpr) if str(eqn.primitive) == "dynamic_update_slice"]
    assert len(writes) >= 4 * 2  # keys and values of two layers, in a step and after the block


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_chunks_are_padded_by_at_most_half():
    for tokens in range(1, 1000):
        size = chunk_size(tokens)
        assert size in CHUNK_SIZES
        assert size <= 2 * tokens or size == min(CHUNK_SIZES)
