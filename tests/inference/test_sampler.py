"""The sampler against distributions by hand and frequencies; order of steps; batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from frequencies import are_likely

from llama_jax.config import MeshConfig
from llama_jax.distributed.mesh import make_mesh
from llama_jax.inference.request import SamplingParams
from llama_jax.inference.sampler import Sampler, TokenCounts

pytestmark = pytest.mark.optimized

HAND = np.log(np.maximum([0.0, 0.5, 0.4, 0.1], 1e-300)).astype(np.float32)
HAND[0] = -np.inf
EVERYTHING = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.02,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.2,
    "logit_bias": {3: 2.0, 7: -np.inf},
}
sample = jax.jit(lambda sampler, *rest: sampler(*rest))
weigh = jax.jit(lambda sampler, *rest: sampler.masses(sampler.adjust(*rest)))


def make_sampler(batch=1, **settings):
    """A sampler that treats every sequence alike; what is not set is off."""
    return Sampler.of([SamplingParams(**{"top_p": 1.0} | settings)] * batch)


def counted(prompt, generated):
    """Counts of one sequence: how often each token occurs in its prompt and after it."""
    return TokenCounts(jnp.asarray([prompt], jnp.int32), jnp.asarray([generated], jnp.int32))


def probabilities(logits, counts=None, **settings):
    """The probabilities that one sequence's logits become."""
    masses = np.asarray(
        weigh(make_sampler(**settings), jnp.asarray(logits, jnp.float32)[None], counts)
    )
    return masses[0] / masses.sum()


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("settings", "expected"),
    {
        "all off": ({}, [0, 0.5, 0.4, 0.1]),
        "top_p": ({"top_p": 0.6}, [0, 5 / 9, 4 / 9, 0]),
        "top_p of the first": ({"top_p": 0.49}, [0, 1, 0, 0]),
        "top_p near 0": ({"top_p": 1e-9}, [0, 1, 0, 0]),
        "top_p of 0 in float32": ({"top_p": 1e-300}, [0, 1, 0, 0]),
        "top_p near 1": ({"top_p": 0.95}, [0, 0.5, 0.4, 0.1]),
        "top_k 1": ({"top_k": 1}, [0, 1, 0, 0]),
        "top_k 2": ({"top_k": 2}, [0, 5 / 9, 4 / 9, 0]),
        "top_k of all": ({"top_k": 4}, [0, 0.5, 0.4, 0.1]),
        "top_k beyond all": ({"top_k": 2**40}, [0, 0.5, 0.4, 0.1]),
        "min_p below all": ({"min_p": 0.19}, [0, 0.5, 0.4, 0.1]),
        "min_p above one": ({"min_p": 0.21}, [0, 5 / 9, 4 / 9, 0]),
        "min_p of the first": ({"min_p": 1}, [0, 1, 0, 0]),
        "cold": ({"temperature": 0.5}, [0, 25 / 42, 16 / 42, 1 / 42]),
        "hot": ({"temperature": 1e9}, [0, 1 / 3, 1 / 3, 1 / 3]),
        "hotter than float32": ({"temperature": 1e300}, [0, 1 / 3, 1 / 3, 1 / 3]),
        "colder than float32": ({"temperature": 1e-37}, [0, 1, 0, 0]),
        "bias": ({"logit_bias": {3: np.log(5.0), 2: -np.log(4.0)}}, [0, 5 / 11, 1 / 11, 5 / 11]),
        "forbidden": ({"logit_bias": {1: -np.inf}}, [0, 0, 0.8, 0.2]),
        "as good as forbidden": ({"logit_bias": {1: -1e300}}, [0, 0, 0.8, 0.2]),
        "as good as forced": ({"logit_bias": {3: 1e300}}, [0, 0, 0, 1]),
    }.values(),
)
def test_distributions_worked_by_hand(settings, expected):
    np.testing.assert_allclose(probabilities(HAND, **settings), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    {
        # of the hand's logits, all negative, that of token 1 is doubled: .25 : .4 : .1
        "repetition in the prompt": ({"repetition_penalty": 2}, [0, 0.25, 0.16, 0.1]),
        "presence": ({"presence_penalty": np.log(2)}, [0, 0.5, 0.2, 0.1]),
        "frequency": ({"frequency_penalty": np.log(2)}, [0, 0.5, 0.05, 0.1]),
        "both": (
            {"frequency_penalty": np.log(2), "presence_penalty": np.log(2)},
            [0, 0.5, 0.025, 0.1],
        ),
        "a negative penalty": ({"presence_penalty": -np.log(2)}, [0, 0.5, 0.8, 0.1]),
        "beyond float32": ({"presence_penalty": 1e300, "frequency_penalty": 1e300}, [0, 5, 0, 1]),
        "a huge repetition penalty": ({"repetition_penalty": 1e300}, [0, 0, 0, 1]),
        "a tiny repetition penalty": ({"repetition_penalty": 1e-300}, [0, 1, 1, 0.1]),
    }.values(),
)
def test_penalties_worked_by_hand(settings, expected):
    counts = counted([2, 1, 0, 0], [0, 0, 3, 0])
    found = probabilities(HAND, counts, **settings)
    np.testing.assert_allclose(found, np.asarray(expected) / sum(expected), atol=1e-6)


LN = {n: float(np.log(n)) for n in (2, 3, 4, 5, 8)}
ORDER = {
    # 2 to begin with; the bias makes it 4, the repetition penalty then 2: no other order does
    "logit_bias, then repetition": (
        [2.0, 0.0],
        {"logit_bias": {0: 2.0}, "repetition_penalty": 2},
        ([1, 0], [0, 0]),
        np.exp([2.0, 0.0]),
    ),
    # ln 4 / 2 - ln 2 = 0; were ln 2 to come off first, half of ln 2 would be left
    "repetition, then presence": (
        [LN[4], 0.0],
        {"repetition_penalty": 2, "presence_penalty": LN[2]},
        ([0, 0], [1, 0]),
        [1, 1],
    ),
    # ln 4 - ln 2 = ln 2, then doubled to ln 4; in the other order it would be ln 8
    "presence, then temperature": (
        [LN[4], 0.0],
        {"presence_penalty": LN[2], "temperature": 0.5},
        ([0, 0], [1, 0]),
        [4, 1],
    ),
    # .25 : .16 : .01 is .595 : .381 : .024, so the first alone reaches .55; before it would not
    "temperature, then top_p": (HAND, {"temperature": 0.5, "top_p": 0.55}, None, [0, 1, 0, 0]),
    # 1 : .64 : .04, so .7 is too much for the second; before it would not be
    "temperature, then min_p": (HAND, {"temperature": 0.5, "min_p": 0.7}, None, [0, 1, 0, 0]),
    # of all, .5 does not reach .52; of the two that top_k leaves it is 5/9 and does
    "top_k, then top_p": (HAND, {"top_k": 2, "top_p": 0.52}, None, [0, 1, 0, 0]),
    # of those that min_p leaves, .5 would be 5/9 and reach .52
    "top_p, then min_p": (HAND, {"top_p": 0.52, "min_p": 0.5}, None, [0, 5, 4, 0]),
}


@pytest.mark.parametrize(("logits", "settings", "counts", "expected"), ORDER.values(), ids=ORDER)
def test_the_order_of_steps(logits, settings, counts, expected):
    found = probabilities(logits, counts and counted(*counts), **settings)
    np.testing.assert_allclose(found, np.asarray(expected) / np.sum(expected), atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 1e-300}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1}],
)
def test_the_most_likely_token_is_chosen(settings):
    logits_BV = np.random.default_rng(0).normal(size=(64, 300)).astype(np.float32)
    tokens_B = sample(make_sampler(64, **settings), logits_BV, keys(64))
    assert tokens_B.dtype == jnp.int32
    np.testing.assert_array_equal(tokens_B, logits_BV.argmax(axis=-1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 0),
        ({"logit_bias": {0: -0.5}}, 1),
        ({"repetition_penalty": 2}, 1),
        ({"presence_penalty": 0.5}, 0),  # of token 0, which only the prompt has: nothing
        ({"repetition_penalty": 2, "presence_penalty": 0.5}, 2),
        ({"repetition_penalty": 2, "frequency_penalty": 0.25}, 2),
    ],
)
def test_greedy_sampling_applies_biases_and_penalties(settings, expected, dtype):
    logits = jnp.asarray([[1.5, 1.25, 1.0]], dtype)
    counts = counted([1, 0, 0], [0, 0, 0]) if len(settings) < 2 else counted([1, 0, 0], [0, 2, 0])
    sampler = make_sampler(temperature=0, **settings)
    assert sample(sampler, logits, keys(1), counts).tolist() == [expected]


def test_a_greedy_batch_computes_no_probabilities():
    with jax.debug_nans(True), jax.debug_infs(True):
        assert make_sampler(temperature=0)(jnp.asarray([[1.0, 3.0, 2.0]]), keys(1)).tolist() == [1]
    text = str(jax.make_jaxpr(make_sampler(2, temperature=0))(jnp.ones((2, 5)), keys(2)))
    assert " div " not in text and " exp " not in text and "random" not in text


def expected_probabilities(logits, prompt, generated, settings):
    """The whole chain in float64, by sorting."""
    s = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "repetition_penalty": 1} | settings
    x = logits.astype(np.float64)
    for token, bias in s.get("logit_bias", {}).items():
        x[token] += bias
    priced = np.where(x > 0, x / s["repetition_penalty"], x * s["repetition_penalty"])
    x = np.where(prompt + generated > 0, priced, x)
    x -= s.get("presence_penalty", 0) * (generated > 0) + s.get("frequency_penalty", 0) * generated
    p = np.exp((x - x.max()) / s["temperature"])
    order = np.argsort(-p)
    if s["top_k"]:
        p[order[s["top_k"] :]] = 0
    p /= p.sum()
    p[order[np.cumsum(p[order]) - p[order] >= s["top_p"]]] = 0
    p[p < s["min_p"] * p.max()] = 0
    return p / p.sum()


SEPARATE = [{name: value} for name, value in EVERYTHING.items()]
SEPARATE = [{"top_k": 5} if "top_k" in settings else settings for settings in SEPARATE]
SEPARATE = [{"top_p": 0.7} if "top_p" in settings else settings for settings in SEPARATE]
SEPARATE = [{"min_p": 0.2} if "min_p" in settings else settings for settings in SEPARATE]
TOGETHER = EVERYTHING | {"top_k": 9, "top_p": 0.95}


@pytest.mark.parametrize(
    "settings",
    [TOGETHER, *(pytest.param(one, marks=pytest.mark.slow) for one in ({}, *SEPARATE))],
    ids=lambda settings: "+".join(settings) or "plain",
)
def test_tokens_have_the_expected_frequencies(settings):
    random = np.random.default_rng(4)
    logits = (1.5 * random.normal(size=12)).astype(np.float32)
    prompt, generated = random.integers(0, 2, 12), random.integers(0, 3, 12)
    rows = 10_000
    counts = TokenCounts(*(jnp.asarray(np.tile(c, (rows, 1))) for c in (prompt, generated)))
    sampler, logits_BV = make_sampler(rows, **settings), np.tile(logits, (rows, 1))
    drawn = [
        sample(sampler, logits_BV, keys(rows, seed), counts if sampler.needs_counts else None)
        for seed in range(10)
    ]
    seen = np.bincount(np.concatenate(drawn), minlength=12)
    expected = 100_000 * expected_probabilities(logits, prompt, generated, settings)
    assert not seen[expected == 0].any() and (expected[expected > 0] > 5).all()
    assert are_likely(seen[expected > 0], expected[expected > 0])


def batch(V, rows=17):
    random = np.random.default_rng(V)
    counts = TokenCounts(*random.integers(0, 3, (2, rows, V), np.int32))
    return (2 * random.normal(size=(rows, V)).astype(np.float32), keys(rows), counts)


# Sampling parameters of a batch, each step used by some and off or neutral for others.
DIFFERENT = [
    EVERYTHING,
    {"temperature": 0},
    {},
    {"temperature": 0.37, "top_p": 0.5},
    {"temperature": 1.7, "top_k": 5, "top_p": 1.0},
    {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {2: 0.7}},
    {"presence_penalty": 0.7, "frequency_penalty": 0.13, "top_p": 1.0},
    {"min_p": 0.05, "top_p": 1.0, "logit_bias": dict.fromkeys(range(12), -0.3)},
    {"repetition_penalty": 1.7, "temperature": 0.9, "top_k": 300},
]


@pytest.mark.as_used
@pytest.mark.parametrize(
    ("different", "compared"),
    [
        pytest.param(False, (0, 16), marks=pytest.mark.slow),
        (True, (0, len(DIFFERENT) - 1)),
        pytest.param(True, range(1, len(DIFFERENT) - 1), marks=pytest.mark.slow),
    ],
)
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(different, compared):
    """A sequence depends on its own logits, counts, key and parameters."""
    rows = [DIFFERENT[row % len(DIFFERENT)] if different else EVERYTHING for row in range(17)]
    everything = batch(V=700)  # so many that float32 sums and `jnp.exp` depend on the batch
    logits_BV, row_keys, counts = everything
    sampler = Sampler.of([SamplingParams(**settings) for settings in rows])
    tokens, masses = sample(sampler, *everything), weigh(sampler, logits_BV, counts)
    assert len(set(tokens.tolist())) > 6
    for row in compared:
        alone = Sampler.of([SamplingParams(**rows[row])])
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], (logits_BV, row_keys, counts))
        assert sample(alone, *one)[0] == tokens[row], rows[row]
        if not SamplingParams(**rows[row]).is_greedy:
            np.testing.assert_array_equal(weigh(alone, one[0], one[2])[0], masses[row])


def test_the_exponential_is_our_own():
    # The last bit of XLA's depends on the batch, which few rows seldom show.
    text = str(jax.make_jaxpr(make_sampler(2, temperature=0.5))(jnp.ones((2, 5)), keys(2)))
    assert " exp " not in text and " exp2 " not in text and "round" in text


def test_a_vocabulary_sharded_over_eight_devices_gives_the_same_tokens():
    sampler, (logits_BV, row_keys, counts) = make_sampler(17, **EVERYTHING), batch(704)
    mesh = make_mesh(MeshConfig(tensor=8), jax.devices()[:8])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "tensor"))
    sharded = jax.device_put((logits_BV, counts), sharding)
    assert len(sharded[0].sharding.device_set) == 8
    found = sample(sampler, sharded[0], row_keys, sharded[1])
    np.testing.assert_array_equal(found, sample(sampler, logits_BV, row_keys, counts))


def test_other_values_do_not_recompile():
    traced = []

    @jax.jit
    def traces(sampler, *rest):
        traced.append(sampler)
        return sampler(*rest)

    logits_BV, row_keys, counts = batch(53, rows=3)
    others = {
        "temperature": 2,
        "top_k": 3,
        "top_p": np.float32(0.5),
        "min_p": 1,
        "repetition_penalty": 3,
        "presence_penalty": 0,
        "frequency_penalty": -1,
        "logit_bias": {1: 5, 2: 0.5, 3: -np.inf},
    }
    mixed = Sampler.of([SamplingParams(**settings) for settings in (EVERYTHING, others, {})])
    for sampler in (make_sampler(3, **EVERYTHING), make_sampler(3, **others), mixed):
        traces(sampler, logits_BV, row_keys, counts)
    assert len(traced) == 1
    assert not make_sampler(temperature=0.5, top_k=3, logit_bias={1: 2}).needs_counts
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert make_sampler(**{name: 0.5}).needs_counts


def test_a_step_that_no_sequence_uses_is_not_computed():
    text = str(jax.make_jaxpr(make_sampler(2))(jnp.ones((2, 5)), keys(2)))
    assert "while" not in text and "scatter" not in text
    text = str(jax.make_jaxpr(make_sampler(2, logit_bias={}, top_k=2))(jnp.ones((2, 5)), keys(2)))
    assert text.count("while[") + text.count("scan[") == 1 and "scatter" not in text


@pytest.mark.parametrize("count", [1, 8, 9, 53])
def test_any_number_of_biases(count):
    bias = dict.fromkeys(range(count), -np.inf)
    found = probabilities(np.zeros(54), logit_bias=bias)
    np.testing.assert_allclose(found, [0] * count + [1 / (54 - count)] * (54 - count), atol=1e-6)
