"""CUDA kernels of Adasum, executed by the emulation.

Oracles: exact integers; NumPy in float64 and math.fsum; for bits, the CPU's kernels, which have
tests of their own. What adds up in another order than the CPU is compared within an error bound.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from emulated_kernels import F32, F64, Kernels, Segments, aligned, aligned_copy, kernels
from thread_ranks import DTYPES, STORAGE

__all__ = ["kernels"]

FLOATS = ["float16", "bfloat16", "float32", "float64"]
ITEM = 4096
# Empty, shorter than a vector, odd, around the length of an item, several items.
NUMELS = [5, 8, 0, 1, 4095, 4096, 4097, 12_300, 3, 0]


def doubles_of(array: NDArray, dtype: str) -> NDArray[np.float64]:
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # signalling NaN
        return array.astype(np.float64)


def random(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    """Magnitudes over ten powers of two, on 16 bytes."""
    values = rng.standard_normal(numel) * 2.0 ** rng.integers(-5, 6, numel)
    if dtype == "bfloat16":
        bits = values.astype(np.float32).view(np.uint32) >> 16
        return aligned_copy(bits.astype(np.uint16))
    return aligned_copy(values.astype(dtype))


def integers(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    """Whole numbers from -3 to 3: sums of their products are exact in float32, in any order."""
    values = rng.integers(-3, 4, numel).astype(np.float32)
    if dtype == "bfloat16":
        return aligned_copy((values.view(np.uint32) >> 16).astype(np.uint16))
    return aligned_copy(values.astype(dtype))


def parts(segments: Segments, bounds: tuple[int, int]) -> list[slice]:
    clipped = [(max(o, bounds[0]), min(o + n, bounds[1])) for o, n in segments]
    return [slice(begin, max(begin, end)) for begin, end in clipped]


def ranges_of(segments: Segments, numel: int) -> list[tuple[int, int]]:
    """Everything, nothing, and cuts inside items, on multiples of 16 elements and not."""
    long = segments[7][0]
    return [
        (0, numel),
        (7, 7),
        (16, 17),
        (16, long + ITEM),
        (3, long + ITEM + 3),
        (long + 1, long + 2),
        (long + ITEM - 1, long + 2 * ITEM + 1),
        (numel - 5, numel),
    ]


# ---- items ---------------------------------------------------------------------------------------


def test_items_cover_every_element_of_every_segment_once(kernels: Kernels) -> None:
    segments, _ = testing.lay_out(NUMELS)
    items = kernels.items(segments)
    covered = [(segment, e) for begin, n, segment in items for e in range(begin, begin + n)]
    assert covered == [(s, o + i) for s, (o, n) in enumerate(segments) for i in range(n)]
    assert all(0 < n <= ITEM and begin % 16 == 0 for begin, n, _ in items)


def test_items_in_a_range_are_those_that_meet_it(kernels: Kernels) -> None:
    segments, numel = testing.lay_out(NUMELS)
    items = kernels.items(segments)
    bounds = [*ranges_of(segments, numel), (-5, 0), (numel, numel + 9), (9, 3), (5, 16), (6, 24)]
    for begin, end in bounds:
        meeting = [i for i, (b, n, _) in enumerate(items) if b < end and begin < b + n]
        assert list(kernels.items_in(segments, (begin, end))) == (meeting if begin < end else [])


# ---- pair_stats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulator", [F64, F32])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_stats_of_integers_are_exact(
    kernels: Kernels, dtype: str, accumulator: int, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    lower, upper = integers(rng, numel, dtype), integers(rng, numel, dtype)
    a, b = doubles_of(lower, dtype), doubles_of(upper, dtype)
    for bounds in ranges_of(segments, numel):
        stats = kernels.pair_stats(lower, upper, segments, bounds, dtype, accumulator)
        expected = [[x @ y for x, y in [(a[p], b[p]), (a[p], a[p]), (b[p], b[p])]]
                    for p in parts(segments, bounds)]  # fmt: skip
        assert stats.tolist() == expected, bounds


@pytest.mark.parametrize("accumulator", [F64, F32])
@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_stats_are_within_the_error_of_their_sums(
    kernels: Kernels, dtype: str, accumulator: int, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    lower, upper = random(rng, numel, dtype), random(rng, numel, dtype)
    stats = kernels.pair_stats(lower, upper, segments, (0, numel), dtype, accumulator)
    a, b = doubles_of(lower, dtype), doubles_of(upper, dtype)
    for (offset, count), row in zip(segments, stats, strict=True):
        x, y = a[offset : offset + count], b[offset : offset + count]
        # A term meets at most 129 additions of a lane (its edge included), 5 of a warp, those of
        # the items, and in float64 the rounding of its product in the reference.
        unit = (129 + 5 + count / ITEM + 2) * 2.0**-53
        if accumulator == F32 and dtype != "float64":
            unit += 129 * 2.0**-24
        for value, terms in zip(row, [x * y, x * x, y * y], strict=True):
            assert abs(value - math.fsum(terms)) <= unit * math.fsum(abs(terms))


def test_two_tensors_in_one_buffer_do_not_mix(kernels: Kernels) -> None:
    segments, numel = testing.lay_out([5, 8])
    assert segments == [(0, 5), (16, 8)]
    lower = aligned(numel, np.float32)
    lower[:] = np.nan  # padding is not read
    lower[0:5], lower[16:24] = 1, 2
    stats = kernels.pair_stats(lower, lower, segments, (0, numel))
    assert stats.tolist() == [[5, 5, 5], [32, 32, 32]]


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e18, 3e38])
def test_pair_stats_of_float32_neither_under_nor_overflow(kernels: Kernels, value: float) -> None:
    count = 40
    vector = aligned(count, np.float32)
    vector[:] = value
    stats = kernels.pair_stats(vector, vector, [(0, count)], (0, count))
    square = float(vector[0]) ** 2  # exact: 48 bits
    assert stats[0] == pytest.approx(count * square, rel=count * 2.0**-53, abs=0)


def test_the_float32_accumulator_loses_squares_of_tiny_numbers(kernels: Kernels) -> None:
    vector = aligned(40, np.float32)
    vector[:] = 1e-30  # its square is below the smallest subnormal, 1.4e-45
    stats = kernels.pair_stats(vector, vector, [(0, 40)], (0, 40), accumulator=F32)
    assert stats.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("accumulator", [F64, F32])
def test_nan_and_infinity_stay_in_their_segment(
    kernels: Kernels, dtype: str, accumulator: int, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out([4100, 20, 9000])
    lower, upper = integers(rng, numel, dtype), integers(rng, numel, dtype)
    bad = {"float16": (0x7E00, 0x7C00), "bfloat16": (0x7FC0, 0x7F80)}.get(dtype)
    nan, inf = np.array(bad, np.uint16).view(lower.dtype) if bad else np.array(
        [np.nan, np.inf], dtype)  # fmt: skip
    lower[4098], upper[segments[2][0]] = nan, inf
    stats = kernels.pair_stats(lower, upper, segments, (0, numel), dtype, accumulator)
    assert np.isnan(stats[0, :2]).all()
    assert np.isfinite(stats[0, 2])
    assert np.isfinite(stats[1]).all()
    assert not np.isfinite(stats[2, 2])
    assert np.isfinite(stats[2, 1])


def test_a_long_segment_has_thousands_of_items(kernels: Kernels) -> None:
    # More than 2048 items: 1024 threads add slots. Oracle: exact integers.
    numel = 2100 * ITEM + 5
    lower = np.tile(np.arange(-7, 8, dtype=np.float32), numel // 15 + 1)[:numel]
    lower = aligned_copy(lower)
    stats = kernels.pair_stats(lower, lower, [(0, numel)], (0, numel))
    assert stats.tolist() == [[float((lower.astype(np.int64) ** 2).sum())] * 3]


@pytest.mark.parametrize("accumulator", [F64, F32])
@pytest.mark.parametrize("dtype", FLOATS)
def test_repeats_and_other_places_in_memory_give_the_same_bits(
    kernels: Kernels, dtype: str, accumulator: int, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out([100_003, 17])
    lower, upper = random(rng, numel, dtype), random(rng, numel, dtype)
    first = kernels.pair_stats(lower, upper, segments, (0, numel), dtype, accumulator)
    for _ in range(2):
        a, b = aligned_copy(lower), aligned_copy(upper)
        again = kernels.pair_stats(a, b, segments, (0, numel), dtype, accumulator)
        assert reference.same_bits(first, again)


# ---- pair_combine --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", ["another array", "lower", "upper"])
def test_pair_combine_has_the_bits_of_the_cpu(
    kernels: Kernels, dtype: str, target: str, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    for bounds in ranges_of(segments, numel):
        lower, upper = random(rng, numel, dtype), random(rng, numel, dtype)
        stats = kernels.pair_stats(lower, upper, segments, (0, numel), dtype)
        other = random(rng, numel, dtype)
        out = {"another array": other, "lower": lower, "upper": upper}[target]
        expected = out.copy()
        operands = lower.copy(), upper.copy()
        code, flat = DTYPES[dtype], [float(value) for value in stats.ravel()]
        testing.pair_combine(code, *operands, segments, bounds, flat, expected)
        kernels.pair_combine(lower, upper, segments, bounds, stats, out, dtype)
        assert reference.same_bits(out, expected), bounds  # outside the range and in padding, too


def test_pair_combine_of_a_zero_vector_is_the_other_one(kernels: Kernels) -> None:
    zero, one = aligned_copy(np.zeros(9, np.float32)), aligned_copy(np.arange(9.0, dtype="f"))
    stats = kernels.pair_stats(zero, one, [(0, 9)], (0, 9))
    out = aligned(9, np.float32)
    kernels.pair_combine(zero, one, [(0, 9)], (0, 9), stats, out)
    assert out.tolist() == one.tolist()


# ---- leaf squares --------------------------------------------------------------------------------


@pytest.mark.parametrize("are_leaves", [(False, False), (True, False), (False, True), (True, True)])
def test_leaf_squares_become_orthogonality(
    kernels: Kernels, are_leaves: tuple[bool, bool], rng: np.random.Generator
) -> None:
    # Oracle: the formula of docs/algorithms.md, "Orthogonality", in float64.
    count = 300
    squares = rng.uniform(1, 2, (count, 2))
    dots = rng.uniform(-1, 1, count)
    stats = np.column_stack([dots, squares])
    carried = rng.uniform(1, 2, count)
    of_node, orthogonality = kernels.collect_leaf_squares(carried, stats, are_leaves)
    sums = carried + squares[:, 0] * are_leaves[0] + squares[:, 1] * are_leaves[1]
    assert of_node == pytest.approx(sums, rel=2.0**-51)
    l, u = 1 - dots / (2 * squares[:, 0]), 1 - dots / (2 * squares[:, 1])  # noqa: E741
    norm = l * l * squares[:, 0] + u * u * squares[:, 1] + 2 * l * u * dots
    assert orthogonality == pytest.approx(norm / sums, rel=1e-13)


def test_leaf_squares_are_carried_or_zero(kernels: Kernels) -> None:
    of_node, carried = np.arange(5.0), np.full(5, np.nan)
    kernels.contribute_leaf_squares(of_node, carried, True)
    assert carried.tolist() == of_node.tolist()
    kernels.contribute_leaf_squares(of_node, carried, False)
    assert reference.same_bits(carried, np.zeros(5))


# ---- launches ------------------------------------------------------------------------------------


def test_thousands_of_tensors_are_two_launches_and_no_wait(kernels: Kernels) -> None:
    segments, numel = testing.lay_out([3] * 2000)
    vector = aligned_copy(np.ones(numel, np.float32))
    kernels.copy(vector, vector, 0)  # its only wait is that of the interface
    before = kernels.kernel_runs(), kernels.host_waits()
    kernels.copy(vector, vector, 0)
    waits = kernels.host_waits() - before[1]
    stats = kernels.pair_stats(vector, vector, segments, (0, numel))
    assert kernels.kernel_runs() - before[0] == 2
    assert kernels.host_waits() - before[1] == 2 * waits
    assert (stats == 3).all()
    kernels.pair_combine(vector, vector, segments, (0, numel), stats, vector)
    assert kernels.kernel_runs() - before[0] == 3
    assert kernels.host_waits() - before[1] == 3 * waits


def test_nothing_to_do_is_legal(kernels: Kernels) -> None:
    empty = aligned(0, np.float32)
    assert kernels.pair_stats(empty, empty, [], (0, 0)).size == 0
    stats = kernels.pair_stats(empty, empty, [(0, 0), (0, 0)], (0, 0))
    assert reference.same_bits(stats, np.zeros((2, 3)))
    before = kernels.kernel_runs()
    kernels.pair_combine(empty, empty, [(0, 0)], (0, 0), np.zeros((1, 3)), empty)
    kernels.copy(empty, empty, 0)
    assert kernels.kernel_runs() == before


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_adasum_of_other_types_is_refused_by_name(kernels: Kernels, dtype: str) -> None:
    array = np.zeros(4, STORAGE[dtype])
    rule = f"dtype must be one that it is defined for, got {dtype}"
    with pytest.raises(ValueError, match=f"pair_stats: {rule}"):
        kernels.pair_stats(array, array, [(0, 4)], (0, 4), dtype)
    with pytest.raises(ValueError, match=f"pair_combine: {rule}"):
        kernels.pair_combine(array, array, [(0, 4)], (0, 4), np.zeros((1, 3)), array, dtype)
