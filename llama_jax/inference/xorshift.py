"""llama2.c's sampler number for number, so that its runs can be told again: one row, on the host.

The generator is xorshift64* (Vigna 2016). Every sum is float32, one number after the other, as C
has it when it is not allowed to reorder. Does not know models or text.
"""

import numpy as np

from llama_jax.errors import finite_number, whole_number

LARGEST_SEED = 2**64 - 1
COLDEST = 1e-30  # a lower temperature is 0: logits divided by it would not be finite in float32


class XorshiftSampler:
    """Chooses token after token as `run -t temperature -p top_p -s seed` does."""

    def __init__(self, temperature: float = 1.0, top_p: float = 0.9, seed: int = 1):
        """A sampler at the start of its random numbers.

        Args:
          temperature: 0 is greedy, and draws no random number.
          top_p: 0 and 1 are off.

        Raises:
          UsageError: naming the argument and its range.
        """
        temperature = finite_number(
            "temperature", temperature, lambda t: t >= 0, "0 (greedy) or more"
        )
        self.temperature = np.float32(temperature if temperature >= COLDEST else 0)
        self.top_p = np.float32(
            finite_number("top_p", top_p, lambda p: 0 <= p <= 1, "0 (off) to 1 (off)")
        )
        self.state = whole_number(  # from 0 the generator never moves
            "seed", seed, lambda s: 1 <= s <= LARGEST_SEED, f"1 to {LARGEST_SEED}"
        )

    def choose(self, logits_V: np.ndarray) -> int:
        """The next token, from logits [V]."""
        logits_V = np.asarray(logits_V, np.float32)
        if self.temperature == 0:
            return int(np.argmax(logits_V))
        probabilities_V = softmax(logits_V / self.temperature)
        self.state = advance(self.state)
        if 0 < self.top_p < 1:
            return choose_from_nucleus(probabilities_V, self.top_p, coin(self.state))
        return choose_from_all(probabilities_V, coin(self.state))


def advance(state: int) -> int:
    """The state after a state, both in [1, 2^64)."""
    state ^= state >> 12
    state ^= state << 25 & LARGEST_SEED
    return state ^ state >> 27


def coin(state: int) -> np.float32:
    """A state's random number in [0, 1), one of 2^24."""
    output = (state * 0x2545F4914F6CDD1D & LARGEST_SEED) >> 32
    return np.float32(output >> 8) / np.float32(2**24)


def softmax(logits_V: np.ndarray) -> np.ndarray:
    """Probabilities, float32, added up in order."""
    # By way of float64, for NumPy's float32 exp is further off than C's expf, which hardly ever
    # rounds to the wrong neighbour.
    below_V = (logits_V - logits_V.max()).astype(np.float64)
    powers_V = np.exp(below_V).astype(np.float32)
    return powers_V / np.cumsum(powers_V)[-1]


def choose_from_all(probabilities_V: np.ndarray, coin: np.float32) -> int:
    """The token in whose stretch of the cumulative sum the coin falls."""
    return _first_above(np.cumsum(probabilities_V), coin)


def choose_from_nucleus(probabilities_V: np.ndarray, top_p: np.float32, coin: np.float32) -> int:
    """The same among the likeliest tokens, through the first that brings their sum above top_p.

    C leaves open how equally likely tokens are ordered; here the lower id comes first. Where top_p
    is so small that C leaves itself no token at all, this is the likeliest.
    """
    V = len(probabilities_V)
    cutoff = (np.float32(1) - top_p) / np.float32(max(V - 1, 1))
    ids = np.flatnonzero(probabilities_V >= cutoff)
    if not ids.size:
        return int(np.argmax(probabilities_V))
    ids = ids[np.argsort(-probabilities_V[ids], kind="stable")]
    sums = np.cumsum(probabilities_V[ids])
    last = _first_above(sums, top_p)
    return int(ids[_first_above(sums[: last + 1], coin * sums[last])])


def _first_above(rising: np.ndarray, bound: np.float32) -> int:
    """The index of the first number above a bound, or else the last index."""
    return min(int(np.searchsorted(rising, bound, side="right")), len(rising) - 1)
