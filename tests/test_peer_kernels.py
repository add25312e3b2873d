"""Adasum's kernels over the memory of several ranks.

Oracles: whole numbers that a double adds exactly, math.fsum, and 16 lanes in NumPy float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from half_types import from_storage, to_storage
from thread_ranks import DTYPES, STORAGE

FLOATS = ["float16", "bfloat16", "float32", "float64"]
COUNTS = range(1, 17)
SIZES = [0, 1, 15, 16, 17, 63, 1000, 4099]
GUARD = 16  # elements before and behind that a kernel must not touch
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}
SUBNORMAL = {
    "float16": 2.0**-24,
    "bfloat16": 2.0**-133,
    "float32": 2.0**-149,
    "float64": 2.0**-1074,
}
HIGHEST = {"float16": 65504.0, "bfloat16": 3.38e38, "float32": 3.40e38, "float64": 1e150}

Vectors = list[NDArray]


def guarded(vector: NDArray, shift: int) -> NDArray:
    """A copy that begins `shift` elements behind a place of good alignment, among NaN."""
    memory = np.full(vector.size + 2 * GUARD, np.nan if vector.dtype.kind == "f" else 0xFF)
    if vector.dtype == STORAGE["bfloat16"]:
        memory[:] = 0xFFFF
    view = memory.astype(vector.dtype)[shift : shift + vector.size]
    view[:] = vector
    return view


def numbers(rng: np.random.Generator, count: int, numel: int, dtype: str) -> Vectors:
    """Values whose sums depend on the order, in memory of all alignments."""
    wide = rng.standard_normal((count, numel)) * 2.0 ** rng.integers(-5, 6, (count, numel))
    return [guarded(to_storage(row, dtype), k % GUARD) for k, row in enumerate(wide)]


def integers(rng: np.random.Generator, count: int, numel: int, dtype: str) -> Vectors:
    """-8 ... 8: the products of two, and sums of 2^40 of those, are exact in double."""
    wide = rng.integers(-8, 9, (count, numel)).astype(np.float64)
    return [guarded(to_storage(row, dtype), (3 * k + 1) % GUARD) for k, row in enumerate(wide)]


def wide(vectors: Sequence[NDArray], dtype: str) -> list[NDArray[np.float64]]:
    return [from_storage(vector, dtype) for vector in vectors]


def pairs(count: int) -> list[tuple[int, int]]:
    """Row by row, as a Gram matrix is stored."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def gram(vectors: Vectors, dtype: str, before: Sequence[float] = ()) -> list[float]:
    numel = vectors[0].size if vectors else 0
    result: list[float] = testing.gram(DTYPES[dtype], vectors, numel, list(before))
    return result


def weighted_sum(vectors: Vectors, dtype: str, c: Sequence[float], out: NDArray) -> NDArray:
    testing.weighted_sum(DTYPES[dtype], vectors, out.size, [float(x) for x in c], out)
    return out


def node_stats(
    vectors: Vectors, dtype: str, c: Sequence[float], lower: int, upper: int, **more: Any
) -> list[float]:
    code, numel = DTYPES[dtype], vectors[0].size
    result: list[float] = testing.node_stats(code, vectors, numel, list(c), lower, upper, **more)
    return result


def in_order(vectors: Vectors, dtype: str, c: Sequence[float]) -> NDArray[np.float64]:
    """The sum of the weighted vectors in double, one after the other."""
    total = np.float64(c[0]) * from_storage(vectors[0], dtype)
    for weight, vector in zip(c[1:], vectors[1:], strict=True):
        total = total + np.float64(weight) * from_storage(vector, dtype)
    return total


def roundings(numel: int) -> float:
    """That a product meets in 16 lanes, with its own: what 2^-53 is multiplied by in a bound."""
    return numel / 16 + 6


# ---- gram ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", COUNTS)
def test_gram_of_whole_numbers_is_exact(count: int, dtype: str, rng: np.random.Generator) -> None:
    for numel in SIZES:
        vectors = integers(rng, count, numel, dtype)
        exact = np.array(wide(vectors, dtype)).astype(np.int64)
        expected = [float(int(exact[i] @ exact[j])) for i, j in pairs(count)]
        assert gram(vectors, dtype) == expected, numel


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", COUNTS)
def test_gram_has_the_bits_of_sixteen_lanes(
    count: int, dtype: str, rng: np.random.Generator
) -> None:
    for numel in [*SIZES, 255, 256, 257]:
        vectors = numbers(rng, count, numel, dtype)
        x = wide(vectors, dtype)
        expected = [reference.add_in_lanes(x[i] * x[j]) for i, j in pairs(count)]
        assert reference.same_bits(np.array(gram(vectors, dtype)), np.array(expected)), numel


@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_is_as_near_to_the_exact_sums_as_sixteen_lanes_are(
    dtype: str, rng: np.random.Generator
) -> None:
    numel = 1000
    vectors = numbers(rng, 5, numel, dtype)
    x = wide(vectors, dtype)
    for (i, j), value in zip(pairs(5), gram(vectors, dtype), strict=True):
        # Products of float64 are rounded before fsum sees them, too: that is one of `roundings`.
        products = x[i] * x[j]
        bound = roundings(numel) * 2.0**-53 * math.fsum(abs(products))
        assert abs(value - math.fsum(products)) <= bound


@pytest.mark.parametrize("dtype", FLOATS)
def test_gram_of_two_vectors_has_the_bits_of_pair_stats(
    dtype: str, rng: np.random.Generator
) -> None:
    for numel in SIZES:
        a, b = numbers(rng, 2, numel, dtype)
        dot, a_sq, b_sq = testing.pair_stats(DTYPES[dtype], a, b, [(0, numel)], (0, numel))
        assert reference.same_bits(np.array(gram([a, b], dtype)), np.array([a_sq, dot, b_sq]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [3, 4, 5, 8, 16])
def test_gram_of_many_vectors_is_that_of_every_two_to_the_bit(
    count: int, dtype: str, rng: np.random.Generator
) -> None:
    vectors = numbers(rng, count, 1003, dtype)
    matrix = dict(zip(pairs(count), gram(vectors, dtype), strict=True))
    for i, j in pairs(count):
        if i != j:
            of_two = gram([vectors[i], vectors[j]], dtype)
            assert of_two == [matrix[i, i], matrix[i, j], matrix[j, j]]


@pytest.mark.parametrize("count", [2, 4, 5, 16])
def test_gram_is_added_to_what_is_there(count: int, rng: np.random.Generator) -> None:
    vectors = integers(rng, count, 40, "float32")
    before = [1000.0 * k for k in range(len(pairs(count)))]
    alone = gram(vectors, "float32")
    after = gram(vectors, "float32", before)
    assert after == [old + new for old, new in zip(before, alone, strict=True)]


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 16])
def test_what_is_not_finite_stays_in_its_row_and_column(
    count: int, poison: float, rng: np.random.Generator
) -> None:
    for place in range(count):
        vectors = [np.ones(70, np.float32) + k for k in range(count)]
        clean = gram(vectors, "float32")
        vectors[place][int(rng.integers(70))] = poison
        for pair, value, before in zip(pairs(count), gram(vectors, "float32"), clean, strict=True):
            if place in pair:
                assert not math.isfinite(value)
            else:
                assert value == before


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [2, 5])
def test_gram_neither_under_nor_overflows(count: int, dtype: str) -> None:
    values = {SUBNORMAL[dtype], HIGHEST[dtype]} | ({1e-30, 1e18} if dtype != "float16" else set())
    if dtype == "float64":
        values -= {SUBNORMAL[dtype]}  # its square is less than any double
    for value in values:
        vector = to_storage(np.full(40, value), dtype)
        number = float(from_storage(vector, dtype)[0])
        assert number != 0
        for entry in gram([vector] * count, dtype):
            assert entry == pytest.approx(40 * number**2, rel=roundings(40) * 2.0**-53)


# ---- weighted_sum --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", COUNTS)
def test_weighted_sum_has_the_bits_of_one_rounding(
    count: int, dtype: str, rng: np.random.Generator
) -> None:
    for numel in SIZES:
        vectors = numbers(rng, count, numel, dtype)
        c = rng.standard_normal(count)
        memory = np.full(numel + 2 * GUARD, 7, STORAGE[dtype])
        out = weighted_sum(vectors, dtype, c, memory[count : count + numel])
        assert reference.same_bits(out, to_storage(in_order(vectors, dtype, c), dtype)), numel
        assert (memory[:count] == 7).all()
        assert (memory[count + numel :] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", COUNTS)
def test_weighted_sum_of_whole_numbers_is_exact(
    count: int, dtype: str, rng: np.random.Generator
) -> None:
    # At most 16 * 8 * 2 quarters: eight bits and a sign, which bfloat16 has.
    for numel in SIZES:
        vectors = integers(rng, count, numel, dtype)
        weights = [(-1) ** k * (k % 3) for k in range(count)]
        exact = sum(
            weight * vector.astype(np.int64)
            for weight, vector in zip(weights, wide(vectors, dtype), strict=True)
        )
        c = [weight / 4 for weight in weights]
        out = weighted_sum(vectors, dtype, c, np.empty(numel, STORAGE[dtype]))
        assert (from_storage(out, dtype) * 4 == exact).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_weighted_sum_is_the_exact_one_but_for_one_rounding(
    dtype: str, rng: np.random.Generator
) -> None:
    count, numel = 7, 200
    vectors = numbers(rng, count, numel, dtype)
    c = rng.standard_normal(count)
    out = weighted_sum(vectors, dtype, c, np.empty(numel, STORAGE[dtype]))
    x = np.array(wide(vectors, dtype))
    for e, value in enumerate(from_storage(out, dtype)):
        terms = c * x[:, e]
        exact = math.fsum(terms)
        # A rounding of each term and count - 1 of their sums, in double; then that of the type,
        # which for half types is one of float32 before.
        bound = count * 2.0**-53 * float(np.abs(terms).sum())
        rounding = HALF_ULP[dtype] + (2.0**-24 if STORAGE[dtype].itemsize == 2 else 0.0)
        assert abs(value - exact) <= bound + rounding * (abs(exact) + bound) * (1 + 2.0**-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_weighted_sum_of_two_vectors_has_the_bits_of_pair_combine(
    dtype: str, rng: np.random.Generator
) -> None:
    for numel in SIZES[1:]:
        a, b = numbers(rng, 2, numel, dtype)
        stats = [float(value) for value in rng.standard_normal(3) ** 2 + 0.1]
        shares = [testing.adasum_share(stats[0], square) for square in stats[1:]]
        expected, code = np.empty_like(a), DTYPES[dtype]
        testing.pair_combine(code, a, b, [(0, numel)], (0, numel), stats, expected)
        assert reference.same_bits(weighted_sum([a, b], dtype, shares, np.empty_like(a)), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16])
def test_weighted_sum_may_write_over_one_of_its_inputs(
    count: int, dtype: str, rng: np.random.Generator
) -> None:
    c = rng.standard_normal(count)
    for place in range(count):
        vectors = numbers(rng, count, 1003, dtype)
        expected = to_storage(in_order(vectors, dtype, c), dtype)
        assert reference.same_bits(weighted_sum(vectors, dtype, c, vectors[place]), expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_weighted_sum_neither_under_nor_overflows_on_the_way(count: int, dtype: str) -> None:
    largest = to_storage(np.full(20, HIGHEST[dtype]), dtype)
    opposite = to_storage(np.full(20, -HIGHEST[dtype]), dtype)
    vectors = [largest, largest, opposite, *[np.zeros_like(largest)] * (count - 3)]
    out = weighted_sum(vectors, dtype, [1.0] * count, np.empty_like(largest))
    assert reference.same_bits(out, largest)
    if dtype != "float64":  # shorter types' smallest numbers, in parts that only a double can hold
        smallest = to_storage(np.full(20, SUBNORMAL[dtype]), dtype)
        parts = [1 / count] * count
        out = weighted_sum([smallest] * count, dtype, parts, np.empty_like(smallest))
        assert reference.same_bits(out, smallest)


def test_weighted_sum_of_what_is_not_finite_is_so_in_its_place_only() -> None:
    vectors = [np.ones(50, np.float32) for _ in range(6)]
    vectors[4][17], vectors[5][33] = np.nan, np.inf
    out = weighted_sum(vectors, "float32", [0.5] * 6, np.empty(50, np.float32))
    assert math.isnan(out[17])
    assert out[33] == np.inf
    assert (np.delete(out, [17, 33]) == 3.0).all()


# ---- node_stats ----------------------------------------------------------------------------------


def node(vectors: Vectors, dtype: str, c: Sequence[float], leaves: int) -> NDArray[np.float64]:
    """The combination of the vectors whose bits are set."""
    chosen = [k for k in range(len(vectors)) if leaves >> k & 1]
    if not chosen:
        return np.zeros(vectors[0].size)
    return in_order([vectors[k] for k in chosen], dtype, [c[k] for k in chosen])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("count", "lower", "upper"),
    [(1, 0, 1), (2, 0b01, 0b10), (3, 0b011, 0b100), (5, 0b01010, 0b00101), (16, 0x00FF, 0xFF00)],
)
def test_node_stats_has_the_bits_of_combinations_in_double(
    count: int, lower: int, upper: int, dtype: str, rng: np.random.Generator
) -> None:
    for numel in SIZES:
        vectors = numbers(rng, count, numel, dtype)
        c = [float(weight) for weight in rng.standard_normal(count)]
        expected = reference.pair_stats(
            *(node(vectors, dtype, c, leaves) for leaves in (lower, upper))
        )
        stats = node_stats(vectors, dtype, c, lower, upper)
        assert reference.same_bits(np.array(stats), np.array(expected)), numel


@pytest.mark.parametrize("dtype", FLOATS)
def test_node_stats_of_whole_numbers_follow_from_the_gram_matrix(
    dtype: str, rng: np.random.Generator
) -> None:
    count, lower, upper = 6, 0b010101, 0b101000
    vectors = integers(rng, count, 4099, dtype)
    c = [0.5, -2.0, 4.0, 1.0, -0.25, 3.0]
    matrix = dict(zip(pairs(count), gram(vectors, dtype), strict=True))

    def product(x: int, y: int) -> float:
        return sum(
            c[i] * c[j] * matrix[min(i, j), max(i, j)]
            for i in range(count)
            for j in range(count)
            if x >> i & 1 and y >> j & 1
        )

    expected = [product(lower, upper), product(lower, lower), product(upper, upper)]
    assert node_stats(vectors, dtype, c, lower, upper) == expected


def test_node_stats_are_those_of_vectors_that_nearly_cancel(rng: np.random.Generator) -> None:
    # From the Gram matrix nothing would be left: this is 1e-18 of its numbers. Differences of
    # numbers that are as near as these are exact.
    numel = 500
    common = to_storage(rng.standard_normal(numel), "float64")
    near = [common, common * (1 + 1e-9 * rng.standard_normal(numel))]
    difference = near[0] - near[1]
    stats = node_stats(near, "float64", [1.0, -1.0], 0b11, 0b11)
    exact = math.fsum(difference * difference)
    for value in stats:
        assert value == pytest.approx(exact, rel=roundings(numel) * 2.0**-53)


def test_node_stats_are_added_and_leave_other_inputs_alone(rng: np.random.Generator) -> None:
    vectors = [np.full(33, k + 1.0, np.float32) for k in range(4)]
    vectors[2][:] = np.nan
    before = (10.0, 20.0, 30.0)
    stats = node_stats(vectors, "float32", [1.0, 1.0, 1.0, np.inf], 0b01, 0b10, stats=before)
    assert stats == [10.0 + 33 * 2, 20.0 + 33, 30.0 + 33 * 4]


def test_infinite_coefficients_do_not_reach_beyond_the_last_element() -> None:
    stats = node_stats([np.ones(17, np.float32)], "float32", [np.inf], 0b1, 0b1)
    assert stats == [np.inf] * 3


# ---- copy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("streams", [False, True])
def test_copy_moves_every_byte_and_no_other(
    streams: bool, isa: str, rng: np.random.Generator
) -> None:
    source = rng.integers(0, 256, 6000, np.uint8)
    for size in [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 1000, 4099]:
        for shift in [0, 1, 7, 32, 63]:
            memory = np.full(5000, 0xA5, np.uint8)
            target = memory[64 + shift : 64 + shift + size]
            testing.peer_copy(source[3 : 3 + size], target, streams, isa=isa)
            assert (target == source[3 : 3 + size]).all()
            assert (memory[: 64 + shift] == 0xA5).all()
            assert (memory[64 + shift + size :] == 0xA5).all()


@pytest.mark.parametrize("isa", testing.isas())
@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pack_by_streams_is_pack(
    scale: float, dtype: str, isa: str, rng: np.random.Generator
) -> None:
    numels = [3, 0, 5000, 1, 511, 4096, 40_001, 17]
    segments, numel = testing.lay_out(numels)
    tensors = [guarded(rng.integers(0, 100, n).astype(dtype), 5) for n in numels]
    packed = []
    for streams in (False, True):
        memory = np.full(numel + 2 * GUARD, 7, dtype)
        fused = memory[3 : 3 + numel]
        code = DTYPES[dtype]
        testing.pack(code, tensors, segments, scale, fused, numel, streams=streams, isa=isa)
        packed.append(memory)
    assert reference.same_bits(packed[0], packed[1])
    assert (packed[1][:3] == 7).all()
    for (offset, count), tensor in zip(segments, tensors, strict=True):
        expected = (tensor.astype(np.float64) * scale).astype(dtype)
        assert (packed[1][3 + offset : 3 + offset + count] == expected).all()


# ---- refusals ------------------------------------------------------------------------------------

Call = Callable[[str, int], object]
CALLS: dict[str, Call] = {
    "gram": lambda dtype, count: testing.gram(
        DTYPES[dtype], [np.zeros(4, STORAGE[dtype])] * count, 4
    ),
    "weighted_sum": lambda dtype, count: testing.weighted_sum(
        DTYPES[dtype],
        [np.zeros(4, STORAGE[dtype])] * count,
        4,
        [0.0] * count,
        np.zeros(4, STORAGE[dtype]),
    ),
    "node_stats": lambda dtype, count: testing.node_stats(
        DTYPES[dtype], [np.zeros(4, STORAGE[dtype])] * count, 4, [0.0] * count, 0, 0
    ),
}


@pytest.mark.parametrize("kernel", CALLS)
@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool"])
def test_types_without_a_gram_matrix_are_refused_by_name(kernel: str, dtype: str) -> None:
    message = f"{kernel}: dtype must be one that it is defined for, got {dtype}"
    with pytest.raises(ValueError, match=message):
        CALLS[kernel](dtype, 2)


@pytest.mark.parametrize("kernel", CALLS)
@pytest.mark.parametrize("count", [0, 17])
def test_none_and_more_than_sixteen_inputs_are_refused(kernel: str, count: int) -> None:
    message = rf"{kernel}: num_inputs must be 1 \.\.\. 16, got {count}"
    with pytest.raises(ValueError, match=message):
        CALLS[kernel]("float32", count)


def test_nodes_of_inputs_that_do_not_exist_are_refused() -> None:
    vectors = [np.zeros(4, np.float32)] * 3
    message = "node_stats: lower and upper must be sets of 3 inputs, got 3 and 8"
    with pytest.raises(ValueError, match=message):
        node_stats(vectors, "float32", [1.0] * 3, 0b0011, 0b1000)
