"""Half types in NumPy, which has no bfloat16: two bytes, as tests/thread_ranks.py stores them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from thread_ranks import STORAGE


def to_storage(values: NDArray, dtype: str) -> NDArray:
    """Rounded to `dtype` to nearest even, half types by way of float32."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            narrow = values.astype(np.float32) if dtype == "float16" else values
            return narrow.astype(STORAGE[dtype])
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    is_nan = np.isnan(values)
    return np.where(is_nan, 0x7FFF, rounded).astype(np.uint16)


def from_storage(values: NDArray, dtype: str) -> NDArray[np.float64]:
    """Exactly, as float64."""
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float64)
