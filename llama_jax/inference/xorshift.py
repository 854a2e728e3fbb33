"""The sampler of llama2.c, number for number, to reproduce its runs: one sequence, on the host.

The generator is xorshift64* (Vigna 2016). Every sum is float32, one number after the other, as C
computes it when it must not reorder.
"""

import numpy as np

MASK = 2**64 - 1
MIN_TEMPERATURE = 1e-30  # a lower one is 0: logits divided by it would not be finite in float32


class XorshiftSampler:
    """Chooses token after token as `run -t temperature -p top_p -s seed` does."""

    def __init__(self, temperature: float, top_p: float, seed: int):
        """Make a sampler at the start of its random numbers.

        Args:
          temperature: 0 is greedy, and draws no random number.
          top_p: 0 and 1 are off.
          seed: 1 to 2^64 - 1.
        """
        self.temperature = np.float32(temperature if temperature >= MIN_TEMPERATURE else 0)
        self.top_p = np.float32(top_p)
        self.state = seed

    def choose(self, logits_V: np.ndarray) -> int:
        """Return the next token, from logits [V]."""
        logits_V = np.asarray(logits_V, np.float32)
        if self.temperature == 0:
            return int(np.argmax(logits_V))
        probabilities_V = softmax(logits_V / self.temperature)
        self.state = advance(self.state)
        if 0 < self.top_p < 1:
            return choose_from_nucleus(probabilities_V, self.top_p, uniform(self.state))
        return choose_from_all(probabilities_V, uniform(self.state))


def advance(state: int) -> int:
    """Return the state after a state, both in [1, 2^64)."""
    state ^= state >> 12
    state ^= state << 25 & MASK
    return state ^ state >> 27


def uniform(state: int) -> np.float32:
    """Return a state's random number in [0, 1), one of 2^24."""
    output = (state * 0x2545F4914F6CDD1D & MASK) >> 32
    return np.float32(output >> 8) / np.float32(2**24)


def softmax(logits_V: np.ndarray) -> np.ndarray:
    """Return probabilities, float32, added up in order."""
    # By way of float64, for NumPy's float32 exp is further off than C's expf, which hardly ever
    # rounds to the wrong neighbour.
    below_V = (logits_V - logits_V.max()).astype(np.float64)
    powers_V = np.exp(below_V).astype(np.float32)
    return powers_V / np.cumsum(powers_V)[-1]


def choose_from_all(probabilities_V: np.ndarray, point: np.float32) -> int:
    """Return the token whose interval of the cumulative sum holds the point, in [0, 1)."""
    return _first_above(np.cumsum(probabilities_V), point)


def choose_from_nucleus(probabilities_V: np.ndarray, top_p: np.float32, point: np.float32) -> int:
    """Return a token of the most likely ones, through the first that brings their sum above top_p.

    C leaves open how equally likely tokens are ordered; here the lower id comes first. Where top_p
    is so small that C keeps no token at all, this is the most likely one.
    """
    V = len(probabilities_V)
    cutoff = (np.float32(1) - top_p) / np.float32(max(V - 1, 1))
    ids = np.flatnonzero(probabilities_V >= cutoff)
    if not ids.size:
        return int(np.argmax(probabilities_V))
    ids = ids[np.argsort(-probabilities_V[ids], kind="stable")]
    sums = np.cumsum(probabilities_V[ids])
    last = _first_above(sums, top_p)
    return int(ids[_first_above(sums[: last + 1], point * sums[last])])


def _first_above(rising: np.ndarray, bound: np.float32) -> int:
    """Return the index of the first number above a bound, or else the last index."""
    return min(int(np.searchsorted(rising, bound, side="right")), len(rising) - 1)
