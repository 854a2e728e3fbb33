"""Whether numbers are numbers: a look for NaN and infinity that is quick and copies nothing."""

import numpy as np

EXPONENTS = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}  # all ones: no number
PORTION = 2**20  # elements looked at at once


def is_finite(array: np.ndarray) -> bool:
    """Whether an array of one of the dtypes that weights have holds neither NaN nor infinity."""
    mask = EXPONENTS[array.dtype.name]
    # Order does not matter, so a transposed view is looked at as it lies.
    flat = array.ravel(order="K")
    bits = flat.view(f"uint{8 * array.dtype.itemsize}")
    portions = (bits[start : start + PORTION] for start in range(0, bits.size, PORTION))
    return not any(((portion & mask) == mask).any() for portion in portions)
