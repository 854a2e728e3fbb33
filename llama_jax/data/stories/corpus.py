"""The corpus: an endless supply of distinct stories, split for good into train and validation."""

from collections.abc import Iterator
from hashlib import blake2b
from random import Random

from llama_jax.data.stories.grammar import pick, tell
from llama_jax.data.stories.plots import PLOTS

# One story in twenty is kept for validation. The largest counts are far below what the grammar
# can tell, so that they are always reached.
VALIDATION_SHARE = 20
LARGEST_COUNT = {"train": 1_000_000, "validation": 50_000}


def stories(split: str, count: int, seed: int = 0) -> Iterator[str]:
    """Yields `count` different little stories, each a single line of about 80 to 125 words.

    The same arguments give the same stories everywhere. `split` is "train" or "validation": a
    digest of its text decides to which of the two a story belongs, so they never share one,
    whatever the seeds. `count` goes from 0 to 1,000,000 for train and to 50,000 for validation.
    Raises ValueError, before the first story is asked for, when an argument is out of range.
    """
    if split not in LARGEST_COUNT:
        raise ValueError(f"split is {split!r}; expected one of {sorted(LARGEST_COUNT)}")
    if not 0 <= count <= LARGEST_COUNT[split]:
        raise ValueError(f"count is {count}; expected 0 to {LARGEST_COUNT[split]} for {split}")
    return _distinct(split, count, seed)


def _distinct(split: str, count: int, seed: int) -> Iterator[str]:
    """The first `count` stories of `split` in the order of `seed`, none of them twice."""
    # Seeding with text keeps -1 apart from 1; integers would lose their sign.
    random = Random(f"stories {seed}")
    told: set[int] = set()
    while len(told) < count:
        story = tell(pick(PLOTS, random), random)
        digest = int.from_bytes(blake2b(story.encode(), digest_size=8).digest(), "big")
        kept = "train" if digest % VALIDATION_SHARE else "validation"
        if kept == split and digest not in told:
            told.add(digest)
            yield story
