"""Oracles, written from docs/algorithms.md and not from the C++: slow, obvious, in NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

Tree: TypeAlias = "int | tuple[Tree, Tree]"

LANES = 16
SMALLEST_SQUARED_NORM = 2.0**-511  # sqrt(DBL_MIN)
DOUBLE_ROUNDING = 2.0**-53


def adasum_tree(size: int) -> Tree:
    """The tree over ranks as nested pairs (lower, upper)."""
    core = 1
    while 2 * core <= size:
        core *= 2
    extra = size - core
    folded: list[Tree] = [(2 * i, 2 * i + 1) for i in range(extra)]
    nodes: list[Tree] = [*folded, *range(2 * extra, size)]
    distance = 1
    while distance < core:
        nodes = [(nodes[i & ~distance], nodes[i | distance]) for i in range(core)]
        distance *= 2
    return nodes[0]


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[0]) + leaves(tree[1])


def weights(tree: Tree, weight: float = 1.0) -> dict[int, float]:
    """2^-depth of every rank: what Adasum of parallel vectors weighs it with."""
    if isinstance(tree, int):
        return {tree: weight}
    return weights(tree[0], weight / 2) | weights(tree[1], weight / 2)


def norm(vector: NDArray) -> float:
    """The 2-norm, in long double."""
    wide = vector.astype(np.longdouble).ravel()
    return np.sqrt(np.sum(wide * wide, dtype=np.longdouble))


def adasum(vectors: Sequence[NDArray]) -> NDArray:
    """Adasum of one tensor, rank by rank, in long double."""
    return adasum_with_bound(vectors)[0]


def adasum_with_bound(vectors: Sequence[NDArray]) -> tuple[NDArray, float]:
    """Adasum in long double, and how far (2-norm) an implementation may be from it.

    The implementation keeps vectors of n elements in their dtype with unit roundoff u and spacing
    h of subnormals, does all else in double with unit roundoff d = 2^-53, and adds products in 16
    lanes on each of P ranks, so that a product meets at most k = n/16 + 5 + P roundings.

    For a node w = f(a, b) = a + b - Pa b / 2 - Pb a / 2, Pa the projector onto a, whose operands
    are wrong by Ea and Eb:  |Pa' - Pa| = sin(angle) <= min(1, Ea / |a|),  therefore
        |f(a', b') - f(a, b)| <= 3/2 (Ea + Eb) + (min(1, Ea/|a|) |b| + min(1, Eb/|b|) |a|) / 2.
    A share is wrong by (k + 2) d (1 + |b| / |a|), products and sum in double by 3 d (|a| + |b|)
    together, the last rounding by u |w'| + h sqrt(n), and 2 d are for this function:
        Ew = the line above + (2 k + 9) d (|a'| + |b'|) + u |w'| + h sqrt(n).
    """
    kind = np.finfo(vectors[0].dtype)
    unit = float(kind.epsneg) if kind.dtype == np.float32 else 0.0  # doubles round no more
    spacing = np.longdouble(kind.smallest_subnormal)
    count = vectors[0].size
    roundings = count / LANES + 5 + len(vectors)

    def visit(tree: Tree) -> tuple[NDArray, np.longdouble]:
        if isinstance(tree, int):
            return vectors[tree].astype(np.longdouble), np.longdouble(0)
        (a, a_error), (b, b_error) = visit(tree[0]), visit(tree[1])
        dot = np.sum(a * b, dtype=np.longdouble)
        a_norm, b_norm = norm(a), norm(b)
        value = _share(dot, a_norm**2) * a + _share(dot, b_norm**2) * b
        error = 1.5 * (a_error + b_error)
        error += (_angle(a_error, a_norm) * b_norm + _angle(b_error, b_norm) * a_norm) / 2
        error += (2 * roundings + 9) * DOUBLE_ROUNDING * (a_norm + b_norm + a_error + b_error)
        error += unit * (norm(value) + error) + spacing * np.sqrt(count)
        return value, error

    return visit(adasum_tree(len(vectors)))


def _share(dot: np.longdouble, squared_norm: np.longdouble) -> np.longdouble:
    if squared_norm < SMALLEST_SQUARED_NORM:
        return np.longdouble(1)
    return 1 - dot / (2 * squared_norm)


def _angle(error: np.longdouble, length: np.longdouble) -> np.longdouble:
    return np.longdouble(error > 0) if error >= length else error / length


def add_in_lanes(terms: NDArray[np.float64]) -> np.float64:
    """The sum of 16 virtual lanes, added pairwise: the bits that the kernels promise."""
    rows = -(-terms.size // LANES)
    table = np.zeros((rows + 1, LANES))  # a first row of zeros: the lanes start at +0
    table.ravel()[LANES : LANES + terms.size] = terms
    lanes = np.add.accumulate(table, axis=0)[-1]
    while lanes.size > 1:
        lanes = lanes[: lanes.size // 2] + lanes[lanes.size // 2 :]
    return lanes[0]


def pair_stats(lower: NDArray, upper: NDArray) -> list[np.float64]:
    """<lower, upper>, |lower|^2, |upper|^2 of one part, bit for bit."""
    a, b = lower.astype(np.float64), upper.astype(np.float64)
    return [add_in_lanes(a * b), add_in_lanes(a * a), add_in_lanes(b * b)]


def share(dot: float, squared_norm: float) -> np.float64:
    """What Adasum keeps of a vector, in double, bit for bit."""
    if squared_norm < SMALLEST_SQUARED_NORM:
        return np.float64(1)
    return np.float64(1) - np.float64(0.5) * (np.float64(dot) / np.float64(squared_norm))


def pair_combine(lower: NDArray, upper: NDArray, stats: Sequence[float]) -> NDArray:
    """Both shares times their vectors in double, added, rounded once: bit for bit."""
    a = share(stats[0], stats[1]) * lower.astype(np.float64)
    b = share(stats[0], stats[2]) * upper.astype(np.float64)
    return (a + b).astype(lower.dtype)


def scale(values: NDArray, factor: float) -> NDArray:
    """Multiplied in double, rounded once."""
    return (values.astype(np.float64) * factor).astype(values.dtype)


def sum_in_rank_order(vectors: Sequence[NDArray], divisor: float = 1.0) -> NDArray:
    """Added one after the other in their dtype, then divided in double: bit for bit."""
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total = total + vector
    if divisor != 1.0:
        total = (total.astype(np.float64) / divisor).astype(total.dtype)
    return total


def same_bits(left: NDArray, right: NDArray, dtype: DTypeLike | None = None) -> bool:
    """Equal shapes, dtypes and bytes: tells 0.0 from -0.0, and NaN equals itself."""
    expected = np.dtype(dtype or left.dtype)
    return (
        left.dtype == right.dtype == expected
        and left.shape == right.shape
        and left.tobytes() == right.tobytes()
    )
