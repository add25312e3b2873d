"""CPU kernels, bit for bit. Oracle: 16 lanes in NumPy float64, see tests/reference.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from thread_ranks import DTYPES, STORAGE

FLOATS = ["float32", "float64"]
GUARD = 16  # elements before and behind that a kernel must not touch

Segments = list[tuple[int, int]]


def numbers(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    """Values whose sums depend on the order: magnitudes over ten powers of two."""
    return (rng.standard_normal(numel) * 2.0 ** rng.integers(-5, 6, numel)).astype(dtype)


def stats_of(
    lower: NDArray, upper: NDArray, segments: Segments, bounds: tuple[int, int]
) -> NDArray[np.float64]:
    flat = testing.pair_stats(DTYPES[lower.dtype.name], lower, upper, segments, bounds)
    return np.array(flat).reshape(len(segments), 3)


def expected_stats(
    lower: NDArray, upper: NDArray, segments: Segments, bounds: tuple[int, int]
) -> NDArray[np.float64]:
    rows = []
    for offset, numel in segments:
        begin, end = max(offset, bounds[0]), min(offset + numel, bounds[1])
        part = slice(begin, max(begin, end))
        rows.append(reference.pair_stats(lower[part], upper[part]))
    return np.array(rows).reshape(len(segments), 3)


def combined(
    lower: NDArray,
    upper: NDArray,
    segments: Segments,
    bounds: tuple[int, int],
    stats: NDArray[np.float64],
    out: NDArray,
) -> NDArray:
    flat = [float(value) for value in stats.ravel()]
    testing.pair_combine(DTYPES[lower.dtype.name], lower, upper, segments, bounds, flat, out)
    return out


# ---- pair_stats ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_stats_has_the_bits_of_sixteen_lanes(dtype: str, rng: np.random.Generator) -> None:
    for numel in [*range(101), 1000, 4095, 4096, 100_003]:
        lower, upper = numbers(rng, numel, dtype), numbers(rng, numel, dtype)
        stats = stats_of(lower, upper, [(0, numel)], (0, numel))
        assert reference.same_bits(stats, np.array([reference.pair_stats(lower, upper)])), numel


@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_stats_does_not_depend_on_alignment(dtype: str, rng: np.random.Generator) -> None:
    numel = 77
    lower, upper = numbers(rng, numel, dtype), numbers(rng, numel, dtype)
    expected = np.array([reference.pair_stats(lower, upper)])
    for left in range(17):
        for right in range(17):
            a, b = np.zeros(numel + 16, dtype), np.zeros(numel + 16, dtype)
            a[left : left + numel], b[right : right + numel] = lower, upper
            views = a[left : left + numel], b[right : right + numel]
            stats = stats_of(*views, [(0, numel)], (0, numel))
            assert reference.same_bits(stats, expected), (left, right)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_stats_clips_segments_to_the_range(dtype: str, rng: np.random.Generator) -> None:
    segments = [(0, 5), (16, 0), (16, 40), (64, 1), (80, 16), (96, 33), (129, 0)]
    numel = 129
    lower, upper = numbers(rng, numel, dtype), numbers(rng, numel, dtype)
    for begin in range(0, numel + 1, 3):
        for end in range(begin, numel + 1, 5):
            stats = stats_of(lower, upper, segments, (begin, end))
            expected = expected_stats(lower, upper, segments, (begin, end))
            assert reference.same_bits(stats, expected), (begin, end)


def test_pair_stats_of_nothing_is_zero() -> None:
    empty = np.empty(0, np.float32)
    assert stats_of(empty, empty, [], (0, 0)).size == 0
    assert reference.same_bits(stats_of(empty, empty, [(0, 0), (0, 0)], (0, 0)), np.zeros((2, 3)))


def test_pair_stats_reads_only_what_lies_in_segment_and_range() -> None:
    poisoned = np.full(64, np.nan, np.float32)
    poisoned[19:30] = 2.0
    stats = stats_of(poisoned, poisoned, [(16, 14)], (19, 64))
    assert reference.same_bits(stats, np.full((1, 3), 4.0 * 11))


@pytest.mark.parametrize("value", [1e-45, 1e-30, 1e18, 3e38])
def test_pair_stats_of_float32_neither_under_nor_overflows(value: float) -> None:
    vector = np.full(40, value, np.float32)
    square = float(vector[0]) ** 2  # exact: 48 bits
    stats = stats_of(vector, vector, [(0, 40)], (0, 40))
    assert np.isfinite(stats).all()
    assert reference.same_bits(stats, np.array([reference.pair_stats(vector, vector)]))
    assert stats[0, 0] == pytest.approx(40 * square, rel=40 * 2.0**-53)


# ---- pair_combine --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("target", ["another array", "lower", "upper"])
def test_pair_combine_has_the_bits_of_one_rounding(
    dtype: str, target: str, rng: np.random.Generator
) -> None:
    segments = [(0, 5), (16, 0), (16, 40), (64, 1), (80, 16), (96, 33)]
    numel = 129
    for bounds in [(0, 129), (0, 0), (3, 90), (17, 18), (60, 80), (100, 129)]:
        lower, upper = numbers(rng, numel, dtype), numbers(rng, numel, dtype)
        # Statistics of whole segments: what lies outside the range counts.
        stats = expected_stats(lower, upper, segments, (0, numel))
        operands = lower.copy(), upper.copy()
        out = {
            "another array": numbers(rng, numel, dtype),
            "lower": operands[0],
            "upper": operands[1],
        }[target]
        expected = out.copy()
        for (offset, count), row in zip(segments, stats, strict=True):
            begin, end = max(offset, bounds[0]), min(offset + count, bounds[1])
            if begin < end:
                part = slice(begin, end)
                expected[part] = reference.pair_combine(lower[part], upper[part], row)
        combined(*operands, segments, bounds, stats, out)
        assert reference.same_bits(out, expected), bounds  # untouched outside the segments too


def test_pair_combine_tells_lower_from_upper() -> None:
    lower, upper = np.array([4.0, 0.0], np.float32), np.array([1.0, 1.0], np.float32)
    stats = np.array([[4.0, 16.0, 2.0]])
    # share of lower 1 - 4/32 = 7/8, of upper 1 - 4/4 = 0
    out = combined(lower, upper, [(0, 2)], (0, 2), stats, np.empty(2, np.float32))
    assert out.tolist() == [3.5, 0.0]


# ---- adasum_share --------------------------------------------------------------------------------

SMALLEST = 2.0**-511


@pytest.mark.parametrize(
    ("dot", "squared_norm", "expected"),
    [
        (0.0, 0.0, 1.0),  # a zero vector
        (0.0, 5e-324, 1.0),  # whose square is subnormal
        (1.0, np.nextafter(SMALLEST, 0.0), 1.0),  # the last that counts as zero
        (SMALLEST, SMALLEST, 0.5),  # the first that does not
        (SMALLEST / 2, SMALLEST, 0.75),
        (-3.0, 2.0, 1.75),
        (4.0, 2.0, 0.0),
        (1.0, np.finfo(float).max, 1.0 - 0.5 / np.finfo(float).max),
        (np.finfo(float).max, np.finfo(float).max, 0.5),
        (1.0, np.inf, 1.0),
    ],
)
def test_adasum_share_is_one_minus_half_the_projection(
    dot: float, squared_norm: float, expected: float
) -> None:
    assert testing.adasum_share(dot, squared_norm) == expected


@pytest.mark.parametrize(
    ("dot", "squared_norm"),
    [(np.nan, 1.0), (1.0, np.nan), (np.inf, np.inf), (np.nan, np.inf), (np.nan, np.nan)],
)
def test_adasum_share_of_statistics_that_are_not_numbers_is_none(
    dot: float, squared_norm: float
) -> None:
    assert np.isnan(testing.adasum_share(dot, squared_norm))


def test_adasum_share_agrees_with_the_reference(rng: np.random.Generator) -> None:
    for _ in range(2000):
        dot, squared = rng.standard_normal() * 10.0 ** rng.integers(-160, 150, 2)
        squared = abs(squared)
        assert testing.adasum_share(dot, squared) == reference.share(dot, squared)


# ---- pack and unpack -----------------------------------------------------------------------------


def any_bits(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    """Arbitrary bytes: moving must keep NaN payloads, signed zeros and subnormals."""
    storage = STORAGE[dtype]
    if dtype == "bool":
        return rng.integers(0, 2, numel).astype(bool)
    return np.frombuffer(rng.bytes(numel * storage.itemsize), storage)


def packed(
    tensors: list[NDArray], segments: Segments, numel: int, dtype: str, scale: float = 1.0
) -> NDArray:
    """The fused buffer, and around it the proof that nothing else was written."""
    width = STORAGE[dtype].itemsize
    memory = np.full((numel + 2 * GUARD) * width, 0xA5, np.uint8)
    fused = memory[GUARD * width : (GUARD + numel) * width]
    testing.pack(DTYPES[dtype], tensors, segments, scale, fused, numel)
    assert (memory[: GUARD * width] == 0xA5).all()
    assert (memory[(GUARD + numel) * width :] == 0xA5).all()
    return fused.view(STORAGE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_lays_tensors_out_and_zeroes_the_padding(dtype: str, rng: np.random.Generator) -> None:
    numels = [40, 0, 1, 16, 17, 0]
    segments, numel = testing.lay_out(numels)
    numel += 3  # padding behind the last tensor
    tensors = [any_bits(rng, count, dtype) for count in numels]
    expected = np.zeros(numel, STORAGE[dtype])
    for (offset, count), tensor in zip(segments, tensors, strict=True):
        expected[offset : offset + count] = tensor
    assert reference.same_bits(packed(tensors, segments, numel, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_writes_the_tensors_and_nothing_else(dtype: str, rng: np.random.Generator) -> None:
    numels = [40, 0, 1, 16, 17, 0]
    segments, numel = testing.lay_out(numels)
    fused = any_bits(rng, numel, dtype)
    guarded = [np.full(count + 2 * GUARD, 1, STORAGE[dtype]) for count in numels]
    views = [memory[GUARD : memory.size - GUARD] for memory in guarded]
    testing.unpack(DTYPES[dtype], fused, segments, 1.0, views)
    for (offset, count), memory in zip(segments, guarded, strict=True):
        expected = np.full(count + 2 * GUARD, 1, STORAGE[dtype])
        expected[GUARD : GUARD + count] = fused[offset : offset + count]
        assert reference.same_bits(memory, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1 / 3, -2.0, 0.0, 1e-20, 1e18])
def test_pack_and_unpack_scale_in_double_and_round_once(
    dtype: str, scale: float, rng: np.random.Generator
) -> None:
    numels = [40, 0, 1, 33]
    segments, numel = testing.lay_out(numels)
    tensors = [numbers(rng, count, dtype) for count in numels]
    fused = packed(tensors, segments, numel, dtype, scale)
    results = [np.empty(count, dtype) for count in numels]
    testing.unpack(DTYPES[dtype], fused, segments, scale, results)
    for (offset, count), tensor, result in zip(segments, tensors, results, strict=True):
        once = reference.scale(tensor, scale)
        assert reference.same_bits(fused[offset : offset + count], once)
        assert reference.same_bits(result, reference.scale(once, scale))


def test_bool_is_moved_and_not_scaled() -> None:
    tensor = np.ones(3, bool)
    with pytest.raises(
        ValueError, match="pack: dtype must be one that it is defined for, got bool"
    ):
        testing.pack(DTYPES["bool"], [tensor], [(0, 3)], 0.5, np.empty(3, bool), 3)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64"])
def test_integers_are_scaled_in_double_truncated_and_kept_in_range(dtype: str) -> None:
    limits = np.iinfo(dtype)
    tensor = np.array([limits.min, limits.min // 3, 0, 1, 5, 7, limits.max // 3, limits.max], dtype)
    for scale in [0.5, 1 / 3, 2.0, -1.0, 0.99]:
        out = np.empty(tensor.size, dtype)
        testing.pack(DTYPES[dtype], [tensor], [(0, tensor.size)], scale, out, tensor.size)
        for value, result in zip(tensor, out, strict=True):
            exact = int(np.trunc(np.float64(value) * scale))
            assert int(result) == min(max(exact, limits.min), limits.max), (value, scale)


# ---- sum -----------------------------------------------------------------------------------------


def summed(inputs: list[NDArray], divisor: float, out: NDArray) -> NDArray:
    testing.reduce(DTYPES[out.dtype.name], 0, inputs, divisor, out, out.size)
    return out


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("divisor", [1.0, 3.0, 0.1])
def test_sum_adds_in_the_order_of_its_inputs_and_then_divides(
    dtype: str, divisor: float, rng: np.random.Generator
) -> None:
    for numel in [0, 1, 15, 16, 17, 1023, 1024, 1025, 5000]:
        for count in [1, 2, 3, 8]:
            inputs = [numbers(rng, numel, dtype) for _ in range(count)]
            expected = reference.sum_in_rank_order(inputs, divisor)
            memory = np.full(numel + 2 * GUARD, 7.0, dtype)
            out = memory[GUARD : GUARD + numel]
            assert reference.same_bits(summed(inputs, divisor, out), expected)
            assert (memory[:GUARD] == 7.0).all()
            assert (memory[GUARD + numel :] == 7.0).all()


def test_the_order_of_a_sum_is_visible_in_its_bits() -> None:
    big, small = np.full(3, 2.0**24, np.float32), np.ones(3, np.float32)
    out = np.empty(3, np.float32)
    assert summed([big, small, small], 1.0, out).tolist() == [2.0**24] * 3
    assert summed([small, small, big], 1.0, out).tolist() == [2.0**24 + 2] * 3


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_sum_may_write_over_one_of_its_inputs(
    dtype: str, place: int, rng: np.random.Generator
) -> None:
    inputs = [numbers(rng, 3000, dtype) for _ in range(3)]
    expected = reference.sum_in_rank_order(inputs, 3.0)
    assert reference.same_bits(summed(inputs, 3.0, inputs[place]), expected)


def test_sum_of_no_inputs_leaves_the_output_alone() -> None:
    assert summed([], 1.0, np.full(5, 9.0, np.float32)).tolist() == [9.0] * 5


@pytest.mark.parametrize("kernel", ["pair_stats", "pair_combine"])
@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_adasum_of_other_types_is_refused_by_name(kernel: str, dtype: str) -> None:
    array = np.zeros(4, STORAGE[dtype])
    code = DTYPES[dtype]
    calls: dict[str, Any] = {
        "pair_stats": lambda: testing.pair_stats(code, array, array, [(0, 4)], (0, 4)),
        "pair_combine": lambda: testing.pair_combine(
            code, array, array, [(0, 4)], (0, 4), [0.0] * 3, array
        ),
    }
    message = f"{kernel}: dtype must be one that it is defined for, got {dtype}"
    with pytest.raises(ValueError, match=message):
        calls[kernel]()
