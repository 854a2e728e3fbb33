"""Mixtures of token folders: weights, which example is of which source, and errors."""

import hashlib
import itertools
import json
from collections import Counter
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from token_folders import counting, write_documents, write_examples

from llama_jax.config import DataConfig
from llama_jax.data.loader import training_batches
from llama_jax.data.sources import Sources, open_sources, parse_sources, source_of
from llama_jax.data.token_folder import fingerprint
from llama_jax.errors import UsageError, UserError

T = 6


def config(sources="", path="unused"):
    return DataConfig(path=path, sources=sources, batch_size=4, sequence_length=T)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Three folders whose tokens begin at 0, 1000 and 2000; c is of examples."""
    root = tmp_path_factory.mktemp("sources")
    write_documents(root / "a", counting([9, 30, 7, 8]), counting([7]), shard_tokens=50)
    write_documents(root / "b", counting([8, 9], first=1000), shard_tokens=50)
    examples = [(tokens, tokens % 2) for tokens in counting([5, 7, 6], first=2000)]
    write_examples(root / "c", examples, examples[:1])
    return root


def mixture(places, weights):
    return open_sources(config(",".join(f"{places / name}:{w}" for name, w in weights.items())))


def batches(data, count=12, **options):
    defaults = {"batch_size": 4, "sequence_length": T, "packing": "documents", "seed": 5}
    found = training_batches(data, **defaults | options)
    taken = list(itertools.islice(found, count))
    found.close()
    return taken


def test_weights_are_exact_and_add_up_to_one():
    assert parse_sources("a:0.7, b:0.3") == {"a": Fraction(7, 10), "b": Fraction(3, 10)}
    assert parse_sources("a:2,c:d:1") == {"a": Fraction(2, 3), "c:d": Fraction(1, 3)}
    assert parse_sources("a:5") == {"a": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "data.sources has 'a'; expected folder:weight, such as data/a:0.7"),
        ("a:1,", "data.sources has ''; expected folder:weight, such as data/a:0.7"),
        (":1", "data.sources has ':1'; expected folder:weight, such as data/a:0.7"),
        ("a:1,a:2", "data.sources has a twice; add up its weights"),
        ("a:x", "data.sources has the weight 'x' for a; expected a number, such as 0.7"),
        ("a:", "data.sources has the weight '' for a; expected a number, such as 0.7"),
        ("a:1/0", "data.sources has the weight '1/0' for a; expected a number, such as 0.7"),
        ("a:nan", "data.sources has the weight 'nan' for a; expected a number, such as 0.7"),
        ("a:-1,b:2", "data.sources has the weight -1 for a; expected 1e-6 to 1e6"),
        ("a:0", "data.sources has the weight 0 for a; expected 1e-6 to 1e6"),
    ],
)
def test_wrong_weights_are_errors(text, message):
    with pytest.raises(UsageError) as caught:
        parse_sources(text)
    assert str(caught.value) == message


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 400))
def test_sources_take_turns_by_their_weights(weights, count):
    counts = Counter()
    for index in range(count):
        source, number = source_of(index, weights)
        assert number == counts[source], "each example of a source is used, in order"
        counts[source] += 1
    for source, weight in enumerate(weights):
        assert abs(counts[source] - count * weight / sum(weights)) <= len(weights)
    assert source_of(sum(weights) * 10**9, weights)[1] == weights[source_of(0, weights)[0]] * 10**9


def test_examples_of_a_batch_come_from_the_sources_by_weight(places):
    data = mixture(places, {"a": 0.5, "b": 0.25, "c": 0.25})
    assert data.weights == (2, 1, 1)
    for batch in batches(data):
        assert Counter((batch.targets_BT.max(axis=1) // 1000).tolist()) == {0: 2, 1: 1, 2: 1}
        is_example = batch.targets_BT[:, :1] >= 2000
        is_trained = np.where(is_example, batch.targets_BT % 2, batch.segments_BT > 0)
        assert (batch.weights_BT == is_trained).all()


def test_a_source_has_the_order_it_would_have_alone_and_repeats(places):
    both = batches(mixture(places, {"b": 3, "a": 1}), count=20)
    alone = batches(open_sources(config(path=str(places / "b"))), count=15)
    rows = [np.concatenate([batch.inputs_BT for batch in each]) for each in (both, alone)]
    np.testing.assert_array_equal(rows[0][rows[0].max(axis=1) >= 1000], rows[1])


def test_a_mixture_is_a_function_of_seed_and_step(places):
    data = mixture(places, {"a": 0.7, "c": 0.3})
    inputs = np.stack([batch.inputs_BT for batch in batches(data)])
    later = np.stack([batch.inputs_BT for batch in batches(data, count=3, start_step=9)])
    np.testing.assert_array_equal(later, inputs[9:])
    shards = [batches(data, shard_index=index, shard_count=2) for index in range(2)]
    joined = [np.concatenate([a.inputs_BT, b.inputs_BT]) for a, b in zip(*shards)]
    np.testing.assert_array_equal(np.stack(joined), inputs)
    assert not (np.stack([batch.inputs_BT for batch in batches(data, seed=6)]) == inputs).all()


def test_the_fingerprint_covers_all_sources_and_weights(places):
    alone = open_sources(config(path=str(places / "a")))
    assert (
        alone.fingerprint == mixture(places, {"a": 3}).fingerprint == alone.folders[0].fingerprint
    )
    prints = {mixture(places, each).fingerprint for each in ({"a": 1, "b": 2}, {"a": 2, "b": 4})}
    assert len(prints) == 1
    prints |= {mixture(places, each).fingerprint for each in ({"a": 1, "b": 1}, {"a": 1, "c": 2})}
    assert len(prints | {alone.fingerprint}) == 4


def test_validation_is_of_the_sources_that_have_any(places):
    data = mixture(places, {"a": 1, "b": 1, "c": 1})
    assert list(data.validation) == [str(places / "a"), str(places / "c")]
    assert list(mixture(places, {"b": 1}).validation) == [str(places / "b")]


def test_sources_that_do_not_fit_are_errors(places, tmp_path):
    (tmp_path / "other").mkdir()
    write_documents(tmp_path / "empty", [], counting([5]))
    pairs = [(tokens, tokens % 2) for tokens in counting([5, 5])]
    write_examples(tmp_path / "pairs", pairs, kind="preferences")
    a = places / "a"
    with pytest.raises(UserError, match=r"pairs has preferences and .*a has text; preferences are"):
        open_sources(config(f"{a}:1,{tmp_path / 'pairs'}:1"))
    with pytest.raises(UserError, match=r"other has no meta.json; create it with: python prepare"):
        open_sources(config(f"{a}:1,{tmp_path / 'other'}:1"))
    with pytest.raises(UserError, match=r"train split of .*empty has only 0 tokens"):
        batches(open_sources(config(f"{a}:1,{tmp_path / 'empty'}:1")))
    with pytest.raises(UsageError, match=r"data\.path is empty"):
        config(path="")
    assert config("a:1", path="").sources == "a:1"


def test_sources_of_different_tokenizers_are_an_error(places, tmp_path):
    folder = write_documents(tmp_path / "b", counting([9]))
    meta = (tmp_path / "b" / "meta.json").read_text()
    assert isinstance(open_sources(config(f"{places / 'a'}:1,{folder.path}:1")), Sources)
    (tmp_path / "b" / "tokenizer.model").write_bytes(b"other bytes")
    changed = json.loads(meta) | {"tokenizer_sha256": hashlib.sha256(b"other bytes").hexdigest()}
    changed["fingerprint"] = fingerprint(changed)
    (tmp_path / "b" / "meta.json").write_text(json.dumps(changed))
    with pytest.raises(UserError) as caught:
        open_sources(config(f"{places / 'a'}:1,{folder.path}:1"))
    assert str(caught.value) == (
        f"{folder.path} and {places / 'a'} have different tokenizers; prepare one again with"
        f" --tokenizer {places / 'a' / 'tokenizer.model'}"
    )
