"""Collectives through shared memory, between ranks that are threads.

Oracles: the same calls with messages, bit for bit where the arithmetic is the same; Adasum's tree
in long double with the bound of reference.adasum_with_bound; exact numbers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
import test_adasum
import test_gram
from adareduce import _core
from adareduce._core import testing
from half_types import from_storage, to_storage
from test_collectives import FLOATS, UNIT, expected_of
from test_instruction_sets import values
from thread_ranks import STORAGE, ThreadRank, run_ranks, settings

SIZES = [2, 3, 4, 5, 6, 7, 8]
# The longest requests whose data go with the headers: bytes of all ranks, of one.
MOST_SMALL_BYTES = 128 << 10
MOST_PAYLOAD_BYTES = 64 << 10
RING = testing.SHARED_RING_BYTES
NUM_CHOICES = len(testing.SharedTuning.choices())
REQUESTS_THAT_TRY_ALL = 8 * NUM_CHOICES  # test_shared_tuning.py
TINIEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149, "float64": 2.0**-1074}

Tensors = list[NDArray]
Calls = Sequence[Sequence[Tensors]]  # by call, rank and tensor


def run_shared(size: int, body: Callable[[ThreadRank], Any], **options: Any) -> list[Any]:
    """`body` on ranks that meet in shared memory."""

    def checked(rank: ThreadRank) -> Any:
        facts = rank.engine.shared_memory(0)
        assert facts.is_used, facts.why_not
        return body(rank)

    return run_ranks(size, checked, settings(shared_memory=True, **options))


def run_messages(size: int, body: Callable[[ThreadRank], Any]) -> list[Any]:
    return run_ranks(size, body, settings(shared_memory=False))


def same_on_all(by_rank: Sequence[list[Tensors]]) -> list[Tensors]:
    for other in by_rank[1:]:
        for first, second in zip(by_rank[0], other, strict=True):
            for left, right in zip(first, second, strict=True):
                assert reference.same_bits(left, right), "the ranks hold different bits"
    return by_rank[0]


def adasum_of(calls: Calls, dtype: str, **options: Any) -> list[Tensors]:
    def body(rank: ThreadRank) -> list[Tensors]:
        return [rank.grouped_allreduce(call[rank.rank], op="adasum", dtype=dtype) for call in calls]

    return same_on_all(run_shared(len(calls[0]), body, **options))


def bound_of(vectors: Sequence[NDArray], dtype: str) -> tuple[NDArray, float]:
    """Adasum in long double, and how far (2-norm) one shot may be from it.

    Coefficients are those of vectors in double, which the one sum rounds to `dtype` at the end.
    """
    exact = [from_storage(vector.ravel(), dtype) for vector in vectors]
    expected, bound = reference.adasum_with_bound(exact)
    length = float(reference.norm(expected)) + bound
    # Half types are rounded by way of float32.
    unit = UNIT[dtype] + (UNIT["float32"] if dtype in ("float16", "bfloat16") else 0.0)
    return expected, bound + unit * length + TINIEST[dtype] * np.sqrt(expected.size)


def assert_adasum(results: Tensors, by_rank: Sequence[Tensors], dtype: str) -> None:
    for index, result in enumerate(results):
        expected, bound = bound_of([tensors[index] for tensors in by_rank], dtype)
        error = reference.norm(from_storage(result.ravel(), dtype) - expected)
        assert error <= bound, f"tensor {index}: off by {error}, allowed {bound}"


def call_of(
    rng: np.random.Generator, family: Any, size: int, numels: Sequence[int], dtype: str
) -> list[Tensors]:
    tensors = [family(rng, size, (numel,)) for numel in numels]
    return [[to_storage(tensor[rank], dtype) for tensor in tensors] for rank in range(size)]


def nearly_cancelling(
    rng: np.random.Generator, size: int, shape: tuple[int, ...], remainder: float = 1e-5
) -> list[NDArray]:
    """Every node of the tree is tiny beside its leaves: its products must come from vectors."""
    vectors = [rng.standard_normal(shape) for _ in range(size)]
    for rank in range(1, size, 2):
        vectors[rank] = -vectors[rank - 1] + remainder * rng.standard_normal(shape)
    return vectors


def small_limit(size: int, width: int) -> int:
    """The most elements of one tensor that go with the headers."""
    line = 64 // width
    return min(MOST_SMALL_BYTES // size, MOST_PAYLOAD_BYTES) // width // line * line


# ---- Adasum in one shot --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [*SIZES, 16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_adasum_in_one_shot_agrees_with_the_tree(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    families = [*test_adasum.FAMILIES, nearly_cancelling]
    if dtype == "float16":  # 6e4 is its largest number
        families.remove(test_adasum.of_all_lengths)
    tile = testing.shared_tile_numel(size)
    limit = small_limit(size, STORAGE[dtype].itemsize)
    lists = [[5, 0, 333, 1], [limit], [limit + 1], [7, limit, 40], [tile - 1, 3]]
    calls = [call_of(rng, family, size, numels, dtype) for family in families for numels in lists]
    for call, results in zip(calls, adasum_of(calls, dtype), strict=True):
        assert_adasum(results, call, dtype)


@pytest.mark.parametrize("size", SIZES)
def test_adasum_in_one_shot_and_in_pairs_agree_within_their_bounds(
    size: int, rng: np.random.Generator
) -> None:
    tile = testing.shared_tile_numel(size)
    lists = [*([int(np.prod(shape)) for shape in shapes] for shapes in test_adasum.SHAPES.values()),
             [tile], [tile + 1], [16, tile - 17, 5]]  # fmt: skip
    calls = [
        call_of(rng, family, size, numels, "float32")
        for family in test_adasum.FAMILIES
        for numels in lists
    ]

    def body(rank: ThreadRank) -> list[Tensors]:
        return [rank.grouped_allreduce(call[rank.rank], op="adasum") for call in calls]

    pairs = same_on_all(run_messages(size, body))
    for call, shot, pair in zip(calls, adasum_of(calls, "float32"), pairs, strict=True):
        for index, (left, right) in enumerate(zip(shot, pair, strict=True)):
            vectors = [tensors[index] for tensors in call]
            _, bound = reference.adasum_with_bound(vectors)
            error = reference.norm(left.astype(np.longdouble) - right)
            assert error <= bound + bound_of(vectors, "float32")[1]


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("family", test_gram.FAMILIES, ids=lambda family: family.__name__)
@pytest.mark.parametrize("copies", [1, 200])  # small, large
def test_families_of_gram_matrices_agree_with_the_tree(
    family: test_gram.Family, copies: int, size: int, rng: np.random.Generator
) -> None:
    vectors = [np.tile(vector, copies) for vector in family(rng, size)]
    call = [[vector] for vector in vectors]
    [results] = adasum_of([call], "float64")
    assert_adasum(results, call, "float64")


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("family", [test_adasum.similar, nearly_cancelling])
def test_a_tensor_that_does_not_fit_into_the_ring_passes_twice(
    size: int, family: Any, rng: np.random.Generator
) -> None:
    numel = (RING + (3 << 20)) // 4 + 77
    geometry = testing.SharedGeometry(
        size=size, width=4, chunk_bytes=512 << 10, ring_bytes=RING, max_segments=100, gram_places=8
    )
    chunks = testing.shared_adasum([numel], geometry)["chunks"]
    assert not all(chunk["has_gram"] for chunk in chunks), "it does not pass twice"
    call = call_of(rng, family, size, [9, numel, 1000], "float32")
    [results] = adasum_of([call], "float32", shared_choice=0)
    assert_adasum(results, call, "float32")

    # In place, prescaled: what is packed again must not have been written before.
    def body(rank: ThreadRank) -> list[Tensors]:
        mine = [tensor.copy() for tensor in call[rank.rank]]
        rank.grouped_allreduce(mine, op="adasum", outputs=mine, prescale=0.5, postscale=2.0)
        return [mine]

    for in_place, plain in zip(same_on_all(run_shared(size, body))[0], results, strict=True):
        assert reference.same_bits(in_place, plain)


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_vectors_that_cancel_are_reduced_by_level_for_any_size(
    size: int, rng: np.random.Generator
) -> None:
    tile = testing.shared_tile_numel(size)
    for remainder in (1e-2, 1e-7, 0.0):

        def family(rng: np.random.Generator, size: int, shape: tuple[int, ...],
                   remainder: float = remainder) -> list[NDArray]:  # fmt: skip
            return nearly_cancelling(rng, size, shape, remainder)

        call = call_of(rng, family, size, [100, 2 * tile + 5, 0, 30_000], "float64")
        [results] = adasum_of([call], "float64")
        assert_adasum(results, call, "float64")
    # Only some of the tensors cancel, and the last rank takes back what all others add up to.
    vectors = [rng.standard_normal(tile) for _ in range(size - 1)]
    vectors.append(-sum(vectors) + 1e-9 * rng.standard_normal(tile))
    call = [[vector, 1.0 + vector**2, vector[:50].copy()] for vector in vectors]
    [results] = adasum_of([call], "float64")
    assert_adasum(results, call, "float64")


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("numels", [[500, 3], [40_000, 0, 7, 90_000]])
def test_adasum_comes_with_its_orthogonality(
    size: int, numels: list[int], rng: np.random.Generator
) -> None:
    calls = [call_of(rng, family, size, numels, "float64")
             for family in (*test_adasum.FAMILIES, nearly_cancelling)]  # fmt: skip

    def body(rank: ThreadRank) -> list[tuple]:
        outcomes = []
        for call in calls:
            pending = rank.submit(
                "allreduce", call[rank.rank], op="adasum", groups=[0] * len(numels)
            )
            outcomes.append((pending.wait(), pending.handle.statistics()))
        return outcomes

    by_rank = run_shared(size, body)
    for number, call in enumerate(calls):
        results, (groups, orthogonality, nonfinite) = by_rank[0][number]
        assert all(outcomes[number][1] == by_rank[0][number][1] for outcomes in by_rank)
        assert groups == []
        assert nonfinite == [0] * len(numels)
        assert_adasum(results, call, "float64")
        for index, result in enumerate(results):
            vectors = [tensors[index] for tensors in call]
            total = float(sum(reference.norm(vector) ** 2 for vector in vectors))
            if total == 0:
                assert orthogonality[index] == 1.0
                continue
            _, bound = reference.adasum_with_bound(vectors)
            length = float(reference.norm(result))
            allowed = (2 * length + bound) * bound / total + 1e-12
            assert abs(orthogonality[index] - length**2 / total) <= allowed


# ---- element by element --------------------------------------------------------------------------

LARGE_SHAPES = [(5, 8), (0,), (1,), (30_000,), (333, 11), (70_001,)]
OPS = ["sum", "average", "min", "max", "product"]


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", [*FLOATS, "uint8", "int32", "int64"])
def test_large_reductions_have_the_bits_of_every_type(
    size: int, dtype: str, rng: np.random.Generator
) -> None:
    inputs = [
        [values(rng, int(np.prod(shape)), dtype).reshape(shape) for shape in LARGE_SHAPES]
        for _ in range(size)
    ]

    def body(rank: ThreadRank) -> list[Tensors]:
        return [rank.grouped_allreduce(inputs[rank.rank], op=op, dtype=dtype) for op in OPS]

    for op, results in zip(OPS, same_on_all(run_shared(size, body)), strict=True):
        for place, result in enumerate(results):
            expected = expected_of(op, [inputs[r][place] for r in range(size)], dtype)
            assert reference.same_bits(result.ravel(), expected), (op, place)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_sum_goes_round_the_ring_and_stays_exact(size: int) -> None:
    # Whole numbers that tell rank and place: what lies in a slot too early or too late is seen.
    numel = 2 * RING // 4 + 12_345
    places = np.arange(numel, dtype=np.int64)
    inputs = [((places * (3 + rank)) % 1021 - 500).astype(np.float32) for rank in range(size)]
    expected = sum(inputs[1:], inputs[0])

    def body(rank: ThreadRank) -> None:
        for step in range(3):
            mine = inputs[rank.rank].copy()
            result = rank.allreduce(mine, outputs=[mine if step else np.empty_like(mine)])
            assert reference.same_bits(result, expected)

    run_shared(size, body, shared_choice=0)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("op", ["sum", "average", "adasum"])
def test_sizes_around_every_limit_agree_with_messages(
    size: int, op: str, rng: np.random.Generator
) -> None:
    tile, small = testing.shared_tile_numel(size), small_limit(size, 4)
    numels = [small - 1, small, small + 1, tile - 16, tile - 1, tile, tile + 1, 2 * tile + 15]
    calls = [
        [[rng.standard_normal(numel).astype(np.float32)] for _ in range(size)] for numel in numels
    ]

    def body(rank: ThreadRank) -> list[Tensors]:
        results = []
        for call in calls:
            for scales in ((1.0, 1.0), (0.5, 1.0), (1.0, 4.0), (0.25, 3.0)):
                mine = call[rank.rank]
                options: dict[str, Any] = {"op": op, "prescale": scales[0], "postscale": scales[1]}
                results.append(rank.grouped_allreduce(mine, **options))
                in_place = [tensor.copy() for tensor in mine]
                rank.grouped_allreduce(in_place, outputs=in_place, **options)
                assert reference.same_bits(in_place[0], results[-1][0])
        return results

    shared, messages = same_on_all(run_shared(size, body)), same_on_all(run_messages(size, body))
    if op != "adasum":
        for [left], [right] in zip(shared, messages, strict=True):
            assert reference.same_bits(left, right)
        return
    for index, ([left], [right]) in enumerate(zip(shared, messages, strict=True)):
        vectors = [tensors[0] for tensors in calls[index // 4]]
        factor = [1.0, 0.5, 4.0, 0.75][index % 4]
        # Both are within the bound, and scaling rounds twice more.
        _, bound = reference.adasum_with_bound(vectors)
        allowed = factor * (2 * bound + 4 * UNIT["float32"] * reference.norm(right / factor))
        assert reference.norm(left.astype(np.longdouble) - right) <= allowed


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("op", ["sum", "adasum"])
def test_several_dtypes_in_one_large_call(size: int, op: str, rng: np.random.Generator) -> None:
    # Their parts follow each other through the same slots without an agreement between them.
    dtypes = ["float32", "float64", "float16", "bfloat16"] * 2
    numels = [200_000, 150_000, 60_000, 100_000, 3, 40_000, 1, 0]
    calls = [
        [
            [to_storage(rng.standard_normal(n), d) for n, d in zip(numels, dtypes, strict=True)]
            for _ in range(size)
        ]
        for _ in range(8)
    ]

    def body(rank: ThreadRank) -> list[Tensors]:
        return [rank.grouped_allreduce(call[rank.rank], op=op, dtype=dtypes) for call in calls]

    for call, results in zip(calls, same_on_all(run_shared(size, body)), strict=True):
        for index, (dtype, result) in enumerate(zip(dtypes, results, strict=True)):
            by_rank = [[tensors[index]] for tensors in call]
            if op == "adasum":
                assert_adasum([result], by_rank, dtype)
            else:
                expected = expected_of(op, [tensors[0] for tensors in by_rank], dtype)
                assert reference.same_bits(result, expected), index


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("op", ["sum", "adasum"])
@pytest.mark.parametrize("numel", [100, 60_000])
def test_tensors_that_share_memory_are_as_with_messages(size: int, op: str, numel: int) -> None:
    def body(rank: ThreadRank) -> list[Tensors]:
        rng = np.random.default_rng(rank.rank)
        memory = rng.standard_normal(3 * numel).astype(np.float32)
        first, second, third = memory[:numel], memory[numel : 2 * numel], memory[2 * numel :]
        shifted = memory[numel // 2 : numel // 2 + numel]
        results = []
        for inputs, outputs in [
            ([first, first], None),  # read twice: no overlap
            ([first, first], [first, first]),
            ([first, shifted], [first, shifted]),
            ([first, second], [second, first]),
            ([second, third], [first, second]),
            # Only one rank's tensors overlap.
            ([first, second], [second, third] if rank.rank == 1 else [first, second]),
        ]:
            results.append(
                [x.copy() for x in rank.grouped_allreduce(inputs, op=op, outputs=outputs)]
            )
        return results

    shared, messages = run_shared(size, body), run_messages(size, body)
    for left, right in zip(shared, messages, strict=True):
        for call, (one, other) in enumerate(zip(left, right, strict=True)):
            for x, y in zip(one, other, strict=True):
                if op == "sum":
                    assert reference.same_bits(x, y), call
                else:  # the bits of Adasum in one shot are not those of pairs
                    np.testing.assert_allclose(x, y, rtol=0, atol=64 * UNIT["float32"] * 10)


# ---- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("op", ["sum", "average"])
@pytest.mark.parametrize("scale", [1, 300])  # small, large
def test_statistics_of_groups_agree_with_messages(
    size: int, op: str, scale: int, rng: np.random.Generator
) -> None:
    numels = [40 * scale, 0, 333 * scale, 17, 1000]
    groups = [1, 0, 0, 3, 1]
    inputs = [
        [rng.standard_normal(numel).astype(np.float32) for numel in numels] for _ in range(size)
    ]
    given = [[1.5 + rank, 2.0, 0.0, 7.0 * rank] for rank in range(size)]

    def body(rank: ThreadRank) -> list[tuple]:
        outcomes = []
        for local_squares in ([], given[rank.rank]):
            pending = rank.submit("allreduce", inputs[rank.rank], op=op, groups=groups,
                                  local_squares=local_squares)  # fmt: skip
            outcomes.append((pending.wait(), *pending.handle.statistics()))
        return outcomes

    shared, messages = run_shared(size, body), run_messages(size, body)
    for by_rank in (shared, messages):
        for outcomes in by_rank[1:]:
            for mine, first in zip(outcomes, by_rank[0], strict=True):
                np.testing.assert_array_equal(mine[1], first[1])
                assert mine[2:] == first[2:]
    for (left, rows, _, nonfinite), (right, expected, _, _) in zip(
        shared[0], messages[0], strict=True
    ):
        assert nonfinite == [0] * len(numels)
        for x, y in zip(left, right, strict=True):
            assert reference.same_bits(x, y)
        # Sums of the same numbers in double, in another order, and differences of them.
        n = sum(numels) * size
        largest = max(sum(float(np.sum(x.astype(np.float64) ** 2)) for x in tensors)
                      for tensors in inputs) * size  # fmt: skip
        np.testing.assert_allclose(rows, expected, rtol=0, atol=4 * n * 2.0**-53 * largest)


@pytest.mark.parametrize("numel", [20, 50_000])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_inf_and_nan_are_counted_in_their_tensor(dtype: str, numel: int) -> None:
    def body(rank: ThreadRank) -> list:
        arrays = [np.ones(numel, dtype) for _ in range(3)]
        if rank.rank == 1:
            arrays[1][[3, numel - 5]] = np.inf, np.nan
        counts = []
        for op in ["average", "sum", "adasum"]:
            pending = rank.submit("allreduce", arrays, op=op, groups=[0, 0, 0])
            pending.wait()
            counts.append(pending.handle.statistics()[2])
        return counts

    for counts in run_shared(3, body):
        assert counts == [[0, 2, 0], [0, 2, 0], [0, numel, 0]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_tensors_of_one_group_have_counts_of_their_own(dtype: str) -> None:
    # Many blocks of 8 KiB, of which some have none, several in each tensor.
    numel = 200_000
    wrong = [list(range(7, numel, 1000)), [], [numel - 1], list(range(0, numel, 3))]

    def body(rank: ThreadRank) -> list:
        tensors = [np.ones(numel) for _ in wrong]
        for number, (tensor, places) in enumerate(zip(tensors, wrong, strict=True)):
            if rank.rank == number % 3:
                tensor[places] = np.nan if number % 2 else np.inf
        arrays = [to_storage(tensor, dtype) for tensor in tensors]
        pending = rank.submit("allreduce", arrays, op="average", dtype=dtype, groups=[0, 0, 0, 0])
        pending.wait()
        return pending.handle.statistics()[2]

    assert run_shared(3, body) == [[len(places) for places in wrong]] * 3


def test_finite_results_whose_squares_are_not_are_not_counted() -> None:
    def body(rank: ThreadRank) -> list:
        arrays = [np.full(50_000, 1e300), np.full(50_000, 1e-300)]
        if rank.rank == 1:
            arrays[0][49_000] = np.inf
        pending = rank.submit("allreduce", arrays, op="average", groups=[0, 1])
        pending.wait()
        return pending.handle.statistics()[2]

    assert run_shared(3, body) == [[1, 0]] * 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_averages_whose_sums_overflow_are_counted_though_their_squares_do_not(dtype: str) -> None:
    numel = 50_000

    def body(rank: ThreadRank) -> list:
        # On the way to a sum of 0 in the first tensor, at its end in the second.
        sign = -1.0 if rank.rank == 2 else 1.0
        huge = [np.ones(numel), np.ones(numel), np.ones(numel)]
        huge[0][[7, numel - 1]] = 3e38 * np.array([1.0, sign])
        huge[1][::1000] = 2e38
        arrays = [to_storage(tensor, dtype) for tensor in huge]
        pending = rank.submit("allreduce", arrays, op="average", dtype=dtype, groups=[0, 1, 2])
        pending.wait()
        rows, _, counts = pending.handle.statistics()
        assert np.isfinite(rows).all()
        return counts

    assert run_shared(3, body) == [[2, numel // 1000, 0]] * 3


def test_what_overflows_when_an_average_is_scaled_is_counted() -> None:
    def body(rank: ThreadRank) -> list:
        # Neither the sum of two nor their average overflows.
        arrays = [np.full(50_000, 1e38, np.float32), np.ones(50_000, np.float32)]
        pending = rank.submit("allreduce", arrays, op="average", postscale=4.0, groups=[0, 0])
        pending.wait()
        return pending.handle.statistics()[2]

    assert run_shared(2, body) == [[50_000, 0]] * 2


# ---- other collectives ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
@pytest.mark.parametrize("columns", [3, 5000])
def test_reduce_scatter_of_uneven_rows(
    size: int, dtype: str, columns: int, rng: np.random.Generator
) -> None:
    shapes = [(size + 1, columns), (0, columns), (2, columns), (3 * size - 1, 7), (1, columns)]
    inputs = [
        [values(rng, int(np.prod(shape)), dtype).reshape(shape) for shape in shapes]
        for _ in range(size)
    ]

    def body(rank: ThreadRank) -> Tensors:
        rows = [shape[0] // size + (rank.rank < shape[0] % size) for shape in shapes]
        outputs = [np.zeros((count, *shape[1:]), STORAGE[dtype])
                   for count, shape in zip(rows, shapes, strict=True)]  # fmt: skip
        for op in ("sum", "average", "max"):
            rank.submit(
                "reducescatter", inputs[rank.rank], outputs=outputs, op=op, dtype=dtype
            ).wait()
            whole = [
                expected_of(op, [inputs[r][t] for r in range(size)], dtype).reshape(shape)
                for t, shape in enumerate(shapes)
            ]
            for output, all_rows, shape in zip(outputs, whole, shapes, strict=True):
                first = sum(shape[0] // size + (r < shape[0] % size) for r in range(rank.rank))
                assert reference.same_bits(output, all_rows[first : first + len(output)])
        return outputs

    run_shared(size, body)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("rows", [20, 300_000])
def test_reduce_scatter_may_write_into_its_input(size: int, rows: int) -> None:
    # A rank's rows are not those that lie where its output begins.
    numbers = [(np.arange(rows) * (3 + rank) % 1021).astype(np.float32) for rank in range(size)]
    expected = sum(numbers[1:], numbers[0])

    def body(rank: ThreadRank) -> None:
        count = rows // size + (rank.rank < rows % size)
        first = sum(rows // size + (r < rows % size) for r in range(rank.rank))
        for begin in (0, rows - count, first):
            mine = numbers[rank.rank].copy()
            output = mine[begin : begin + count]
            rank.submit("reducescatter", [mine], outputs=[output]).wait()
            assert reference.same_bits(output, expected[first : first + count])

    run_shared(size, body)


def test_reduce_scatter_of_several_dtypes_reuses_slots(rng: np.random.Generator) -> None:
    size, dtypes = 3, ["float32", "float64", "int32"]
    numels = [300_000, 200_000, 250_000]
    inputs = [[values(rng, n, d) for n, d in zip(numels, dtypes, strict=True)] for _ in range(size)]

    def body(rank: ThreadRank) -> None:
        for _ in range(8):
            outputs = [
                np.zeros(n // size + (rank.rank < n % size), d)
                for n, d in zip(numels, dtypes, strict=True)
            ]
            rank.submit("reducescatter", inputs[rank.rank], outputs=outputs).wait()
            for t, (output, dtype) in enumerate(zip(outputs, dtypes, strict=True)):
                whole = expected_of("sum", [inputs[r][t] for r in range(size)], dtype)
                first = sum(numels[t] // size + (r < numels[t] % size) for r in range(rank.rank))
                assert reference.same_bits(output, whole[first : first + len(output)])

    run_shared(size, body)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("numels", [[5, 0, 77], [100_000, 3, 0, 12_345], [5_000_000]])
def test_broadcast_in_place_and_out_of_place(size: int, numels: list[int]) -> None:
    def body(rank: ThreadRank) -> None:
        for root in {0, size - 1, size // 2} if sum(numels) < 1_000_000 else {size - 1}:
            mine = [np.arange(n, dtype=np.float32) + rank.rank for n in numels]
            results = rank.submit("broadcast", mine, root=root).wait()
            for index, (result, numel) in enumerate(zip(results, numels, strict=True)):
                expected = np.arange(numel, dtype=np.float32) + root
                assert reference.same_bits(result, expected)
                assert reference.same_bits(
                    mine[index], np.arange(numel, dtype=np.float32) + rank.rank
                )
            rank.submit("broadcast", mine, outputs=mine, root=root).wait()
            for left, right in zip(mine, results, strict=True):
                assert reference.same_bits(left, right)

    run_shared(size, body)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
@pytest.mark.parametrize("columns", [1, 3, 40_000])
def test_allgather_where_some_have_no_rows(size: int, columns: int) -> None:
    def rows_of(owner: int, step: int) -> int:
        return (owner * 2 + step) % 4

    def block(owner: int, step: int) -> NDArray:
        numbers = np.arange(rows_of(owner, step) * columns) + 1000 * owner + step
        return numbers.astype(np.float32).reshape(-1, columns)

    def body(rank: ThreadRank) -> None:
        for step in range(5):
            arrays = [block(rank.rank, step), block(rank.rank, step + 2)]
            pending = rank.submit("allgather", arrays)
            results = pending.gathered()
            for offset, result in zip((0, 2), results, strict=True):
                expected = np.concatenate([block(r, step + offset) for r in range(size)])
                assert reference.same_bits(result, expected)
            nothing = rank.allgather(np.zeros((0, columns), np.int16))
            assert nothing.shape == (0, columns)

    run_shared(size, body)


# ---- many requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 5])
def test_many_requests_of_changing_sizes_follow_each_other(size: int) -> None:
    # Whole numbers: every sum is exact. Requests wait in the queue while earlier ones run.
    numels = [3, 50_000, 1, 9000, 0, 200_000, 777]
    total = size * (size + 1) // 2

    def body(rank: ThreadRank) -> None:
        script = np.random.default_rng(7)  # the same on all ranks
        pending = []
        for step in range(300):
            numel = numels[script.integers(len(numels))]
            kind = script.integers(4)
            mine = np.full(numel, float((rank.rank + 1) * (step + 1)), np.float32)
            if kind == 0:
                pending.append((rank.submit("broadcast", [mine], root=step % size),
                                (step % size + 1) * (step + 1)))  # fmt: skip
            elif kind == 1:
                results = rank.submit("allgather", [mine]).gathered()
                expected = np.repeat((np.arange(size) + 1.0) * (step + 1), numel)
                assert reference.same_bits(results[0], expected.astype(np.float32))
            else:
                pending.append((rank.submit("allreduce", [mine]), total * (step + 1)))
            while len(pending) > 5:
                request, value = pending.pop(0)
                (result,) = request.wait()
                assert (result == value).all()
        for request, value in pending:
            assert (request.wait()[0] == value).all()

    run_shared(size, body)


def test_two_process_sets_share_memory_of_their_own() -> None:
    numel = 100_000

    def body(rank: ThreadRank) -> None:
        sets = [rank.engine.add_process_set([0, 1, 2]), rank.engine.add_process_set([2, 3])]
        members = [m for m, ranks in zip(sets, ([0, 1, 2], [2, 3]), strict=True)
                   if rank.rank in ranks]  # fmt: skip
        for step in range(10):
            pending = []
            # Rank 2 is in both, and in the order that the step says.
            for process_set in members if step % 2 else members[::-1]:
                mine = np.full(numel if step % 3 else 10, float(rank.rank + step), np.float32)
                pending.append((process_set, rank.submit("allreduce", [mine],
                                                         process_set=process_set)))  # fmt: skip
            for process_set, request in pending:
                ranks = [0, 1, 2] if process_set == sets[0] else [2, 3]
                assert (request.wait()[0] == sum(r + step for r in ranks)).all()
        for process_set in members:
            assert rank.engine.shared_memory(process_set).is_used

    run_shared(4, body)


@pytest.mark.parametrize("size", [2, 3])
def test_barriers_pass_while_a_large_request_runs(size: int) -> None:
    numel = 6_000_000

    def body(rank: ThreadRank) -> None:
        mine = np.full(numel, rank.rank + 1.0, np.float32)
        request = rank.submit("allreduce", [mine])
        for _ in range(20):
            rank.barrier()
        assert (request.wait()[0] == size * (size + 1) / 2).all()

    run_shared(size, body)


def test_a_rank_that_comes_late_finds_the_others_waiting() -> None:
    has_waited = threading.Event()

    def body(rank: ThreadRank) -> None:
        for numel in (10, 200_000):
            has_waited.clear()
            rank.barrier()
            if rank.rank == 1:
                rank.wait_until(has_waited)
            mine = np.full(numel, rank.rank + 1.0, np.float32)
            request = rank.submit("allreduce", [mine], op="adasum" if numel > 10 else "sum")
            if rank.rank == 0:
                assert not request.handle.wait_for(0.05), "rank 1 has not come yet"
                has_waited.set()
            (result,) = request.wait()
            # Of parallel vectors: the weighted mean 1/4 + 2/4 + 3/2.
            assert (result == (6.0 if numel == 10 else 2.25)).all()
            rank.barrier()

    run_shared(3, body)


# ---- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["sum", "adasum"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_choice_of_chunks_and_stores_gives_the_same_bits(
    size: int, op: str, rng: np.random.Generator
) -> None:
    numels = [3, 2_000_000, 70_000, 0, 500, 4_000_000]
    call = call_of(rng, test_adasum.similar, size, numels, "float32")
    for tensors in call:  # this one needs levels
        tensors.append(tensors[2] * 1e-3)
    for rank in range(1, size, 2):
        call[rank][-1] = -call[rank - 1][-1] + np.float32(1e-4) * call[rank][4][0]

    def body(rank: ThreadRank) -> list[Tensors]:
        pending = rank.submit("allreduce", call[rank.rank], op=op, groups=[0] * len(call[0]))
        results = pending.wait()
        groups, orthogonality, _ = pending.handle.statistics()
        return [[*results, np.array(groups), np.array(orthogonality)]]

    by_choice = [same_on_all(run_shared(size, body, shared_choice=choice))[0]
                 for choice in range(NUM_CHOICES)]  # fmt: skip
    for results in by_choice[1:]:
        for left, right in zip(results, by_choice[0], strict=True):
            assert reference.same_bits(left, right)


# Collective, options of the call; "in place": outputs are the inputs.
CALLS_OF_EVERY_CHOICE: dict[str, tuple[str, dict[str, Any]]] = {
    "sum": ("allreduce", {"op": "sum"}),
    "sum in place": ("allreduce", {"op": "sum"}),
    "sum of scaled": ("allreduce", {"op": "sum", "prescale": 0.3}),
    "scaled sum": ("allreduce", {"op": "sum", "postscale": 0.3}),
    "average": ("allreduce", {"op": "average", "groups": "all"}),
    "average in place": ("allreduce", {"op": "average", "groups": "all"}),
    "adasum": ("allreduce", {"op": "adasum"}),
    "adasum in place": ("allreduce", {"op": "adasum"}),
    "scatter": ("reducescatter", {"op": "sum"}),
    "scatter of scaled": ("reducescatter", {"op": "sum", "prescale": 0.5}),
    "scaled scatter": ("reducescatter", {"op": "sum", "postscale": 0.5}),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("what", CALLS_OF_EVERY_CHOICE)
def test_every_choice_gives_the_same_results_wherever_they_go(
    what: str, size: int, workers: int, rng: np.random.Generator
) -> None:
    # Around the 4,096 bytes from which parts are streamed, and not at the beginning of lines.
    collective, given = CALLS_OF_EVERY_CHOICE[what]
    numels = [1023, 1025, 300_001, 5, 6144, 100_003]
    call = call_of(rng, test_adasum.similar, size, numels, "float32")
    for rank in range(size):
        call[rank].append(call[0][2] * np.float32((-1) ** rank))  # cancels
        call[rank].append(call[0][2] * np.float32(1 + rank))
    if "average" in what:
        call[-1][2][[0, 150_000, 300_000]] = np.nan, np.inf, -np.inf
    options = {**given, "groups": [0] * len(call[0])} if "groups" in given else given

    def body(rank: ThreadRank) -> list:
        inputs = [as_part_of_more(array) for array in call[rank.rank]]
        if collective == "reducescatter":
            inputs = [array[: array.size // size * size].reshape(size, -1) for array in inputs]
            outputs = [as_part_of_more(np.full_like(array[0], np.nan)) for array in inputs]
        else:
            outputs = inputs if "in place" in what else [as_part_of_more(a) for a in inputs]
        pending = rank.submit(collective, inputs, outputs=outputs, **options)
        pending.wait()
        # Later calls must not find anything of this one.
        rank.grouped_allreduce([np.ones(400_000, np.float32)])
        return [*outputs, *(np.array(part) for part in pending.handle.statistics())]

    expected, *others = [
        run_shared(size, body, shared_choice=choice, workers=workers)
        for choice in range(NUM_CHOICES)
    ]
    for by_rank in others:
        for mine, theirs in zip(by_rank, expected, strict=True):
            for left, right in zip(mine, theirs, strict=True):
                assert reference.same_bits(left, right)
    if collective == "allreduce":
        same_on_all([[results] for results in expected])
    if what in ("sum", "sum in place"):
        total = sum(call[rank][2] for rank in range(size))
        assert reference.same_bits(expected[0][2], total)
    if collective == "reducescatter":
        total = sum(call[rank][2] for rank in range(size))
        total = total[: total.size // size * size].reshape(size, -1)
        total *= np.float32(1.0 if what == "scatter" else 0.5)
        for rank, results in enumerate(expected):
            assert reference.same_bits(results[2], total[rank : rank + 1].ravel())
    if "average" in what:
        assert [results[-1].tolist() for results in expected] == [[0, 0, 3, 0, 0, 0, 0, 0]] * size


def as_part_of_more(array: NDArray) -> NDArray:
    room = np.full(array.size + 3, np.nan, array.dtype)
    room[3:] = array.ravel()
    return room[3:].reshape(array.shape)


@pytest.mark.parametrize("op", ["sum", "adasum"])
def test_repeating_a_call_visits_all_choices_and_keeps_its_bits(
    op: str, rng: np.random.Generator
) -> None:
    call = call_of(rng, test_adasum.similar, 2, [300_000, 5], "float32")

    def body(rank: ThreadRank) -> list[Tensors]:
        results = [
            rank.grouped_allreduce(call[rank.rank], op=op) for _ in range(REQUESTS_THAT_TRY_ALL)
        ]
        if rank.rank == 0:
            ((_, choice, requests),) = rank.engine.shared_memory(0).choices
            assert choice in testing.SharedTuning.choices()
            assert requests == REQUESTS_THAT_TRY_ALL
        return results

    first, *others = same_on_all(run_shared(2, body))
    for results in others:
        for left, right in zip(results, first, strict=True):
            assert reference.same_bits(left, right)


@pytest.mark.parametrize("choice", range(NUM_CHOICES))
def test_a_caller_looks_for_long_within_a_call_only_where_that_was_chosen(choice: int) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs 2 cores")
    calls = 20

    def body(rank: ThreadRank) -> int:
        tensor = np.ones(4 << 20, np.float32)
        for _ in range(calls):
            rank.grouped_allreduce([tensor], drives=True)
        return rank.engine.shared_memory(0).long_looks

    looks = run_shared(2, body, shared_choice=choice)
    if "short looks" in testing.SharedTuning.choices()[choice]:
        assert max(looks) <= calls  # for the others to come to the call
    else:
        assert max(looks) > calls


def test_the_engine_s_thread_never_looks_for_long() -> None:
    def body(rank: ThreadRank) -> int:
        for numel in (10, 1 << 20):
            rank.allreduce(np.ones(numel, np.float32))
        return rank.engine.shared_memory(0).long_looks

    assert run_shared(2, body, shared_choice=0) == [0, 0]


def test_a_choice_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=f"shared_choice must be below {NUM_CHOICES}, got 99"):
        _core.Settings(warn_after=1.0, fail_after=2.0, shared_memory=True, shared_choice=99)
