"""Two ways to say which pieces a text falls into: scores of pieces, and a ranked list of merges.

SentencePiece joins the neighbours whose joint piece scores best; Hugging Face those whose merge
ranks first; both the leftmost of equals. Does not know files, kinds of pieces or ids.

Why ranks can become scores: what happens within the span of a piece does not depend on what is
around it, since nothing is ever joined across its ends. So a piece arises everywhere by the one
merge that makes it of its own text alone, and the rank of that merge is its score. A piece that
its own text does not give can never arise.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence

Pair = tuple[str, str]


def merges(scores: Mapping[str, float]) -> list[Pair]:
    """Every way to join two pieces into a third, best first.

    Of equal scores the longest piece comes first: then a run of spaces, all lengths of which score
    the same in Llama 2, grows from the left like in SentencePiece.
    """
    found = []
    for text, score in scores.items():
        for cut in range(len(text) - 1, 0, -1):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                found.append((-score, -len(text), text, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def ranks(merges: Sequence[Pair], unreachable: Collection[str] = ()) -> dict[str, int]:
    """The rank by which each piece arises, of those that do.

    Args:
      unreachable: pieces that do not arise for another reason.
    """
    by_pair = {pair: rank for rank, pair in enumerate(merges)}
    texts = {left + right for left, right in merges} - set(unreachable)
    arising = {text: _last_rank(text, by_pair) for text in texts}
    return {text: rank for text, rank in arising.items() if rank >= 0}


def _last_rank(text: str, by_pair: Mapping[Pair, int]) -> int:
    """The rank of the merge that joins the whole text, or -1 if it stays in parts."""
    parts, none, rank = list(text), len(by_pair), -1
    while len(parts) > 1:
        found = [by_pair.get(pair, none) for pair in itertools.pairwise(parts)]
        rank = min(found)
        if rank == none:
            return -1
        place = found.index(rank)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return rank
