"""The engine against full recomputation: batches, limits, prompt caches, speculation."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow_but
from tiny_model import TINY, make_model

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh, shardings
from llama_jax.errors import UsageError, UserError
from llama_jax.inference.decode import (
    NO_TOKEN,
    GenerationState,
    cache_config,
    decode,
    empty_cache,
    prefill,
    prefill_chunks,
    read_chunk,
)
from llama_jax.inference.engine import Engine
from llama_jax.inference.request import Request, SamplingParams
from llama_jax.inference.sampler import Sampler
from llama_jax.inference.speculation import NUM_GUESSES, decode_speculating, guess_tokens
from llama_jax.model.cache import KVCache
from llama_jax.model.transformer import Llama, unstack

CONTEXT = TINY["context_length"]
GREEDY = {"temperature": 0}
SAMPLED = {"temperature": 1.0, "top_k": 20, "top_p": 0.9}
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(20))]

forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


@cache
def stacked(**changes):
    """A model that does not just repeat its last token, since its embedding is small."""
    model = make_model(**{"num_layers": 1} | changes)
    model.embedding[...] *= 0.1
    return model


def request_for(prompts, settings=GREEDY, *, seeds=None, stop_ids=(), max_tokens=8, **others):
    seeds = seeds or [0] * len(prompts)
    common = dict(settings) | others | {"max_tokens": max_tokens}
    params = [SamplingParams(**common, seed=seed) for seed in seeds]
    return Request(prompts=prompts, params=params, stop_ids=stop_ids)


def run(request, *, model=None, engine=None):
    """The ids of each sequence, its log-probabilities, and why it ended."""
    engine = engine or Engine(model or unstack(stacked()))
    ids, logprobs, ends = ([[] for _ in request.prompts] for _ in range(3))
    for delta in engine.generate(request):
        assert not ends[delta.index], "a delta after the last one"
        ids[delta.index] += delta.ids
        logprobs[delta.index] += delta.logprobs
        ends[delta.index] += [delta.finish_reason] if delta.finish_reason else []
    return ids, logprobs, [end for [end] in ends]


def ids_of(prompts, *arguments, model=None, **options):
    return run(request_for(prompts, *arguments, **options), model=model)[0]


def ids_of_one(engine, prompt, settings=GREEDY, **options):
    [ids], *_ = run(request_for([prompt], settings, **options), engine=engine)
    return ids


def recomputed(model, prompt, count):
    """The greedy continuation by reading everything again for each token."""
    tokens = np.zeros((1, model.config.context_length), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = forward(model, tokens)[0, at - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.as_used
def test_cached_equals_recomputed():
    model = stacked(num_layers=3, context_length=48)
    prompt = [3, 1, 4, 1, 5]
    [new] = ids_of([prompt], model=unstack(model), max_tokens=40)
    assert len(set(new)) > 5, "a repeated token would prove little"
    assert new == recomputed(model, prompt, 40)


# Each step is used by some sequence and off for others.
DIFFERENT = [
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.8, "seed": 3},
    {"temperature": 1.3, "top_k": 9, "top_p": 1.0, "seed": 4},
    {"min_p": 0.02, "logit_bias": {7: 2.0, 9: -np.inf}, "seed": 5},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.2, "seed": 6},
    {"temperature": 0, "presence_penalty": 0.6, "logit_bias": {3: 0.4}},
]


def request_of(settings, prompts):
    params = [SamplingParams(**each, max_tokens=12 + row) for row, each in enumerate(settings)]
    return Request(prompts=prompts, params=params)


@pytest.mark.as_used
@pytest.mark.parametrize(
    "compared", [(0, 3, 4), pytest.param((1, 2, 5), marks=pytest.mark.slow)], ids=str
)
def test_a_sequence_is_the_same_alone_and_in_a_batch_of_different_ones(compared):
    prompts = [[*range(row, 2 * row + 1), 8] for row in range(len(DIFFERENT))]
    together, _, ends = run(request_of(DIFFERENT, prompts))
    assert len(set(map(tuple, together))) == len(DIFFERENT) and set(ends) == {"length"}
    for row in compared:
        params = [SamplingParams(**DIFFERENT[row], max_tokens=12 + row)]
        alone = run(Request(prompts=[prompts[row]], params=params))[0]
        assert alone == [together[row]], DIFFERENT[row]
    programs = decode._cache_size()
    other = [each | {"temperature": each.get("temperature", 1) * 1.1} for each in DIFFERENT[::-1]]
    run(request_of(other, prompts))
    assert decode._cache_size() == programs, "other values compile nothing"


@pytest.mark.parametrize(
    ("settings", "longest"), [(GREEDY, 20), (SAMPLED, 16)], ids=["greedy", "sampled"]
)
def test_the_order_of_sequences_does_not_matter(settings, longest):
    prompts, seeds = [prompt[:longest] for prompt in PROMPTS], [7, 8, 7]
    together = ids_of(prompts, settings, seeds=seeds)
    assert len(set(map(tuple, together))) == len(prompts)
    assert ids_of(prompts[::-1], settings, seeds=seeds[::-1]) == together[::-1]


def test_sequences_end_independently_and_without_the_stop_token():
    free = ids_of(PROMPTS, max_tokens=11)
    stop = next(token for token in free[0][1:] if token not in free[1] + free[2])
    at = free[0].index(stop)
    ids, _, ends = run(request_for(PROMPTS, max_tokens=11, stop_ids=[stop]))
    assert ids == [free[0][:at], *free[1:]]
    assert ends == ["stop", "length", "length"]
    ids, _, ends = run(request_for(PROMPTS[:1], max_tokens=11, stop_ids=[free[0][0]]))
    assert (ids, ends) == ([[]], ["stop"])


@pytest.mark.parametrize("max_tokens", [1, 2, 11, 12])
def test_max_tokens_is_exact(max_tokens):
    ids, _, ends = run(request_for(PROMPTS, max_tokens=max_tokens))
    assert [len(row) for row in ids] == [max_tokens] * 3
    assert ends == ["length"] * 3


@pytest.mark.parametrize("max_tokens", [CONTEXT, pytest.param(2**40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [1, 14, 15, 16, 17, CONTEXT - 1])
def test_a_sequence_ends_where_the_context_is_full(length, max_tokens):
    prompt = [(7 * i) % 53 for i in range(length)]
    [ids], _, ends = run(request_for([prompt], max_tokens=max_tokens))
    assert (len(ids), ends) == (CONTEXT - length, ["length"])
    assert ids == recomputed(stacked(), prompt, CONTEXT - length)


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 5])
def test_a_prompt_that_does_not_fit_is_refused_at_once(length):
    with pytest.raises(UserError, match=rf"has {length} tokens; expected 1 to {CONTEXT - 1}.*32"):
        Engine(unstack(stacked())).generate(request_for([[1, 2], [1] * length]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_bias": {53: 1.0}}, "logit_bias has the token id 53; expected 0 to 52"),
        ({"logprobs": 54}, "logprobs=54 is out of range; expected 0 to 53"),
    ],
)
def test_what_exceeds_the_vocabulary_is_refused_at_once(settings, message):
    with pytest.raises(UsageError, match=message):
        Engine(unstack(stacked())).generate(request_for([[5, 6]], settings))


def test_the_seed_determines_the_text():
    prompts = [PROMPTS[1]] * 3
    seven, again, eight = ids_of(prompts, SAMPLED, seeds=[7, 7, 8])
    assert seven == again != eight


@pytest.mark.parametrize("speculate", [False, True])
def test_nothing_is_compiled_after_the_first_token(speculate):
    program = decode_speculating if speculate else decode
    model = unstack(make_model(num_layers=1, hidden_dim=44 + 4 * speculate))  # a shape of its own
    request = request_for([[1, 5, 9]], speculate=speculate, max_tokens=40)
    before = program._cache_size()
    deltas = Engine(model).generate(request)
    next(deltas)
    assert program._cache_size() == before + 1
    list(deltas)
    assert program._cache_size() == before + 1


def test_other_values_and_similar_lengths_do_not_compile_again():
    ids_of(PROMPTS[:1], SAMPLED, stop_ids=[9])
    before = read_chunk._cache_size(), decode._cache_size()
    for length in (1, 2, 15, 16):
        settings = {"temperature": 0.1 * length, "top_k": length, "top_p": 0.05 * length}
        options = {"max_tokens": length, "seeds": [length], "stop_ids": [length]}
        ids_of([[5] * length], settings, **options)
    assert (read_chunk._cache_size(), decode._cache_size()) == before


def state_after(model, prompts, slots, tokens, limits):
    """The state of a batch after prefill and a first token each."""
    batch = len(prompts)
    cache, _ = prefill(model, KVCache.empty(model.config, batch, slots), prompts)
    keys_B = jax.vmap(jax.random.key)(np.zeros(batch, np.uint32))
    ends = jnp.zeros(batch, bool), jnp.asarray(limits, jnp.int32)
    return GenerationState(cache, jnp.asarray(tokens, jnp.int32), *ends, keys_B, None)


@pytest.mark.as_used
def test_the_loop_copies_no_cache():
    """Each copy would cost as much as reading the cache; four a layer once did."""
    model = unstack(stacked(num_kv_heads=2))
    state = state_after(model, [[1, 2, 3, 4]], 48, [4], [12])
    greedy = Sampler.of([SamplingParams(temperature=0)])
    program = decode.lower(model, state, greedy, jnp.asarray([4])).compile().as_text()
    sizes = {",".join(map(str, array.shape)) for array in jax.tree.leaves(state.cache.layers)}
    assert all(f"f32[{size}]" in program for size in sizes)
    copied = [line for line in program.splitlines() if " copy(" in line]
    assert not [line for line in copied if any(f"f32[{size}]" in line for size in sizes)]


def test_the_loop_ends_with_its_last_sequence():
    """One step more would write the last tokens, which nobody needs, into the next slots."""
    model, prompts = unstack(stacked()), [[1] * 16, [1] * 13]  # padding fills no slot beyond 16
    state = state_after(model, prompts, 64, [4, 4], [22, 16])
    greedy = Sampler.of([SamplingParams(temperature=0)] * 2)
    state, tokens = decode(model, state, greedy, np.asarray([NO_TOKEN]))
    assert (np.asarray(tokens.token) != NO_TOKEN).sum(axis=1).tolist() == [5, 2]
    is_filled_RS = np.asarray(state.cache.layers[0].keys_RSH != 0).any(axis=-1)
    assert is_filled_RS[0].tolist() == [slot < 16 + 5 for slot in range(64)]


@pytest.mark.parametrize(
    ("changes", "cache_dtype"),
    slow_but([({}, "")], [({}, ""), ({"position": "relative"}, "int8")]),
)
def test_sharded_equals_one_device(changes, cache_dtype):
    mesh, model = make_mesh(MeshConfig(data=2, tensor=2, fsdp=2)), unstack(stacked(**changes))
    placed = jax.device_put(model, shardings(model, mesh))
    kernel = placed.blocks[0].attention.wq.kernel[...]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    request, one = request_for(PROMPTS), Engine(model, cache_dtype=cache_dtype)
    assert run(request, engine=Engine(placed, cache_dtype, mesh=mesh)) == run(request, engine=one)
    assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.slow
def test_devices_share_kv_heads_of_which_there_are_fewer():
    """Two kv heads on six devices: each has a copy of one, for its query head."""
    mesh, model = make_mesh(MeshConfig(data=1, tensor=6), jax.devices()[:6]), unstack(stacked())
    config = cache_config(model.config, mesh)
    assert (model.config.num_kv_heads, config.num_kv_heads, config.num_heads) == (2, 6, 6)
    cache = empty_cache(model.config, 4, 16, "int8", mesh)
    for array in jax.tree.leaves(cache.layers):
        assert array.sharding.shard_shape(array.shape)[0] == 4
    placed = jax.device_put(model, shardings(model, mesh))
    request = request_for(PROMPTS)
    assert run(request, engine=Engine(placed, mesh=mesh)) == run(request)


def test_bfloat16_follows_float32_for_some_tokens():
    model = unstack(stacked(compute_dtype="bfloat16"))
    cache = jax.eval_shape(lambda: KVCache.empty(model.config, 1, 8))
    assert cache.layers[0].keys_RSH.dtype == "bfloat16"
    [wide], [narrow] = ids_of(PROMPTS[:1]), ids_of(PROMPTS[:1], model=model)
    assert (narrow[:3], len(narrow)) == (wide[:3], 8)


def test_an_int8_cache_follows_the_float_one_for_some_tokens():
    model = unstack(stacked())
    exact, near = (
        ids_of_one(Engine(model, dtype), [5, 1, 7], max_tokens=12) for dtype in ("", "int8")
    )
    assert near[:4] == exact[:4]


def test_a_prompt_read_in_chunks_equals_one_read_at_once():
    assert prefill_chunks(51, 16) == [16] * 4 and prefill_chunks(51, 32) == [32, 32]
    model = unstack(stacked(context_length=96))
    prompts = [list(range(1, 1 + n)) for n in (1, 16, 31, 33, 51)]
    (cache, logits_BV), (expected, expected_BV) = (
        prefill(model, KVCache.empty(model.config, 5, 64), prompts, longest=most)
        for most in (16, 512)
    )
    np.testing.assert_allclose(logits_BV, expected_BV, rtol=1e-4, atol=1e-4)
    assert cache.length_B.tolist() == expected.length_B.tolist() == [1, 16, 31, 33, 51]


class Recording(Llama):
    """A model that records each pass with a cache: first slot of the first sequence, tokens."""

    passes = ()

    def hidden(self, tokens_BT, cache=None, **options):
        if cache is not None:
            T = tokens_BT.shape[1]
            start = cache.positions(T)[0, 0]
            jax.debug.callback(lambda start: self.passes.append((int(start), T)), start)
        return super().hidden(tokens_BT, cache, **options)


@pytest.fixture
def record(monkeypatch):
    """Turns a model into one that records its passes, and returns the list."""

    def turn(model):
        model.__class__ = Recording
        monkeypatch.setattr(Recording, "passes", [])
        return Recording.passes

    return turn


def test_a_chat_is_read_from_where_it_differs(record):
    model = unstack(stacked(context_length=96))
    plain = unstack(stacked(context_length=96))
    passes = record(model)
    engine, first = Engine(model), [3, 1, 4, 1, 5]
    answer = ids_of_one(engine, first)
    turns = [[*first, *answer, 9, 2], [*first, 6, 5], [7, 7, 7], [7, 7, 7]]
    for turn in turns:
        assert ids_of_one(engine, turn) == ids_of_one(Engine(plain), turn)
    jax.effects_barrier()
    # The last token of an answer is not in the cache.
    assert [start for start, tokens in passes if tokens > 1] == [0, 12, 5, 0, 2]


def test_a_turn_that_fits_copies_no_cache():
    engine = Engine(unstack(stacked()))
    ids_of_one(engine, [3, 1, 4, 1, 5])
    before = engine._kept[1].layers
    ids_of_one(engine, [3, 1, 4, 1, 6])
    assert all(array.is_deleted() for array in jax.tree.leaves(before)), "donated"


def test_a_turn_that_outgrows_the_cache_gets_a_larger_one():
    model = unstack(stacked(context_length=96))
    engine = Engine(model)
    prompt = [n % 50 for n in range(40)]
    answer = ids_of_one(engine, prompt, max_tokens=20)  # 60 tokens of 64
    longer = [*prompt, *answer, *[n % 47 for n in range(20)]]
    assert ids_of_one(engine, longer) == ids_of_one(Engine(model), longer)


def test_a_generation_that_is_left_early_leaves_a_usable_engine():
    model = unstack(stacked())
    engine = Engine(model)
    running = engine.generate(request_for([[1, 2, 3]], max_tokens=25))
    next(running)
    running.close()
    assert ids_of_one(engine, [1, 2, 3, 4]) == ids_of_one(Engine(model), [1, 2, 3, 4])


class Delayed(Engine):
    """An engine that waits for a second thread after reading which cache it keeps."""

    both_read = threading.Barrier(2, timeout=0.5)

    @property
    def _kept(self):
        kept = self.held
        with contextlib.suppress(threading.BrokenBarrierError):  # the second may be locked out
            self.both_read.wait()
        return kept

    @_kept.setter
    def _kept(self, kept):
        self.held = kept


def test_two_threads_may_call_one_engine():
    model = unstack(stacked())
    engine, first = Delayed(model), [3, 1, 4, 1, 5]
    engine.both_read.abort()
    ids_of_one(engine, first)
    engine.both_read.reset()
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(ids_of_one, engine, [*first, last]) for last in (6, 7)]
    expected = [ids_of_one(Engine(model), [*first, last]) for last in (6, 7)]
    assert [one.result() for one in running] == expected


@pytest.mark.parametrize(
    ("max_tokens", "stop"),
    [
        (1, None),
        (60, 9),
        pytest.param(7, 2, marks=pytest.mark.slow),
        pytest.param(60, None, marks=pytest.mark.slow),
    ],
)
def test_speculation_changes_nothing(stop, max_tokens):
    """With an embedding this large the model repeats itself, so guesses are often right."""
    model = unstack(make_model(num_layers=1, context_length=96))
    prompts = [[5, 6, 5, 6, 5], [1, 2, 3], list(range(20))]
    [free, *_] = ids_of(prompts, model=model, max_tokens=max_tokens)
    stops = () if stop is None or stop >= len(free) else [free[stop]]
    options = {"max_tokens": max_tokens, "stop_ids": stops}
    plain = run(request_for(prompts, **options), model=model)
    assert run(request_for(prompts, **options, speculate=True), model=model) == plain


def test_a_text_in_a_loop_takes_fewer_passes_than_tokens(record):
    model = unstack(make_model(num_layers=1, context_length=96))
    model.embedding[...] *= 10  # so large that the model repeats its last token for ever
    passes = record(model)
    ids = ids_of_one(Engine(model), [5, 6, 7], max_tokens=65, speculate=True)
    jax.effects_barrier()
    assert ids == [7] * 65
    # Of the 64 after it one precedes the loop; then each pass gives a token and its guesses.
    checked = [tokens for _, tokens in passes if tokens == NUM_GUESSES + 1]
    assert len(checked) == 1 + -(-63 // (1 + NUM_GUESSES))


def test_a_guess_is_what_followed_the_last_time():
    history_BS = jnp.asarray([[1, 2, 3, 4, 1, 2, 9, 8, 7, 6, 5, 4, 3, 2, 1, 2] + [0] * 16] * 2)
    guess_BG = guess_tokens(history_BS, jnp.array([16, 4]))
    assert guess_BG[0].tolist() == [9, 8, 7, 6, 5, 4, 3]
    assert guess_BG[1].tolist() == [1, 2, 3, 4, 1, 2, 3], "nothing repeats: the first ids"


def test_a_loop_is_guessed_to_continue():
    history_BS = jnp.asarray([[6, 8, 4, 8, 4], [6, 4, 4, 4, 9], [3, 5, 3, 5, 3]])
    guess_BG = guess_tokens(jnp.pad(history_BS, ((0, 0), (0, 16))), jnp.array([5, 4, 4]))
    assert guess_BG.tolist() == [[8, 4] * 3 + [8], [4] * 7, [3, 5] * 3 + [3]]


def test_penalties_see_prompt_and_completion():
    model = unstack(make_model(num_layers=1))  # it repeats its last token
    prompt, plain = [7, 3, 7], ids_of_one(Engine(model), [7, 3, 7])
    assert len(set(plain)) < len(plain)
    ids = ids_of_one(Engine(model), prompt, repetition_penalty=1e9)
    assert len(set(ids) | set(prompt)) == len(ids) + 2
    ids = ids_of_one(Engine(model), prompt, presence_penalty=1e9)
    assert len(set(ids)) == len(ids)
    assert ids[0] == plain[0], "the prompt does not count"


def test_a_bias_of_minus_infinity_forbids_a_token():
    model = unstack(stacked())
    first = ids_of_one(Engine(model), [5])[0]
    assert first not in ids_of_one(Engine(model), [5], logit_bias={first: -np.inf})


def test_log_probabilities_are_the_models_own():
    top = 3
    request = request_for([[5, 6]], SAMPLED, max_tokens=20, logprobs=top)
    [ids], [logprobs], _ = run(request)
    logits = forward(stacked(), np.asarray([[5, 6, *ids]], np.int32))[0, 1:-1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert [each.id for each in logprobs] == ids and len(ids) == 20
    for row, each in zip(expected, logprobs):
        np.testing.assert_allclose(each.logprob, row[each.id], atol=1e-5)
        assert [other.id for other in each.top] == np.argsort(-row)[:top].tolist()
        found = [other.logprob for other in each.top]
        np.testing.assert_allclose(found, np.sort(row)[::-1][:top], atol=1e-5)


def test_the_host_sampler_is_greedy_at_temperature_0():
    host = request_for(PROMPTS[1:2], rng="xorshift", seeds=[1], max_tokens=11)
    assert run(host) == run(request_for(PROMPTS[1:2], max_tokens=11))
    stop = ids_of(PROMPTS[1:2])[0][3]
    [ids], _, ends = run(request_for(PROMPTS[1:2], rng="xorshift", seeds=[1], stop_ids=[stop]))
    assert len(ids) <= 3 and ends == ["stop"]
