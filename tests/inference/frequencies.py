"""A statistical test, without the seconds that importing `scipy.stats` takes."""

import numpy as np
from scipy.special import chdtrc


def are_likely(seen: np.ndarray, expected: np.ndarray, p: float = 1e-3) -> bool:
    """Return whether counts are what one expects, by Pearson's chi-squared test at a level p."""
    return chdtrc(len(seen) - 1, ((seen - expected) ** 2 / expected).sum()) > p
