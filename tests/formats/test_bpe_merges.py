import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor

from llama_jax.formats import vocabulary as bpe_merges
from llama_jax.formats.vocabulary import Kind, Piece, Vocabulary


def joined(text, merges):
    """The parts that ranked merges leave of a text: always the best, the leftmost of equals."""
    ranks, parts = {pair: rank for rank, pair in enumerate(merges)}, list(text)
    while pairs := [(ranks[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in ranks]:
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def processor(scores):
    """SentencePiece with these pieces; those whose score is None are unused."""
    pieces = [Piece("<unk>", 0.0, Kind.UNKNOWN), Piece("<s>", 0.0, Kind.CONTROL)]
    pieces += [Piece("</s>", 0.0, Kind.CONTROL)]
    pieces += [
        Piece(text, -1e6, Kind.UNUSED) if score is None else Piece(text, score)
        for text, score in scores.items()
    ]
    found = SentencePieceProcessor()
    vocabulary = Vocabulary(pieces=tuple(pieces), adds_space=False)
    found.LoadFromSerializedProto(vocabulary.to_model())
    return found


def test_merges_are_all_splits_of_all_pieces_by_score():
    scores = {"a": -9.0, "b": -8.0, "c": -7.0, "bc": -2.0, "ab": -3.0, "abc": -4.0, "xa": -1.0}
    assert bpe_merges.merges(scores) == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


def test_a_rank_is_that_of_the_merge_that_happens():
    merges = [("a", "b"), ("a", "bc"), ("ab", "c"), ("b", "c"), ("bc", "d")]
    ranks = {"ab": 0, "abc": 2, "bc": 3, "bcd": 4}
    assert bpe_merges.ranks(merges) == ranks
    del ranks["bc"]
    assert bpe_merges.ranks(merges, unreachable=["bc"]) == ranks


def test_unreachable_pieces_have_no_rank():
    # "abc" becomes ab, c; so bc never meets an a that is alone.
    assert bpe_merges.ranks([("a", "b"), ("b", "c"), ("a", "bc")]) == {"ab": 0, "bc": 1}


@st.composite
def merge_lists(draw):
    """Merges of two pieces made before them, in any order, and of some pieces in several ways."""
    pieces, merges = ["a", "b", "▁"], []
    for _ in range(draw(st.integers(1, 14))):
        pair = draw(st.sampled_from(pieces)), draw(st.sampled_from(pieces))
        if len("".join(pair)) <= 6 and pair not in merges:
            merges.append(pair)
            pieces.append("".join(pair))
    return draw(st.permutations(merges)) if draw(st.booleans()) else merges


@settings(max_examples=150, deadline=None)
@given(merge_lists(), st.lists(st.text("ab▁", max_size=24), max_size=6))
def test_scores_from_ranks_encode_as_the_merges_do(merges, texts):
    ranks = bpe_merges.ranks(merges)
    scores = {text: -float(rank) for text, rank in ranks.items()}
    scores |= {"a": -1e5, "b": -2e5, "▁": -3e5}
    unused = {left + right: None for left, right in merges if left + right not in scores}
    sentencepiece = processor(unused | scores)
    for text in [*texts, *unused]:
        assert sentencepiece.encode(text, out_type=str) == joined(text, merges)


@settings(max_examples=150, deadline=None)
@given(merge_lists(), st.text("ab▁", max_size=24), st.randoms(use_true_random=False))
def test_merges_from_scores_encode_as_sentencepiece_does(merges, text, chance):
    order = chance.sample(range(20), 20)
    texts = sorted({left + right for left, right in merges} | {"a", "b", "▁"})
    scores = {text: -float(place) for text, place in zip(texts, order)}
    parts = processor(scores).encode(text, out_type=str)
    assert joined(text, bpe_merges.merges(scores)) == parts


@pytest.mark.parametrize("spaces", [1, 2, 3, 5, 16, 17, 31, 33, 64])
def test_spaces_of_equal_score_are_merged_from_the_left(spaces):
    scores = {"▁" * length: -1e9 for length in range(1, 17)} | {"a": -2.0, "▁a": -1.0}
    for text in ("▁" * spaces, "a" + "▁" * spaces + "a"):
        parts = processor(scores).encode(text, out_type=str)
        assert joined(text, bpe_merges.merges(scores)) == parts


def test_large_vocabularies_are_fast():
    chance = random.Random(0)
    words = {"".join(chance.choices("abcdefgh", k=chance.randrange(2, 9))) for _ in range(32_000)}
    whole = {word[:size] for word in words for size in range(1, 9)}
    scores = {word: -float(place) for place, word in enumerate(sorted(whole)[:32_000])}
    start = time.perf_counter()
    merges = bpe_merges.merges(scores)
    assert len(bpe_merges.ranks(merges)) > 1000
    assert time.perf_counter() - start < 10
