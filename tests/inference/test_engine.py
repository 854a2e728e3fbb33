"""Generation against full recomputation, and the promises it makes about rows and ends."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import TINY, make_model

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh, shardings
from llama_jax.errors import UsageError, UserError
from llama_jax.inference import engine as engines
from llama_jax.inference import prefill, speculation
from llama_jax.inference.decode import NOTHING, GenerationState, decode
from llama_jax.inference.engine import Engine
from llama_jax.inference.prefill import _read, read_prompts, stretches
from llama_jax.inference.sampler import make_sampler
from llama_jax.inference.speculation import GUESSES, guess
from llama_jax.model.cache import KVCache
from llama_jax.model.unstacked import unstack

CONTEXT = TINY["context_length"]
GREEDY = make_sampler(temperature=0)
SAMPLED = make_sampler(1.0, 20, 0.9)
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], list(range(20))]

forward = jax.jit(lambda model, tokens_BT: model(tokens_BT)[0])


@cache
def stacked(**changes):
    """A model that does not just repeat its last token: the embedding is a whisper."""
    model = make_model(**{"num_layers": 2} | changes)
    model.embedding[...] *= 0.1
    return model


def ids_and_ends(
    prompts, sampler=GREEDY, *, model=None, max_tokens=8, seeds=None, stop_ids=(NOTHING,)
):
    """The whole continuations, and why each row ended."""
    model, seeds = model or unstack(stacked()), seeds or [0] * len(prompts)
    rows, ends = [[] for _ in prompts], [""] * len(prompts)
    for chunk in Engine(model).generate(
        prompts, sampler, max_tokens=max_tokens, seeds=seeds, stop_ids=stop_ids
    ):
        for row, (ids, end) in enumerate(zip(chunk.rows, chunk.finished)):
            assert not (ids and ends[row]), "a row that has ended grows no more"
            rows[row] += ids
            ends[row] = end
    assert all(ends)
    return rows, ends


def continued(prompts, *arguments, **options):
    return ids_and_ends(prompts, *arguments, **options)[0]


def recomputed(model, prompt, count):
    """The greedy continuation by reading everything again for each token."""
    tokens = np.zeros((1, model.config.context_length), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = forward(model, tokens)[0, at - 1].argmax()
    return tokens[0, len(prompt) : len(prompt) + count].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_cached_is_recomputed(tied):
    model = stacked(num_layers=3, tied_embeddings=tied, context_length=48)
    prompt = [3, 1, 4, 1, 5]
    [new] = continued([prompt], model=unstack(model), max_tokens=40, stop_ids=())
    assert len(set(new)) > 5, "a repeated token would prove little"
    assert new == recomputed(model, prompt, 40)


@pytest.mark.parametrize(
    ("sampler", "longest"), [(GREEDY, 20), (SAMPLED, 16)], ids=["greedy", "sampled"]
)
def test_a_row_does_not_depend_on_its_neighbours(sampler, longest):
    prompts, seeds = [prompt[:longest] for prompt in PROMPTS], [7, 8, 7]
    together = continued(prompts, sampler, seeds=seeds)
    assert len(set(map(tuple, together))) == len(prompts)
    alone = [continued([prompt], sampler, seeds=[s])[0] for prompt, s in zip(prompts, seeds)]
    assert together == alone
    assert continued(prompts[::-1], sampler, seeds=seeds[::-1]) == together[::-1]


def test_rows_end_independently_and_without_the_stop_token():
    free = continued(PROMPTS, max_tokens=11)
    stop = next(token for token in free[0][1:] if token not in free[1] + free[2])
    at = free[0].index(stop)
    rows, ends = ids_and_ends(PROMPTS, max_tokens=11, stop_ids=[stop])
    assert rows == [free[0][:at], *free[1:]]
    assert ends == ["stop", "length", "length"]
    first = free[0][0]
    assert ids_and_ends(PROMPTS[:1], max_tokens=11, stop_ids=[first]) == ([[]], ["stop"])


@pytest.mark.parametrize("max_tokens", [1, 2, 11, 12])
def test_max_tokens_is_exact(max_tokens):
    rows, ends = ids_and_ends(PROMPTS, max_tokens=max_tokens)
    assert [len(row) for row in rows] == [max_tokens] * 3
    assert ends == ["length"] * 3


@pytest.mark.parametrize("max_tokens", [CONTEXT, 2**40])
@pytest.mark.parametrize("length", [1, 14, 15, 16, 17, CONTEXT - 1])
def test_a_row_ends_where_the_context_is_full(length, max_tokens):
    prompt = [(7 * i) % 53 for i in range(length)]
    rows, ends = ids_and_ends([prompt], max_tokens=max_tokens)
    assert (len(rows[0]), ends) == (CONTEXT - length, ["length"])
    assert rows[0] == recomputed(stacked(), prompt, CONTEXT - length)


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 5])
def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(length):
    with pytest.raises(UserError, match=rf"has {length} tokens; expected 1 to {CONTEXT - 1}.*32"):
        continued([[1, 2], [1] * length])


def test_a_seed_decides():
    prompts = [PROMPTS[1]] * 3
    seven, again, eight = continued(prompts, SAMPLED, seeds=[7, 7, 8])
    assert seven == again != eight
    assert continued(prompts, SAMPLED, seeds=[8, 7, 7]) == [eight, seven, seven]


def test_numbers_and_nearby_lengths_do_not_compile_again():
    continued(PROMPTS[:1], SAMPLED)
    before = _read._cache_size(), decode._cache_size()
    for length in (1, 2, 15, 16):
        sampler = make_sampler(0.1 * length, length, 0.05 * length)
        continued([[5] * length], sampler, max_tokens=length, seeds=[length], stop_ids=[length])
    assert (_read._cache_size(), decode._cache_size()) == before


@pytest.mark.parametrize("K", [2, 6])
def test_the_loop_copies_no_cache(K):
    """Each copy would cost as much as reading the cache; four a layer once did."""
    model = unstack(stacked(num_kv_heads=K))
    numbers = jnp.asarray([4], jnp.int32)
    cache, _ = read_prompts(model, KVCache.empty(model.config, 1, 48), [[1, 2, 3, 4]])
    keys_B = jax.vmap(jax.random.key)(np.asarray([0], np.uint32))
    state = GenerationState(cache, numbers, jnp.zeros(1, bool), 3 * numbers, keys_B, None)
    program = decode.lower(model, state, GREEDY, numbers).compile().as_text()
    sizes = {",".join(map(str, array.shape)) for array in jax.tree.leaves(state.cache.layers)}
    assert all(f"f32[{size}]" in program for size in sizes)
    copied = [line for line in program.splitlines() if " copy(" in line]
    assert not [line for line in copied if any(f"f32[{size}]" in line for size in sizes)]


def test_the_loop_ends_with_its_last_row():
    """A turn more would read the last tokens, which nobody asks about, into the next slots."""
    model, prompts = unstack(stacked()), [[1] * 16, [1] * 13]  # padding fills no slot beyond 16
    cache, _ = read_prompts(model, KVCache.empty(model.config, 2, 64), prompts)
    keys_B = jax.vmap(jax.random.key)(np.asarray([0, 0], np.uint32))
    token_B, nobody_B, limit_B = jnp.asarray([4, 4]), jnp.zeros(2, bool), jnp.asarray([22, 16])
    state = GenerationState(cache, token_B, nobody_B, limit_B, keys_B, None)
    state, chosen = decode(model, state, GREEDY, np.asarray([NOTHING]))
    assert (np.asarray(chosen.token) != NOTHING).sum(axis=1).tolist() == [5, 2]
    is_filled_RS = np.asarray(state.cache.layers[0].keys_RSH != 0).any(axis=-1)
    assert is_filled_RS[0].tolist() == [slot < 16 + 5 for slot in range(64)]


def test_sharded_is_one_device():
    mesh, model = make_mesh(MeshConfig(data=2, tensor=2, fsdp=2)), unstack(stacked())
    placed = jax.device_put(model, shardings(model, mesh))
    kernel = placed.blocks[0].attention.wq.kernel[...]
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 4
    with jax.set_mesh(mesh):
        sharded = continued(PROMPTS, model=placed)
    assert sharded == continued(PROMPTS)


def test_bfloat16_follows_float32_for_a_while():
    model = unstack(stacked(compute_dtype="bfloat16"))
    cache = jax.eval_shape(lambda: KVCache.empty(model.config, 1, 8))
    assert cache.layers[0].keys_RSH.dtype == "bfloat16"
    [wide], [narrow] = continued(PROMPTS[:1]), continued(PROMPTS[:1], model=model)
    assert (narrow[:3], len(narrow)) == (wide[:3], 8)


def said(engine, prompt, sampler=GREEDY, max_tokens=8, seed=0, **options):
    """The ids of one continuation, and what was told of them."""
    chunks = engine.generate([prompt], sampler, max_tokens=max_tokens, seeds=[seed], **options)
    ids, told = [], []
    for chunk in chunks:
        ids += chunk.rows[0]
        told += chunk.logprobs[0]
    return ids, told


@pytest.mark.parametrize("longest", [16, 32])
def test_prompts_are_read_in_stretches(monkeypatch, longest):
    model = unstack(stacked(context_length=96))
    prompts = [list(range(1, 1 + n)) for n in (1, 16, 31, 33, 51)]
    whole = continued(prompts, model=model)
    monkeypatch.setattr(engines, "stretches", partial(stretches, longest=longest))
    monkeypatch.setattr(prefill, "stretches", partial(stretches, longest=longest))
    assert continued(prompts, model=model) == whole
    assert stretches(51, longest) == {16: [16, 16, 16, 16], 32: [32, 32]}[longest]


def test_the_next_turn_is_read_from_where_it_differs(monkeypatch):
    read, lengths = engines.read_prompts, []

    def spy(model, cache, prompts, start):
        lengths.append(len(prompts[0]) - start)
        return read(model, cache, prompts, start)

    monkeypatch.setattr(engines, "read_prompts", spy)
    model = unstack(stacked(context_length=96))
    engine, first = Engine(model), [3, 1, 4, 1, 5]
    answer, _ = said(engine, first)
    turns = [[*first, *answer, 9, 2], [*first, 6, 5], [7, 7, 7], [7, 7, 7]]
    for turn in turns:
        assert said(engine, turn) == said(Engine(model), turn)
    # The last of the answer was never read; a fresh engine reads everything.
    assert lengths == [5, 3, 15, 2, 7, 3, 3, 1, 3]


def test_a_turn_that_fits_copies_no_cache():
    engine = Engine(unstack(stacked()))
    said(engine, [3, 1, 4, 1, 5])
    before = engine._kept[1].layers
    said(engine, [3, 1, 4, 1, 6])
    assert all(array.is_deleted() for array in jax.tree.leaves(before)), "donated"


def test_a_turn_that_outgrows_the_cache_gets_a_larger_one():
    model = unstack(stacked(context_length=300))
    engine = Engine(model)
    prompt = [n % 50 for n in range(40)]
    answer, _ = said(engine, prompt, max_tokens=20)
    longer = [*prompt, *answer, *[n % 47 for n in range(150)]]
    assert said(engine, longer) == said(Engine(model), longer)


def test_a_generation_that_is_left_early_leaves_a_usable_engine():
    model = unstack(stacked())
    engine = Engine(model)
    running = engine.generate([[1, 2, 3]], GREEDY, max_tokens=25, seeds=[0])
    next(running)
    running.close()
    assert said(engine, [1, 2, 3, 4]) == said(Engine(model), [1, 2, 3, 4])


class HeldUp(Engine):
    """An engine that waits a little for a second thread between looking at what it keeps and on."""

    both_look = threading.Barrier(2, timeout=0.5)

    @property
    def _kept(self):
        kept = self.held
        with contextlib.suppress(threading.BrokenBarrierError):  # nobody else may look meanwhile
            self.both_look.wait()
        return kept

    @_kept.setter
    def _kept(self, kept):
        self.held = kept


def test_two_threads_may_call_one_engine():
    model = unstack(stacked())
    engine, first = HeldUp(model), [3, 1, 4, 1, 5]
    engine.both_look.abort()
    said(engine, first)
    engine.both_look.reset()
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(said, engine, [*first, last]) for last in (6, 7)]
    expected = [said(Engine(model), [*first, last]) for last in (6, 7)]
    assert [one.result() for one in running] == expected


@pytest.mark.parametrize("stop", [None, 2, 9])
@pytest.mark.parametrize("max_tokens", [1, 7, 60])
def test_speculation_changes_nothing(stop, max_tokens):
    """With an embedding this strong the model repeats itself, so that guesses are often right."""
    model = unstack(make_model(num_layers=2, context_length=96))
    prompts = [[5, 6, 5, 6, 5], [1, 2, 3], list(range(20))]
    free = continued(prompts, model=model, max_tokens=max_tokens)
    stops = [NOTHING] if stop is None or stop >= len(free[0]) else [free[0][stop]]
    options = {"max_tokens": max_tokens, "seeds": [0] * 3, "stop_ids": stops}
    plain, ends = ids_and_ends(prompts, model=model, max_tokens=max_tokens, stop_ids=stops)
    rows = [[], [], []]
    for chunk in Engine(model).generate(prompts, GREEDY, speculate=True, **options):
        rows = [row + new for row, new in zip(rows, chunk.rows)]
        last = chunk.finished
    assert (rows, last) == (plain, ends)


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by one with every pass of the guessing loop."""
    made = []

    def counted(*arguments):
        jax.debug.callback(lambda: made.append(1))
        return guess(*arguments)

    speculation.decode_guessing.clear_cache()
    monkeypatch.setattr(speculation, "guess", counted)
    yield made
    speculation.decode_guessing.clear_cache()


def test_a_circle_takes_fewer_passes_than_tokens(passes):
    model = unstack(make_model(num_layers=2, context_length=96))
    model.embedding[...] *= 10  # so loud that the model says its last token for ever
    ids, _ = said(Engine(model), [5, 6, 7], max_tokens=65, speculate=True)
    jax.effects_barrier()
    assert ids == [7] * 65
    # Of the 64 after the first, one before the circle is seen, then a token and its guesses each.
    assert len(passes) == 1 + -(-63 // (1 + GUESSES))


def test_a_guess_is_what_followed_the_last_time():
    history_BS = jnp.asarray([[1, 2, 3, 4, 1, 2, 9, 8, 7, 6, 5, 4, 3, 2, 1, 2] + [0] * 16] * 2)
    guess_BG = guess(history_BS, jnp.array([16, 4]))
    assert guess_BG[0].tolist() == [9, 8, 7, 6, 5, 4, 3]
    assert guess_BG[1].tolist() == [1, 2, 3, 4, 1, 2, 3], "nothing repeats: the row's first ids"


def test_a_circle_is_guessed_to_go_on():
    history_BS = jnp.asarray([[6, 8, 4, 8, 4], [6, 4, 4, 4, 9], [3, 5, 3, 5, 3]])
    guess_BG = guess(jnp.pad(history_BS, ((0, 0), (0, 16))), jnp.array([5, 4, 4]))
    assert guess_BG.tolist() == [[8, 4] * 3 + [8], [4] * 7, [3, 5] * 3 + [3]]


@pytest.mark.parametrize("sampler", [SAMPLED, make_sampler(0, repetition_penalty=1.3)])
def test_only_plain_greedy_speculates(sampler):
    with pytest.raises(UserError, match=r"speculate .* temperature 0, without penalties"):
        said(Engine(unstack(stacked())), [1, 2], sampler, speculate=True)


def test_penalties_see_prompt_and_continuation():
    model = unstack(make_model(num_layers=2))  # it repeats its last token
    prompt, plain = [7, 3, 7], said(Engine(model), [7, 3, 7])[0]
    assert len(set(plain)) < len(plain)
    never_twice = make_sampler(0, repetition_penalty=1e9)
    ids, _ = said(Engine(model), prompt, never_twice)
    assert len(set(ids) | set(prompt)) == len(ids) + 2
    only_new = make_sampler(0, presence_penalty=1e9)
    ids, _ = said(Engine(model), prompt, only_new)
    assert len(set(ids)) == len(ids)
    assert ids[0] == plain[0], "the prompt does not count"


def test_a_bias_forbids():
    model = unstack(stacked())
    first = said(Engine(model), [5])[0][0]
    forbidden = make_sampler(0, logit_bias={first: -np.inf})
    assert first not in said(Engine(model), [5], forbidden)[0]
    with pytest.raises(UserError, match="logit_bias has the token id 53; expected 0 to 52"):
        said(Engine(model), [5], make_sampler(0, logit_bias={53: 1.0}))


@pytest.mark.parametrize("top", [0, 3])
def test_log_probabilities_are_the_models_own(top):
    model = unstack(stacked())
    ids, told = said(Engine(model), [5, 6], SAMPLED, max_tokens=20, logprobs=top)
    logits = forward(stacked(), np.asarray([[5, 6, *ids]], np.int32))[0, 1:-1]
    expected = np.asarray(jax.nn.log_softmax(logits))
    assert len(told) == len(ids) == 20
    for row, token, one in zip(expected, ids, told):
        np.testing.assert_allclose(one.logprob, row[token], atol=1e-5)
        assert [i for i, _ in one.top] == np.argsort(-row)[:top].tolist()
        np.testing.assert_allclose([v for _, v in one.top], np.sort(row)[::-1][:top], atol=1e-5)


@pytest.mark.parametrize("top", [-1, 54, 1.5, True])
def test_more_log_probabilities_than_tokens_are_refused(top):
    with pytest.raises(UsageError, match=f"logprobs={top} is .*; expected 0 to 53"):
        said(Engine(unstack(stacked())), [5, 6], logprobs=top)


def test_an_int8_cache_follows_the_float_one_for_a_while():
    model = unstack(stacked(num_layers=3))
    exact, near = (
        said(Engine(model, dtype), [5, 1, 7], max_tokens=12)[0] for dtype in ("", "int8")
    )
    assert near[:4] == exact[:4]
