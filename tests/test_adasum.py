"""Adasum between ranks that are threads.

Oracles: the tree in long double with the bound of reference.adasum_with_bound, and identities.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from thread_ranks import USES_SHARED_MEMORY, ThreadRank, over_messages, run_ranks

SIZES = [1, 2, 3, 4, 5, 6, 7, 8]
FLOATS = ["float32", "float64"]

# Tensors of one rank; a job's gradients are one such list per rank.
Tensors = list[NDArray]


def reduce_all(
    calls: Sequence[Sequence[Tensors]], scales: tuple[float, float] = (1.0, 1.0)
) -> list[Tensors]:
    """Adasum of every call, `calls[c][rank]`, after a check that all ranks hold the same bits."""
    size = len(calls[0])

    def body(rank: ThreadRank) -> list[Tensors]:
        return [
            rank.grouped_allreduce(
                call[rank.rank], op="adasum", prescale=scales[0], postscale=scales[1]
            )
            for call in calls
        ]

    by_rank = run_ranks(size, body)
    for other in by_rank[1:]:
        for first, second in zip(by_rank[0], other, strict=True):
            for left, right in zip(first, second, strict=True):
                assert reference.same_bits(left, right), "the ranks hold different bits"
    return by_rank[0]


def reduce_one(vectors: Sequence[NDArray]) -> NDArray:
    """Adasum of one tensor, `vectors[rank]`."""
    return reduce_all([[[vector] for vector in vectors]])[0][0]


def assert_close(result: NDArray, vectors: Sequence[NDArray]) -> None:
    expected, bound = reference.adasum_with_bound(vectors)
    error = reference.norm(result.astype(np.longdouble) - expected)
    assert error <= bound, f"off by {error}, allowed {bound}"


def assert_parallel(result: NDArray, equal: NDArray, size: int) -> None:
    """Adasum of `size` vectors that are all `equal`.

    Pair by pair it has its bits: <a,a> / |a|^2 is exactly 1 and a/2 + a/2 is exact. In one shot
    products are sums of P^2 terms, which rounds in double and is seen there only.
    """
    if USES_SHARED_MEMORY and equal.dtype == np.float64:
        assert_close(result, [equal] * size)
    else:
        assert reference.same_bits(result, equal)


# ---- agreement with the reference ----------------------------------------------------------------

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "one vector": [(1000,)],
    "[5, 8]": [(5, 8)],
    "odd sizes": [(5, 8), (3, 7, 11), (1,), (101,), (2, 2)],
    "empty ones between": [(0,), (5, 8), (0, 3), (17,), (0,)],
    "only empty": [(0,), (4, 0)],
    "a scalar": [()],
    "single elements": [(1,)] * 7,
    "many tiny": [(1 + i % 5,) for i in range(150)],
    "one is huge": [(3,), (40_001,), (2, 3)],
    "no tensors": [],
}

Family = Callable[[np.random.Generator, int, tuple[int, ...]], list[NDArray]]


def independent(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> list[NDArray]:
    return [rng.standard_normal(shape) for _ in range(size)]


def similar(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> list[NDArray]:
    common = rng.standard_normal(shape)
    return [common + 0.3 * rng.standard_normal(shape) for _ in range(size)]


def of_all_lengths(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> list[NDArray]:
    return [10.0 ** rng.integers(-6, 7) * rng.standard_normal(shape) for _ in range(size)]


def opposed(rng: np.random.Generator, size: int, shape: tuple[int, ...]) -> list[NDArray]:
    """Operands cancel almost: the bound grows with what is lost."""
    common = rng.standard_normal(shape)
    return [(-1) ** rank * common + 0.01 * rng.standard_normal(shape) for rank in range(size)]


FAMILIES: list[Family] = [independent, similar, of_all_lengths, opposed]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", SIZES)
def test_adasum_agrees_with_the_tree_in_long_double(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    calls = []
    for shapes in SHAPES.values():
        for family in FAMILIES:
            by_shape = [family(rng, size, shape) for shape in shapes]
            calls.append(
                [[np.asarray(tensor[rank], dtype) for tensor in by_shape] for rank in range(size)]
            )
    for call, results in zip(calls, reduce_all(calls), strict=True):
        for index, result in enumerate(results):
            vectors = [tensors[index] for tensors in call]
            assert result.shape == vectors[0].shape
            assert_close(result, vectors)


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_bound_of_the_reference_is_tight_enough_to_mean_something(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    vectors = [vector.astype(dtype) for vector in independent(rng, size, (1000,))]
    expected, bound = reference.adasum_with_bound(vectors)
    # Independent vectors: every level multiplies an error by at most 3 and adds (2 n/16 + 30) d.
    levels = (size - 1).bit_length()
    rounding = np.finfo(dtype).epsneg + (2 * 1000 / 16 + 60) * 2.0**-53
    assert bound <= 4**levels * rounding * reference.norm(expected)
    # The next tree, with two ranks exchanged, is far outside.
    if size > 2:
        other = reference.adasum([vectors[-1], *vectors[1:-1], vectors[0]])
        assert reference.norm(other - expected) > 1000 * bound


@pytest.mark.parametrize("size", SIZES)
def test_adasum_has_the_same_bits_from_run_to_run(size: int, rng: np.random.Generator) -> None:
    shapes = SHAPES["odd sizes"] + SHAPES["one is huge"]
    by_shape = [similar(rng, size, shape) for shape in shapes]
    call = [[tensor[rank].astype(np.float32) for tensor in by_shape] for rank in range(size)]
    runs = [reduce_all([call, call]) for _ in range(2)]
    first = runs[0][0]
    for results in [runs[0][1], *runs[1]]:
        for left, right in zip(first, results, strict=True):
            assert reference.same_bits(left, right)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_fused_tensors_are_reduced_one_by_one(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    # Halves are cut elsewhere, so that only the bound can be asked for; the statistics of a
    # neighbour would be far off.
    shapes = [(5, 8), (1,), (0,), (333,)]
    factors = [1.0, 1e6, 1.0, 1e-6]
    by_shape = [
        [np.asarray(factor * vector, dtype) for vector in similar(rng, size, shape)]
        for factor, shape in zip(factors, shapes, strict=True)
    ]
    fused = reduce_all([[[tensor[rank] for tensor in by_shape] for rank in range(size)]])[0]
    alone = reduce_all([[[vector] for vector in tensor] for tensor in by_shape])
    for vectors, together, [single] in zip(by_shape, fused, alone, strict=True):
        assert_close(together, vectors)
        assert_close(single, vectors)


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_adasum_of_orthogonal_vectors_is_their_sum(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    # Disjoint supports: every dot product is exactly 0 and every share exactly 1.
    numel = 64 * size + 3
    vectors = [np.zeros(numel, dtype) for _ in range(size)]
    for i in range(numel):
        vectors[i % size][i] = rng.standard_normal()
    assert reference.same_bits(reduce_one(vectors), sum(vectors[1:], vectors[0]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_adasum_of_equal_vectors_is_that_vector(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    vector = rng.standard_normal(777).astype(dtype)
    assert_parallel(reduce_one([vector] * size), vector, size)


WEIGHTS = {
    2: [1 / 2, 1 / 2],
    3: [1 / 4, 1 / 4, 1 / 2],
    4: [1 / 4] * 4,
    5: [1 / 8, 1 / 8, 1 / 4, 1 / 4, 1 / 4],
    6: [1 / 8, 1 / 8, 1 / 8, 1 / 8, 1 / 4, 1 / 4],
    7: [1 / 8] * 6 + [1 / 4],
    8: [1 / 8] * 8,
}


@pytest.mark.parametrize("size", WEIGHTS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_adasum_of_parallel_vectors_is_their_weighted_mean(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    direction = rng.standard_normal(500)
    for lengths in (rng.uniform(0.5, 2, size), rng.standard_normal(size), 4.0 ** np.arange(size)):
        # Powers of two times one vector are exactly parallel after rounding too.
        powers = np.sign(lengths) * 2.0 ** np.round(np.log2(np.abs(lengths)))
        vectors = [(factor * direction.astype(dtype)).astype(dtype) for factor in powers]
        mean = sum(
            weight * vector.astype(np.longdouble)
            for weight, vector in zip(WEIGHTS[size], vectors, strict=True)
        )
        expected, bound = reference.adasum_with_bound(vectors)
        assert reference.norm(expected - mean) <= bound
        assert reference.norm(reduce_one(vectors) - mean) <= 2 * bound


@pytest.mark.parametrize("size", SIZES)
def test_zero_operands_leave_the_others_as_they_are(size: int, rng: np.random.Generator) -> None:
    only = rng.standard_normal(99).astype(np.float32)
    for owner in range(size):
        vectors = [only if rank == owner else np.zeros_like(only) for rank in range(size)]
        assert reference.same_bits(reduce_one(vectors), only)
    zeros = [np.zeros(99, np.float32)] * size
    assert reference.same_bits(reduce_one(zeros), zeros[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_adasum_is_homogeneous(size: int, dtype: str, rng: np.random.Generator) -> None:
    # A power of two commutes with every rounding: the bits must be those of the scaled result.
    call = [[vector.astype(dtype)] for vector in similar(rng, size, (321,))]
    [[plain]] = reduce_all([call])
    for factor in (2.0**20, -(2.0**-30)):
        scaled = [[(factor * vector).astype(dtype)] for [vector] in call]
        [[result]] = reduce_all([scaled])
        assert reference.same_bits(result, (factor * plain).astype(dtype))
        [[prescaled]] = reduce_all([call], scales=(factor, 1.0))
        assert reference.same_bits(prescaled, result)
        [[postscaled]] = reduce_all([call], scales=(1.0, factor))
        assert reference.same_bits(postscaled, result)


@pytest.mark.parametrize("size", SIZES)
def test_adasum_is_no_longer_than_orthogonal_vectors_would_be(
    size: int, rng: np.random.Generator
) -> None:
    # |Adasum|^2 <= sum |g_i|^2, equality for orthogonal ones; `bound` is what rounding may add.
    families = [*FAMILIES, similar, opposed]
    calls = [
        [[vector.astype(np.float32)] for vector in family(rng, size, (257,))] for family in families
    ]
    for call, [result] in zip(calls, reduce_all(calls), strict=True):
        vectors = [tensors[0] for tensors in call]
        _, bound = reference.adasum_with_bound(vectors)
        limit = np.sqrt(sum(reference.norm(vector) ** 2 for vector in vectors))
        assert reference.norm(result) <= limit + bound


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_ranks_that_meet_first_may_be_exchanged(size: int, rng: np.random.Generator) -> None:
    vectors = [vector.astype(np.float32) for vector in similar(rng, size, (500,))]
    plain = reduce_one(vectors)
    exchanged = reduce_one([vectors[1], vectors[0], *vectors[2:]])
    assert reference.same_bits(plain, exchanged)
    if size > 2:  # ranks that do not meet first may not: the tree is part of the contract
        other = reduce_one([vectors[-1], *vectors[1:-1], vectors[0]])
        assert not reference.same_bits(plain, other)


def test_one_rank_keeps_what_it_has(rng: np.random.Generator) -> None:
    vector = rng.standard_normal(55).astype(np.float32)
    vector[3], vector[4] = np.nan, np.inf
    assert reference.same_bits(reduce_one([vector]), vector)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_the_inputs_stay_as_they_are_and_may_be_the_outputs(
    size: int, rng: np.random.Generator
) -> None:
    vectors = [vector.astype(np.float32) for vector in similar(rng, size, (100,))]

    def body(rank: ThreadRank) -> tuple[NDArray, NDArray, NDArray]:
        mine = vectors[rank.rank].copy()
        result = rank.allreduce(mine, op="adasum")
        in_place = mine.copy()
        rank.allreduce(in_place, op="adasum", outputs=[in_place])
        return mine, result, in_place

    for vector, (after, result, in_place) in zip(vectors, run_ranks(size, body), strict=True):
        assert reference.same_bits(after, vector)
        assert reference.same_bits(in_place, result)


# ---- numerical extremes --------------------------------------------------------------------------


@pytest.mark.parametrize("size", WEIGHTS)
@pytest.mark.parametrize(
    ("dtype", "length"),
    [
        ("float32", 1e-30),  # squares underflow float32
        ("float32", 1e18),  # squares near its end
        ("float32", 1e37),  # squares overflow it
        ("float32", 1e-40),  # subnormal
        ("float32", 1e-45),  # the smallest
        ("float64", 1e-76),  # squares just above sqrt(DBL_MIN)
        ("float64", 1e-30),
        ("float64", 1e18),
        ("float64", 1e152),  # norms below come to 1.1e153, squares near the end
    ],
)
def test_parallel_vectors_of_extreme_length_still_give_their_mean(
    size: int, dtype: str, length: float
) -> None:
    # Lengths 1, 2 and 4 times the unit: exactly parallel down to the smallest subnormals.
    powers = [2.0 ** (rank % 3) for rank in range(size)]
    unit = np.asarray(length, dtype)
    vectors = [np.full(8, factor * unit, dtype) for factor in powers]
    mean = sum(
        weight * factor * np.longdouble(unit)
        for weight, factor in zip(WEIGHTS[size], powers, strict=True)
    )
    result = reduce_one(vectors)
    assert np.isfinite(result).all()
    expected, bound = reference.adasum_with_bound(vectors)
    assert reference.norm(expected - mean) <= bound
    assert reference.norm(result - expected) <= bound
    assert_parallel(reduce_one([vectors[0]] * size), vectors[0], size)


@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_whose_squares_vanish_count_as_zero(dtype: str) -> None:
    # float64 below 1e-77: the square is under sqrt(DBL_MIN), both shares are 1.
    vector = np.full(4, 1e-100, dtype)
    expected = vector if dtype == "float32" else 2 * vector  # 1e-100 is 0 in float32
    assert reference.same_bits(reduce_one([vector, vector]), expected)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_stays_so_and_harms_no_other(
    size: int, poison: float, rng: np.random.Generator
) -> None:
    shapes = [(5, 8), (77,), (0,), (5,)]
    by_shape = [similar(rng, size, shape) for shape in shapes]
    sound = [[np.asarray(tensor[rank], np.float32) for tensor in by_shape] for rank in range(size)]
    calls = [sound]
    for owner in range(size):
        for element in (0, 76):
            call = [[tensor.copy() for tensor in tensors] for tensors in sound]
            call[owner][1][element] = poison
            calls.append(call)
    clean, *poisoned = reduce_all(calls)
    for results in poisoned:
        assert not np.isfinite(results[1]).any()
        for index in (0, 2, 3):
            assert reference.same_bits(results[index], clean[index])


def test_a_non_finite_operand_beside_zeros_is_not_lost() -> None:
    poisoned = np.array([np.inf, 1.0, 2.0], np.float32)
    for vectors in ([poisoned, np.zeros(3, np.float32)], [np.zeros(3, np.float32), poisoned]):
        assert not np.isfinite(reduce_one(vectors)).any()


# ---- the bits themselves -------------------------------------------------------------------------


def replay(calls: Sequence[Tensors]) -> Tensors:
    """The schedule walked in NumPy with the kernels of tests/reference.py, for all ranks at once.

    Partial statistics are added over the group in rank order, as docs/algorithms.md demands.
    """
    size = len(calls)
    segments, numel = testing.lay_out([tensor.size for tensor in calls[0]])
    data = np.zeros((size, numel), calls[0][0].dtype)
    for rank, tensors in enumerate(calls):
        for (offset, count), tensor in zip(segments, tensors, strict=True):
            data[rank, offset : offset + count] = tensor.ravel()

    ahead = [testing.adasum_schedule(size, rank, numel) for rank in range(size)]
    owned = [(0, numel)] * size
    owners = [[rank] for rank in range(size)]
    for node in testing.adasum_tree(size):
        owners.append(node["owners"])
        levels = {rank: ahead[rank].pop(0) for i in ("lower", "upper") for rank in owners[node[i]]}
        before = data.copy()
        parts = {}  # of every owner: per segment its place, both operands and their statistics
        for rank, level in levels.items():
            owned[rank] = level["keep"]
            sides = (rank, level["peer"]) if level["is_lower"] else (level["peer"], rank)
            parts[rank] = []
            for place in clipped(segments, level["keep"]):
                pair = [before[side, place] for side in sides]
                parts[rank].append((place, pair, reference.pair_stats(*pair)))
        for rank in node["owners"]:
            for s, (place, pair, _) in enumerate(parts[rank]):
                rows = [np.array(parts[member][s][2]) for member in sorted(node["owners"])]
                stats = reference.sum_in_rank_order(rows)
                data[rank, place] = reference.pair_combine(*pair, stats)

    result = np.zeros(numel, data.dtype)
    for rank, (begin, end) in enumerate(owned):
        result[begin:end] = data[rank, begin:end]
    return [
        result[offset : offset + count].reshape(tensor.shape)
        for (offset, count), tensor in zip(segments, calls[0], strict=True)
    ]


def clipped(segments: list[tuple[int, int]], bounds: tuple[int, int]) -> list[slice]:
    return [
        slice(max(offset, bounds[0]), max(min(offset + count, bounds[1]), offset, bounds[0]))
        for offset, count in segments
    ]


@over_messages
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_adasum_has_the_bits_of_the_documented_arithmetic(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    calls = []
    for name in ("[5, 8]", "odd sizes", "empty ones between", "many tiny", "one is huge"):
        by_shape = [similar(rng, size, shape) for shape in SHAPES[name]]
        calls.append(
            [[np.asarray(tensor[rank], dtype) for tensor in by_shape] for rank in range(size)]
        )
    for call, results in zip(calls, reduce_all(calls), strict=True):
        for expected, result in zip(replay(call), results, strict=True):
            assert reference.same_bits(result, expected)
