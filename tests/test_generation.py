"""Generation against full recomputation, and the promises it makes about rows and ends."""

from functools import cache

import jax
import numpy as np
import pytest
from conftest import TINY, make_model

from llama_jax.cache import KVCache
from llama_jax.config import MeshConfig
from llama_jax.errors import UserError
from llama_jax.generation import NOTHING, decode, generate, prefill
from llama_jax.model import unstack
from llama_jax.sampling import make_sampler
from llama_jax.sharding import make_mesh, shardings

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
    for chunk in generate(
        model, prompts, sampler, max_tokens=max_tokens, seeds=seeds, stop_ids=stop_ids
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
    before = prefill._cache_size(), decode._cache_size()
    for length in (1, 2, 15, 16):
        sampler = make_sampler(0.1 * length, length, 0.05 * length)
        continued([[5] * length], sampler, max_tokens=length, seeds=[length], stop_ids=[length])
    assert (prefill._cache_size(), decode._cache_size()) == before


@pytest.mark.parametrize("K", [2, 6])
def test_the_loop_copies_no_cache(K):
    """Each copy would cost as much as reading the cache; four a layer once did."""
    model, slots = unstack(stacked(num_kv_heads=K)), 32
    numbers = np.asarray([4], np.int32)
    keys_B = jax.vmap(jax.random.key)(np.asarray([0], np.uint32))
    prompt = np.asarray([[1, 2, 3, 4]], np.int32)
    state, _ = prefill(model, prompt, numbers, 2 * numbers, keys_B, GREEDY, numbers, slots)
    program = decode.lower(model, state, GREEDY, numbers).compile().as_text()
    sizes = {",".join(map(str, array.shape)) for array in jax.tree.leaves(state.cache.layers)}
    assert all(f"f32[{size}]" in program for size in sizes)
    copied = [line for line in program.splitlines() if " copy(" in line]
    assert not [line for line in copied if any(f"f32[{size}]" in line for size in sizes)]


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
