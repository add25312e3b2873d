"""CUDA kernels that move, scale and reduce, executed by the emulation.

Oracles: for bits, the CPU's kernels (NaN: only that it is one), which have tests of their own; for
sums of squares exact integers and math.fsum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

import reference
from adareduce._core import testing
from emulated_kernels import F32, F64, Kernels, Segments, aligned, aligned_copy, kernels
from test_cuda_kernels import FLOATS, ITEM, NUMELS, doubles_of, integers, random
from thread_ranks import DTYPES, STORAGE

__all__ = ["kernels"]

INTEGERS = ["uint8", "int8", "int16", "int32", "int64"]
SUM, MIN, MAX, PRODUCT = range(4)
OPS = [SUM, MIN, MAX, PRODUCT]
GUARD = 32  # elements before and behind tensors that must not change


def any_bits(rng: np.random.Generator, numel: int, dtype: str) -> NDArray:
    """Arbitrary bytes: NaN payloads, signed zeros and subnormals among them."""
    if dtype == "bool":
        return aligned_copy(rng.integers(0, 2, numel).astype(bool))
    return aligned_copy(np.frombuffer(rng.bytes(numel * STORAGE[dtype].itemsize), STORAGE[dtype]))


def tensors_of(
    rng: np.random.Generator, numels: Sequence[int], dtype: str, misaligned: bool
) -> list[NDArray]:
    """Somewhere in memory: aligned to 16 bytes, or to the element only, by all steps in turn."""
    width = STORAGE[dtype].itemsize
    offsets = [(t * width if misaligned else 0) % 16 for t in range(len(numels))]
    return [
        aligned_copy(any_bits(rng, numel, dtype), offset)
        for numel, offset in zip(numels, offsets, strict=True)
    ]


def nan_to_one(array: NDArray, dtype: str) -> NDArray:
    """All NaN replaced: sign and payload of a result's NaN are not promised."""
    if dtype not in FLOATS:
        return array
    return np.where(np.isnan(doubles_of(array, dtype)), np.array(1, array.dtype), array)


def assert_same(found: NDArray, expected: NDArray, dtype: str) -> None:
    assert reference.same_bits(nan_to_one(found, dtype), nan_to_one(expected, dtype))


# ---- pack ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_has_the_bytes_of_the_cpu_and_zeroes_the_padding(
    kernels: Kernels, dtype: str, misaligned: bool, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    numel += 35  # padding behind the last tensor
    tensors = tensors_of(rng, NUMELS, dtype, misaligned)
    memory = aligned(numel + 2 * GUARD, STORAGE[dtype])
    untouched = memory[:GUARD].copy()
    fused = memory[GUARD : GUARD + numel]
    kernels.pack(tensors, segments, 1.0, fused, dtype)
    expected = np.empty(numel, STORAGE[dtype])
    testing.pack(DTYPES[dtype], tensors, segments, 1.0, expected, numel)
    assert reference.same_bits(fused, expected)
    assert reference.same_bits(memory[:GUARD], untouched)
    assert reference.same_bits(memory[GUARD + numel :], untouched)


def test_pack_zeroes_what_lies_before_the_first_tensor_and_around_empty_ones(
    kernels: Kernels,
) -> None:
    # Room for statistics lies between segments: more than the padding to 16 elements.
    segments = [(16, 0), (32, 5), (64, 0), (320, 3), (400, 0)]
    tensors = [aligned_copy(np.ones(n, np.float32)) for _, n in segments]
    fused = aligned(512, np.float32)
    kernels.pack(tensors, segments, 1.0, fused, "float32")
    assert np.flatnonzero(fused).tolist() == [32, 33, 34, 35, 36, 320, 321, 322]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_pack_of_nothing_zeroes_the_buffer(kernels: Kernels, scale: float) -> None:
    fused = aligned(40, np.float32)
    kernels.pack([], [], scale, fused, "float32")
    assert reference.same_bits(fused, np.zeros(40, np.float32))
    fused = aligned(40, np.float32)
    empty, squares = aligned(0, np.float32), np.full(2, np.nan)
    kernels.pack([empty, empty], [(0, 0), (16, 0)], scale, fused, "float32", squares)
    assert reference.same_bits(fused, np.zeros(40, np.float32))
    assert reference.same_bits(squares, np.zeros(2))


# ---- unpack --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_has_the_bits_of_the_cpu_and_writes_nothing_else(
    kernels: Kernels, dtype: str, misaligned: bool, scale: float, rng: np.random.Generator
) -> None:
    if dtype == "bool" and scale != 1.0:
        with pytest.raises(ValueError, match=r"unpack: dtype must be one .* got bool"):
            kernels.unpack(np.ones(1, bool), [(0, 1)], scale, [np.ones(1, bool)], dtype)
        return
    segments, numel = testing.lay_out(NUMELS)
    fused = any_bits(rng, numel, dtype)
    whole = tensors_of(rng, [count + 2 * GUARD for count in NUMELS], dtype, misaligned)
    expected = [tensor.copy() for tensor in whole]
    testing.unpack(
        DTYPES[dtype], fused, segments, scale, [tensor[GUARD:-GUARD] for tensor in expected]
    )
    kernels.unpack(fused, segments, scale, [tensor[GUARD:-GUARD] for tensor in whole], dtype)
    for found, tensor in zip(whole, expected, strict=True):
        if scale == 1.0:
            assert reference.same_bits(found, tensor)
        else:
            assert_same(found, tensor, dtype)


# ---- scaling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("scale", [1 / 3, -2.0, 0.0, 1e-20, 1e18])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_scaling_has_the_bits_of_the_cpu(
    kernels: Kernels, dtype: str, scale: float, misaligned: bool, rng: np.random.Generator
) -> None:
    numels = [40, 0, 1, 4097, 33]
    segments, numel = testing.lay_out(numels)
    tensors = tensors_of(rng, numels, dtype, misaligned)
    fused, expected = aligned(numel, STORAGE[dtype]), np.empty(numel, STORAGE[dtype])
    kernels.pack(tensors, segments, scale, fused, dtype)
    testing.pack(DTYPES[dtype], tensors, segments, scale, expected, numel)
    assert_same(fused, expected, dtype)


# ---- squares and counts --------------------------------------------------------------------------


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("accumulator", [F64, F32])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("dtype", FLOATS)
def test_squares_of_integers_are_exact(
    kernels: Kernels,
    dtype: str,
    scale: float,
    accumulator: int,
    misaligned: bool,
    rng: np.random.Generator,
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    tensors = [
        aligned_copy(integers(rng, n, dtype), STORAGE[dtype].itemsize if misaligned else 0)
        for n in NUMELS
    ]
    exact = [float((doubles_of(tensor, dtype) ** 2).sum()) for tensor in tensors]
    fused, squares = aligned(numel, STORAGE[dtype]), np.full(len(NUMELS), np.nan)
    kernels.pack(tensors, segments, scale, fused, dtype, squares, accumulator)
    in_buffer = [scale**2 * square for square in exact]
    assert squares.tolist() == in_buffer  # of what was written
    squares[:] = np.nan
    kernels.unpack(fused, segments, 1 / scale, tensors, dtype, None, squares, accumulator)
    assert squares.tolist() == in_buffer  # of what was read
    again = [float((doubles_of(tensor, dtype) ** 2).sum()) for tensor in tensors]
    assert again == exact


@pytest.mark.parametrize("dtype", FLOATS)
def test_squares_are_within_the_error_of_a_sum_whatever_the_alignment(
    kernels: Kernels, dtype: str, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    tensors = [random(rng, n, dtype) for n in NUMELS]
    fused, squares = aligned(numel, STORAGE[dtype]), np.full(len(NUMELS), np.nan)
    kernels.pack(tensors, segments, 1 / 3, fused, dtype, squares)
    written = doubles_of(fused, dtype)
    for (offset, count), square in zip(segments, squares, strict=True):
        # 129 additions of a lane, 5 of a warp, those of items; in float64 the reference's product.
        unit = (129 + 5 + count / ITEM + 2) * 2.0**-53
        exact = math.fsum(written[offset : offset + count] ** 2)
        assert abs(square - exact) <= unit * exact
    for width in range(STORAGE[dtype].itemsize, 16, STORAGE[dtype].itemsize):
        elsewhere = [aligned_copy(tensor, width) for tensor in tensors]
        again = np.full(len(NUMELS), np.nan)
        kernels.pack(elsewhere, segments, 1 / 3, fused, dtype, again)
        assert reference.same_bits(squares, again)


def test_squares_of_tiny_and_huge_numbers_neither_vanish_nor_overflow(kernels: Kernels) -> None:
    tensors = [aligned_copy(np.full(40, v, np.float32)) for v in [1e-45, 1e-30, 1e18, 3e38]]
    segments, numel = testing.lay_out([40] * 4)
    fused, squares = aligned(numel, np.float32), np.full(4, np.nan)
    kernels.pack(tensors, segments, 1.0, fused, "float32", squares)
    exact = [40 * float(tensor[0]) ** 2 for tensor in tensors]
    assert squares == pytest.approx(exact, rel=40 * 2.0**-53, abs=0)
    kernels.pack(tensors, segments, 1.0, fused, "float32", squares, F32)
    assert squares[:2].tolist() == [0, 0]  # what the other accumulator costs
    assert np.isinf(squares[2:]).tolist() == [False, True]


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("with_squares", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinite_and_undefined_results_are_counted(
    kernels: Kernels, dtype: str, with_squares: bool, misaligned: bool, rng: np.random.Generator
) -> None:
    segments, numel = testing.lay_out(NUMELS)
    fused = any_bits(rng, numel, dtype)
    tensors = tensors_of(rng, NUMELS, dtype, misaligned)
    nonfinite = np.full(len(NUMELS), -1, np.int64)
    squares = np.full(len(NUMELS), -1.0) if with_squares else None
    for scale in [1.0, 2.0]:  # large numbers become infinite
        kernels.unpack(fused, segments, scale, tensors, dtype, nonfinite, squares)
        counts = [int((~np.isfinite(doubles_of(t, dtype))).sum()) for t in tensors]
        assert nonfinite.tolist() == counts
        assert dtype == "float64" or sum(counts) > 0


def test_squares_and_counts_are_for_floats(kernels: Kernels) -> None:
    array = aligned(3, np.int32)
    with pytest.raises(ValueError, match=r"pack: dtype must be one .* got int32"):
        kernels.pack([array], [(0, 3)], 1.0, array, "int32", np.zeros(1))
    with pytest.raises(ValueError, match=r"unpack: dtype must be one .* got int32"):
        kernels.unpack(array, [(0, 3)], 1.0, [array], "int32", np.zeros(1, np.int64))


# ---- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 64, 65, 480, 481, 2000, 3840, 3841, 8000])
def test_up_to_3840_tensors_are_one_launch(kernels: Kernels, count: int) -> None:
    numels = [(t + 1) % 5 for t in range(count)]
    segments, numel = testing.lay_out(numels)
    rows = np.arange(numel, dtype=np.float32)
    tensors = [aligned_copy(rows[o : o + n], 4 * (o // 16 % 4)) for o, n in segments]
    fused, squares = aligned(numel, np.float32), np.full(count, np.nan)
    launches = -(-count // 3840)
    before = kernels.kernel_runs()
    kernels.pack(tensors, segments, 1.0, fused, "float32")
    assert kernels.kernel_runs() - before == launches
    for (offset, n), tensor in zip(segments, tensors, strict=True):
        assert fused[offset : offset + n].tolist() == tensor.tolist()
    before = kernels.kernel_runs()
    kernels.pack(tensors, segments, 1.0, fused, "float32", squares)
    assert kernels.kernel_runs() - before == launches + 1
    assert squares.tolist() == [float((t.astype(np.float64) ** 2).sum()) for t in tensors]
    before = kernels.kernel_runs()
    outputs = [aligned(n, np.float32) for n in numels]
    kernels.unpack(fused, segments, 1.0, outputs, "float32")
    assert kernels.kernel_runs() - before == launches
    for output, tensor in zip(outputs, tensors, strict=True):
        assert reference.same_bits(output, tensor)


# ---- reduce --------------------------------------------------------------------------------------


def reduced(
    kernels: Kernels, op: int, inputs: list[NDArray], divisor: float, out: NDArray, dtype: str
) -> None:
    """`out`, which may be an input, receives what the CPU's kernel says."""
    expected = np.empty_like(out)
    copies = [array.copy() for array in inputs]
    testing.reduce(DTYPES[dtype], op, copies, divisor, expected, out.size)
    kernels.reduce(op, inputs, divisor, out, dtype)
    assert_same(out, expected, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_have_the_bits_of_the_cpu(
    kernels: Kernels, dtype: str, op: int, rng: np.random.Generator
) -> None:
    if dtype == "bool" and op == SUM:
        with pytest.raises(ValueError, match=r"reduce: dtype must be one .* got bool"):
            kernels.reduce(op, [np.ones(3, bool)], 1.0, np.ones(3, bool), dtype)
        return
    for numel in [1, 7, 16, 17, 5000]:
        for count in [1, 2, 3, 4, 5, 8, 16, 17]:
            inputs = [any_bits(rng, numel, dtype) for _ in range(count)]
            reduced(kernels, op, inputs, 1.0, aligned(numel, STORAGE[dtype]), dtype)


@pytest.mark.parametrize("divisor", [2.0, 3.0, 7.0, 0.1])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_averages_have_the_bits_of_the_cpu(
    kernels: Kernels, dtype: str, divisor: float, rng: np.random.Generator
) -> None:
    for numel in [1, 17, 3000]:
        for count in [1, 2, 3, 5, 17]:
            inputs = [
                random(rng, numel, dtype) if dtype in FLOATS else any_bits(rng, numel, dtype)
                for _ in range(count)
            ]
            reduced(kernels, SUM, inputs, divisor, aligned(numel, STORAGE[dtype]), dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "bfloat16"])
def test_hundreds_of_inputs_are_added_without_a_rounding_between(
    kernels: Kernels, dtype: str, rng: np.random.Generator
) -> None:
    numel = 50
    extremes = np.iinfo(dtype).max if dtype in INTEGERS else None
    for count, divisor in [(300, 300.0), (3840, 3840.0)]:
        inputs = [random(rng, numel, dtype) if extremes is None
                  else aligned_copy(np.full(numel, extremes, dtype))] * count  # fmt: skip
        reduced(kernels, SUM, inputs, divisor, aligned(numel, STORAGE[dtype]), dtype)


def test_more_inputs_than_a_launch_can_name_are_refused(kernels: Kernels) -> None:
    array = aligned(1, np.float32)
    with pytest.raises(ValueError, match="reduce: num_inputs must be at most 3840, got 3841"):
        kernels.reduce(SUM, [array] * 3841, 1.0, array, "float32")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_not_a_number_wins(kernels: Kernels, op: int, place: int) -> None:
    inputs = [aligned_copy(np.ones(20, np.float32)) for _ in range(3)]
    inputs[place][3] = np.nan
    out = aligned(20, np.float32)
    kernels.reduce(op, inputs, 1.0, out, "float32")
    assert np.isnan(out[3])
    assert np.isfinite(np.delete(out, 3)).all()


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int64"])
def test_reduce_may_write_over_an_input(
    kernels: Kernels, dtype: str, place: int, rng: np.random.Generator
) -> None:
    inputs = [any_bits(rng, 3001, dtype) for _ in range(3)]
    reduced(kernels, SUM, inputs, 1.0, inputs[place], dtype)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_reduce_of_misaligned_arrays(
    kernels: Kernels, dtype: str, rng: np.random.Generator
) -> None:
    width = STORAGE[dtype].itemsize
    for numel in [1, 9, 1001]:
        for places in [(0, 0, 0), (width, width, width), (0, width, 0), (width, 0, 8)]:
            a, b = (aligned_copy(any_bits(rng, numel, dtype), p) for p in places[:2])
            reduced(kernels, SUM, [a, b], 1.0, aligned(numel, STORAGE[dtype], places[2]), dtype)


def test_reduce_of_nothing_leaves_the_output_alone(kernels: Kernels) -> None:
    out = aligned_copy(np.full(5, 9.0, np.float32))
    before = kernels.kernel_runs()
    kernels.reduce(SUM, [], 1.0, out, "float32")
    kernels.reduce(SUM, [aligned(0, np.float32)], 1.0, aligned(0, np.float32), "float32")
    assert kernels.kernel_runs() == before
    assert out.tolist() == [9.0] * 5


# ---- reduce_squares ------------------------------------------------------------------------------

SQUARED: Segments = [(0, 40), (48, 0), (48, 4200), (4256, 33), (4304, 20), (4400, 7)]
GROUPS = [1, 0, 0, 300, 1, 0]
BOUNDS = [(0, 4416), (16, 4280), (3, 4407), (40, 48), (4240, 4240), (4289, 4304)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("misaligned", [False, True])
def test_reduce_squares_has_the_result_of_reduce_and_exact_squares_of_integers(
    kernels: Kernels, dtype: str, misaligned: bool, rng: np.random.Generator
) -> None:
    for bounds in BOUNDS:
        numel = bounds[1] - bounds[0]
        # Where the range starts decides how far its vectors are from multiples of 16 bytes.
        start = (bounds[0] + misaligned) * STORAGE[dtype].itemsize % 16
        inputs = [aligned_copy(integers(rng, numel, dtype), start) for _ in range(3)]
        out, expected = aligned(numel, STORAGE[dtype], start), np.empty(numel, STORAGE[dtype])
        squares = np.zeros((301, 2))
        squares[0] = 1000, 2000  # added to
        kernels.reduce_squares(inputs, 3.0, out, bounds, SQUARED, GROUPS, squares, dtype)
        testing.reduce(DTYPES[dtype], SUM, inputs, 3.0, expected, numel)
        assert reference.same_bits(out, expected), bounds  # padding as well
        values = np.array([doubles_of(array, dtype) for array in inputs])
        exact = np.zeros((301, 2))
        exact[0] = 1000, 2000
        for (offset, count), group in zip(SQUARED, GROUPS, strict=True):
            begin, end = max(offset, bounds[0]), min(offset + count, bounds[1])
            part = values[:, begin - bounds[0] : max(begin, end) - bounds[0]]
            exact[group] += (part**2).sum(), (part.sum(0) ** 2).sum()
        assert squares.tolist() == exact.tolist(), bounds


@pytest.mark.parametrize("dtype", FLOATS)
def test_reduce_squares_agrees_with_the_cpu(
    kernels: Kernels, dtype: str, rng: np.random.Generator
) -> None:
    bounds = BOUNDS[0]
    inputs = [random(rng, bounds[1], dtype) for _ in range(5)]
    out, squares = aligned(bounds[1], STORAGE[dtype]), np.zeros((301, 2))
    kernels.reduce_squares(inputs, 5.0, out, bounds, SQUARED, GROUPS, squares, dtype)
    expected = np.empty_like(out)
    on_cpu = testing.reduce_squares(
        DTYPES[dtype], inputs, 5.0, expected, bounds, SQUARED, GROUPS, 301
    )
    assert_same(out, expected, dtype)
    # Sums of positive numbers; the longer chain has 5 x 130 of them, the CPU's 5 x 4300 / 16.
    unit = 2 * (5 * 4300 / 16 + 60) * 2.0**-53
    of_inputs, of_results = np.array(on_cpu).reshape(-1, 2).T
    assert squares[:, 0] == pytest.approx(of_inputs, rel=unit)
    # Here sums are squared that were rounded to float32 four times; the CPU's are in double. By
    # Cauchy and Schwarz (|x_1| + ... + |x_5|)^2 is at most 5 times the sum of the squares.
    rounding = 2.0 ** (-53 if dtype == "float64" else -24)
    errors = np.abs(squares[:, 1] - of_results)
    assert (errors <= unit * of_results + 2 * 4 * rounding * 5 * of_inputs).all()


def test_thousands_of_segments_in_interleaved_groups_are_all_counted(kernels: Kernels) -> None:
    segments, numel = testing.lay_out([1] * 1000)
    groups = [s * 7 % 600 for s in range(1000)]  # some share a thread of the block that adds
    ones = aligned_copy(np.ones(numel, np.float32))
    out, squares = aligned(numel, np.float32), np.zeros((600, 2))
    before = kernels.kernel_runs()
    kernels.reduce_squares([ones, ones], 1.0, out, (0, numel), segments, groups, squares, "float32")
    assert kernels.kernel_runs() - before == 3
    counts = np.bincount(groups, minlength=600)
    assert squares.tolist() == np.column_stack([2 * counts, 4 * counts]).tolist()


# ---- group_stats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("times", [1.0, 4.0])
def test_group_stats_are_those_of_the_formula(
    kernels: Kernels, of_groups: bool, times: float, rng: np.random.Generator
) -> None:
    # Oracle: docs/algorithms.md, "Variance and norm", in float64.
    num_segments, num_groups, ranks = 700, 5, 3
    groups = rng.integers(0, num_groups - 1, num_segments)  # the last group is empty
    member = groups[None] == np.arange(num_groups)[:, None]
    of_result = rng.uniform(1, 2, num_segments) * times**2
    squares = rng.uniform(5, 6, (ranks, num_groups if of_groups else num_segments))
    stats = kernels.group_stats(groups.tolist(), num_groups, squares, of_result, of_groups, times)
    total = squares.sum(0) if of_groups else member @ squares.sum(0)
    of_mean = member @ of_result / times**2
    variance = (total - ranks * of_mean) / (ranks - 1)
    expected = np.column_stack([total, of_mean, variance, of_mean - variance / ranks])
    assert stats == pytest.approx(expected, rel=num_segments * 2.0**-52, abs=1e-12)
    estimates = [testing.variance_and_norm(a, b, ranks) for a, b in stats[:, :2].tolist()]
    assert reference.same_bits(stats[:, 2:].copy(), np.array(estimates))


def test_group_stats_of_one_rank_or_given_squares_have_no_estimates(kernels: Kernels) -> None:
    squares = np.array([[3.0, 4.0]])
    one = kernels.group_stats([0, 0], 1, squares, np.array([3.0, 4.5]))
    assert one[0, :2].tolist() == [7, 7.5]
    assert np.isnan(one[0, 2:]).all()
    given = kernels.group_stats([0, 0], 1, np.repeat(squares, 2, 0), squares[0],
                                has_estimates=False)  # fmt: skip
    assert given[0, :2].tolist() == [14, 7]
    assert np.isnan(given[0, 2:]).all()


def test_group_stats_add_ranks_in_their_order(kernels: Kernels) -> None:
    squares = np.array([[2.0**53], [1.0], [1.0]])
    stats = kernels.group_stats([0], 1, squares, np.ones(1))
    assert stats[0, 0] == 2.0**53  # 1 + 1 first would be visible
    stats = kernels.group_stats([0], 1, squares[::-1].copy(), np.ones(1))
    assert stats[0, 0] == 2.0**53 + 2


def test_group_stats_of_no_groups_is_legal(kernels: Kernels) -> None:
    assert kernels.group_stats([], 0, np.empty((2, 0)), np.empty(0)).size == 0
