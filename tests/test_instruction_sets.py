"""All instruction sets that this CPU has give the same bits. Oracle: NumPy, and the baseline.

The reference rounds as docs/algorithms.md says: half types through float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from thread_ranks import DTYPES, STORAGE

ISAS = testing.isas()
FLOATS = ["float16", "bfloat16", "float32", "float64"]
INTEGERS = ["uint8", "int8", "int16", "int32", "int64"]
SUM, MIN, MAX, PRODUCT = range(4)
NUMELS = [0, 1, 7, 15, 16, 17, 31, 33, 100, 511, 512, 513, 5000]


def doubles_of(array: NDArray, dtype: str) -> NDArray[np.float64]:
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def rounded(values: NDArray, dtype: str) -> NDArray:
    """From double, by way of float32 for half types."""
    if dtype == "bfloat16":
        single = torch.from_numpy(np.asarray(values, np.float64).astype(np.float32))
        return single.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    if dtype == "float16":
        return values.astype(np.float32).astype(np.float16)
    return values.astype(dtype)


def values(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    if dtype in INTEGERS:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, numel, dtype, endpoint=True)
    if dtype == "bool":
        return rng.integers(0, 2, numel).astype(bool)
    return rounded(rng.standard_normal(numel) * 2.0 ** rng.integers(-5, 6, numel), dtype)


def test_there_is_more_than_the_baseline_where_the_cpu_has_more() -> None:
    assert ISAS[0] == "baseline"
    with pytest.raises(ValueError, match="isa must be one that this CPU has, got sse9"):
        testing.reduce(DTYPES["float32"], SUM, [], 1.0, np.empty(0, np.float32), 0, isa="sse9")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_pair_kernels(isa: str, dtype: str, rng: np.random.Generator) -> None:
    for numel in NUMELS:
        lower, upper = values(rng, numel, dtype), values(rng, numel, dtype)
        a, b = doubles_of(lower, dtype), doubles_of(upper, dtype)
        segments, bounds = [(0, numel)], (0, numel)
        code = DTYPES[dtype]
        stats = testing.pair_stats(code, lower, upper, segments, bounds, isa=isa)
        assert reference.same_bits(np.array(stats), np.array(reference.pair_stats(a, b))), numel
        out = np.empty_like(lower)
        testing.pair_combine(code, lower, upper, segments, bounds, stats, out, isa=isa)
        shares = reference.share(stats[0], stats[1]), reference.share(stats[0], stats[2])
        assert reference.same_bits(out, rounded(shares[0] * a + shares[1] * b, dtype)), numel


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 13, 16])
def test_peer_kernels(isa: str, dtype: str, count: int, rng: np.random.Generator) -> None:
    code, c = DTYPES[dtype], [float(weight) for weight in rng.standard_normal(count)]
    lower, upper = 0b0101010101010101 & (1 << count) - 1, 1 << count - 1
    for numel in [0, 1, 15, 17, 255, 257, 1000]:
        vectors = [values(rng, numel, dtype) for _ in range(count)]
        wide = [doubles_of(vector, dtype) for vector in vectors]
        gram = [
            reference.add_in_lanes(wide[i] * wide[j]) for i in range(count) for j in range(i, count)
        ]
        found = testing.gram(code, vectors, numel, isa=isa)
        assert reference.same_bits(np.array(found), np.array(gram)), numel
        out, combined = np.empty_like(vectors[0]), c[0] * wide[0]
        for weight, vector in zip(c[1:], wide[1:], strict=True):
            combined = combined + weight * vector
        testing.weighted_sum(code, vectors, numel, c, out, isa=isa)
        assert reference.same_bits(out, rounded(combined, dtype)), numel
        nodes = [np.zeros(numel), np.zeros(numel)]
        for k in range(count):
            for node, leaves in enumerate((lower, upper)):
                if leaves >> k & 1:
                    nodes[node] = nodes[node] + c[k] * wide[k]
        stats = testing.node_stats(code, vectors, numel, c, lower, upper, isa=isa)
        assert reference.same_bits(np.array(stats), np.array(reference.pair_stats(*nodes))), numel


def summed(inputs: list[NDArray], dtype: str, divisor: float) -> NDArray:
    if dtype in INTEGERS:
        total = sum(array.astype(object) for array in inputs)
        if divisor == 1.0:
            wrapped = [int(value) & (2**64 - 1) for value in np.atleast_1d(total)]
            return np.array(wrapped, np.uint64).astype(dtype)
        quotients = [int(int(value) / divisor) for value in np.atleast_1d(total)]
        limits = np.iinfo(dtype)  # more inputs than the divisor: saturates
        return np.clip(np.array(quotients, object), limits.min, limits.max).astype(dtype)
    wide = np.float64 if dtype == "float64" else np.float32
    total = doubles_of(inputs[0], dtype).astype(wide)
    for array in inputs[1:]:
        total = total + doubles_of(array, dtype).astype(wide)
    return rounded(total.astype(np.float64) / divisor, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("divisor", [1.0, 3.0, 4.0])
def test_sums_and_averages(isa: str, dtype: str, divisor: float, rng: np.random.Generator) -> None:
    for numel in NUMELS[1:]:
        for count in [1, 2, 3, 5]:
            inputs = [values(rng, numel, dtype) for _ in range(count)]
            if dtype == "int64":  # whose average goes through a double
                inputs = [array // 2**12 for array in inputs]
            out = np.empty_like(inputs[0])
            testing.reduce(DTYPES[dtype], SUM, inputs, divisor, out, numel, isa=isa)
            assert reference.same_bits(out, summed(inputs, dtype, divisor)), (numel, count)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "bool"])
@pytest.mark.parametrize("op", [MIN, MAX, PRODUCT])
def test_min_max_and_product(isa: str, dtype: str, op: int, rng: np.random.Generator) -> None:
    for numel in [1, 17, 513]:
        inputs = [values(rng, numel, dtype) for _ in range(3)]
        out = np.empty_like(inputs[0])
        testing.reduce(DTYPES[dtype], op, inputs, 1.0, out, numel, isa=isa)
        if dtype in FLOATS:
            wide = np.float64 if dtype == "float64" else np.float32
            a, b, c = (doubles_of(array, dtype).astype(wide) for array in inputs)
        else:
            a, b, c = inputs
        with np.errstate(over="ignore"):
            if op == PRODUCT:
                expected = a * b * c
            else:
                choose = np.minimum if op == MIN else np.maximum
                expected = choose(choose(a, b), c)
        expected = rounded(expected, dtype) if dtype in FLOATS else expected.astype(dtype)
        assert reference.same_bits(out, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("op", [MIN, MAX, SUM, PRODUCT])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_not_a_number_wins(isa: str, op: int, place: int) -> None:
    inputs = [np.ones(20, np.float32) for _ in range(3)]
    inputs[place][3] = np.nan
    out = np.empty(20, np.float32)
    testing.reduce(DTYPES["float32"], op, inputs, 1.0, out, 20, isa=isa)
    assert np.isnan(out[3])
    assert np.isfinite(np.delete(out, 3)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_value_survives_and_every_kind_of_rounding_is_right(
    isa: str, dtype: str, rng: np.random.Generator
) -> None:
    every = np.arange(65536, dtype=np.uint16).view(STORAGE[dtype])
    numbers = every[np.isfinite(doubles_of(every, dtype))]
    out = np.empty_like(numbers)
    testing.reduce(DTYPES[dtype], SUM, [numbers], 1.0, out, numbers.size, isa=isa)
    assert reference.same_bits(out, numbers)
    for factor in [0.5, 1 / 3, 1.0009765625, 2.0**-10, 3.0, 1e-4]:
        result = np.empty_like(numbers)
        segments = [(0, numbers.size)]
        testing.pack(DTYPES[dtype], [numbers], segments, factor, result, numbers.size, isa=isa)
        with np.errstate(over="ignore"):
            expected = rounded(doubles_of(numbers, dtype) * factor, dtype)
        assert reference.same_bits(result, expected), factor


def in_rows(terms: np.ndarray) -> np.ndarray:
    rows = -(-terms.size // reference.LANES)
    return np.pad(terms, (0, rows * reference.LANES - terms.size)).reshape(rows, -1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("divisor", [3.0, 4.0])
def test_squares_are_added_before_the_result_is_rounded(
    isa: str, dtype: str, divisor: float, rng: np.random.Generator
) -> None:
    # Segments in three groups, seen through a range that cuts the first and the last.
    segments, groups, bounds = [(0, 40), (48, 0), (48, 600), (656, 33)], [1, 0, 0, 2], (16, 680)
    numel = bounds[1] - bounds[0]
    inputs = [values(rng, numel, dtype) for _ in range(3)]
    out = np.empty_like(inputs[0])
    squares = testing.reduce_squares(
        DTYPES[dtype], inputs, divisor, out, bounds, segments, groups, 3, isa=isa
    )
    plain = np.empty_like(out)
    testing.reduce(DTYPES[dtype], SUM, inputs, divisor, plain, numel, isa=isa)
    assert reference.same_bits(out, plain)
    total = sum(doubles_of(array, dtype) for array in inputs)
    expected = np.zeros(2 * 3)
    for (offset, count), group in zip(segments, groups, strict=True):
        if count == 0:
            continue
        part = slice(max(offset, bounds[0]) - bounds[0], min(offset + count, bounds[1]) - bounds[0])
        # Sixteen elements of one input after those of another.
        rows = np.stack([in_rows(doubles_of(a, dtype)[part] ** 2) for a in inputs], axis=1)
        expected[2 * group] += reference.add_in_lanes(rows.ravel())
        # The sum in double is squared as it is: a rounding to float32 or to the type would show.
        expected[2 * group + 1] += reference.add_in_lanes(total[part] ** 2)
    assert reference.same_bits(np.array(squares), expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_inputs", [2, 3])
def test_the_square_of_a_sum_is_rounded_before_it_is_added(
    isa: str, dtype: str, num_inputs: int
) -> None:
    # One lane has 4 and then the square of 1 + 3 * 2^-27, which is not exact: a fused operation
    # would add 2^-50 more.
    inputs = [np.zeros(32) for _ in range(num_inputs)]
    for array, first, second in zip(inputs, [1, 1], [1, 3 * 2.0**-27], strict=False):
        array[[0, 16]] = first, second
    arrays = [rounded(array, dtype) for array in inputs]
    squares = testing.reduce_squares(
        DTYPES[dtype], arrays, 1.0, np.empty_like(arrays[0]), (0, 32), [(0, 32)], [0], 1, isa=isa
    )
    assert squares[1] == 4 + (1 + 3 * 2.0**-27) ** 2
    assert squares[1] != 5 + 3 * 2.0**-26 + 2.0**-50


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("divisor", [2.0, 3.0, 1024.0])
def test_averages_round_once_at_the_ends_of_the_range(
    isa: str, dtype: str, divisor: float, rng: np.random.Generator
) -> None:
    if dtype == "float64":
        limits = np.finfo(np.float64)
        tiny, huge = limits.smallest_subnormal, limits.max
    else:
        bits = {"float32": np.uint32}.get(dtype, np.uint16)
        infinite = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}[dtype]
        ends = np.array([1, infinite - 1], bits).view(STORAGE[dtype])
        tiny, huge = doubles_of(ends, dtype)
    small = rounded(tiny * rng.integers(-5000, 5000, 100).astype(np.float64), dtype)
    large = rounded(huge * rng.uniform(-1, 1, 100), dtype)
    for inputs in ([small, small[::-1].copy()], [large, large[::-1].copy()]):
        out = np.empty_like(small)
        testing.reduce(DTYPES[dtype], SUM, inputs, divisor, out, out.size, isa=isa)
        with np.errstate(over="ignore"):
            assert reference.same_bits(out, summed(inputs, dtype, divisor))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_and_undefined_results_are_counted(
    isa: str, dtype: str, rng: np.random.Generator
) -> None:
    numels = [5000, 0, 17]
    segments, numel = testing.lay_out(numels)
    fused = np.zeros(numel, np.float32)
    fused[[3, 4999, 4096, segments[2][0]]] = [np.inf, np.nan, -np.inf, np.nan]
    outputs = [np.empty(count, STORAGE[dtype]) for count in numels]
    counts = testing.unpack(
        DTYPES[dtype], rounded(fused, dtype), segments, 1.0, outputs, True, isa=isa
    )
    assert counts == [3, 0, 1]
