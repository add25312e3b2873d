"""The CUDA side of the kernel table against torch in float64, on memory of the device."""

from __future__ import annotations

import pytest
import torch
from device import CODES, DOUBLE, FLOATS, Machine, bits, clipped, lay_out, random, rounded

# Empty, shorter than a vector, odd, around the length of an item (4096), several items.
NUMELS = [5, 8, 0, 1, 4095, 4096, 4097, 20_011, 3]


def pair(gpu: Machine, dtype: torch.dtype, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
    return gpu.put(random(numel, dtype, 1)), gpu.put(random(numel, dtype, 2))


def ranges_of(segments: list[tuple[int, int]], numel: int) -> list[tuple[int, int]]:
    """Everything, nothing, and cuts inside segments, aligned to 16 elements and not."""
    middle = segments[-2][0]
    return [(0, numel), (7, 7), (16, middle + 4096), (3, middle + 4099), (middle + 1, middle + 2)]


def sums_of_pair(lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    a, b = lower.double(), upper.double()
    return torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])


@pytest.mark.parametrize("accumulator", ["f64", "f32"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pair_stats_are_those_of_each_segment_inside_the_range(
    gpu: Machine, dtype: torch.dtype, accumulator: str
) -> None:
    if accumulator not in gpu.testing.accumulators():
        pytest.skip(f"this build has no {accumulator} accumulator")
    segments, numel = lay_out(NUMELS)
    buffer = gpu.testing.Buffer(segments, CODES[dtype])
    lower, upper = pair(gpu, dtype, numel)
    for begin, end in ranges_of(segments, numel):
        stats = gpu.nothing(3 * len(segments))
        gpu.testing.pair_stats(buffer, lower.data_ptr(), upper.data_ptr(), begin, end,
                               stats.data_ptr(), gpu.stream(), accumulator)  # fmt: skip
        gpu.wait()
        for row, segment in zip(stats.view(-1, 3).cpu(), segments, strict=True):
            a, b = lower[clipped(segment, begin, end)], upper[clipped(segment, begin, end)]
            # n products and sums in float64, on both sides; with float32 sums of at most 128
            # products and 5 levels of the warp in float32 (docs: pair.cu).
            size = sums_of_pair(a, b).cpu()
            size[0] = float((a.double() * b.double()).abs().sum())
            unit = 2 * (a.numel() + 1) * DOUBLE
            if accumulator == "f32" and dtype != torch.float64:
                unit += (128 + 5) * 2.0**-24
            assert ((row - sums_of_pair(a, b).cpu()).abs() <= unit * size).all(), (begin, end)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pair_stats_repeat_bit_for_bit(gpu: Machine, dtype: torch.dtype) -> None:
    segments, numel = lay_out([100_003, 17])
    buffer = gpu.testing.Buffer(segments, CODES[dtype])
    lower, upper = pair(gpu, dtype, numel)
    found = []
    for _ in range(3):
        stats = gpu.nothing(6)
        gpu.testing.pair_stats(buffer, lower.data_ptr(), upper.data_ptr(), 0, numel,
                               stats.data_ptr(), gpu.stream())  # fmt: skip
        gpu.wait()
        found.append(bits(stats).cpu())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e18])
def test_statistics_of_tiny_and_huge_vectors_neither_vanish_nor_overflow(
    gpu: Machine, scale: float
) -> None:
    # 1e-30^2 and 1e18^2 are beyond float32. Oracle: float64, which they are not beyond.
    segments, numel = lay_out([5000])
    buffer = gpu.testing.Buffer(segments, CODES[torch.float32])
    lower, upper = (t * scale for t in pair(gpu, torch.float32, numel))
    stats = gpu.nothing(3)
    gpu.testing.pair_stats(buffer, lower.data_ptr(), upper.data_ptr(), 0, numel, stats.data_ptr(),
                           gpu.stream())  # fmt: skip
    gpu.wait()
    expected = sums_of_pair(lower[:5000], upper[:5000])
    assert (expected[1:] > 0).all()
    assert (stats - expected).abs().max() <= 2 * 5001 * DOUBLE * expected[1:].max()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pair_combine_rounds_the_weighted_sum_once_and_stays_in_its_range(
    gpu: Machine, dtype: torch.dtype
) -> None:
    segments, numel = lay_out(NUMELS)
    buffer = gpu.testing.Buffer(segments, CODES[dtype])
    lower, upper = pair(gpu, dtype, numel)
    stats = torch.stack([sums_of_pair(lower[o : o + n], upper[o : o + n]) for o, n in segments])
    stats[4] = torch.tensor([0.5, 0.0, 1.0])  # a norm of zero keeps the whole vector
    for begin, end in ranges_of(segments, numel):
        out = gpu.nothing(numel, dtype)
        before = bits(out).clone()
        expected = out.clone()
        for (dot, aa, bb), segment in zip(stats.tolist(), segments, strict=True):
            part = clipped(segment, begin, end)
            a_share = 1 - 0.5 * (dot / aa) if aa >= 2.0**-511 else 1.0
            b_share = 1 - 0.5 * (dot / bb) if bb >= 2.0**-511 else 1.0
            expected[part] = rounded(
                a_share * lower[part].double() + b_share * upper[part].double(), dtype
            )
        gpu.testing.pair_combine(buffer, lower.data_ptr(), upper.data_ptr(), begin, end,
                                 stats.data_ptr(), out.data_ptr(), gpu.stream())  # fmt: skip
        gpu.wait()
        inside = torch.zeros(numel, dtype=torch.bool, device=gpu.device)
        for segment in segments:
            inside[clipped(segment, begin, end)] = True
        assert torch.equal(bits(out)[inside], bits(expected)[inside]), (begin, end)
        outside = torch.ones(numel, dtype=torch.bool, device=gpu.device)
        outside[begin:end] = False  # padding inside the range may be written
        assert torch.equal(bits(out)[outside], before[outside]), (begin, end)


@pytest.mark.parametrize("operand", ["lower", "upper"])
def test_pair_combine_works_in_place(gpu: Machine, operand: str) -> None:
    segments, numel = lay_out([9000, 5])
    buffer = gpu.testing.Buffer(segments, CODES[torch.float32])
    operands = dict(zip(("lower", "upper"), pair(gpu, torch.float32, numel), strict=True))
    pointers = [tensor.data_ptr() for tensor in operands.values()]
    stats, out = gpu.nothing(6), gpu.nothing(numel, torch.float32)
    gpu.testing.pair_stats(buffer, *pointers, 0, numel, stats.data_ptr(), gpu.stream())
    for target in (out, operands[operand]):
        gpu.testing.pair_combine(buffer, *pointers, 0, numel, stats.data_ptr(), target.data_ptr(),
                                 gpu.stream())  # fmt: skip
    gpu.wait()
    for offset, count in segments:
        part = slice(offset, offset + count)
        assert torch.equal(bits(operands[operand][part]), bits(out[part]))


def placed(gpu: Machine, dtype: torch.dtype, shift: int) -> list[torch.Tensor]:
    """Tensors that begin `shift` elements behind an address of 16 bytes."""
    return [gpu.put(random(n + shift, dtype, 10 + i))[shift:] for i, n in enumerate(NUMELS)]


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pack_and_unpack_are_scaled_copies_with_sums_of_squares(
    gpu: Machine, dtype: torch.dtype, scale: float, shift: int
) -> None:
    segments, numel = lay_out(NUMELS)
    buffer = gpu.testing.Buffer(segments, CODES[dtype])
    tensors = placed(gpu, dtype, shift)
    fused = gpu.nothing(numel, dtype)
    squares = gpu.nothing(len(segments))
    gpu.testing.pack(buffer, [t.data_ptr() for t in tensors], fused.data_ptr(), scale,
                     squares.data_ptr(), gpu.stream())  # fmt: skip
    gpu.wait()
    expected = torch.zeros(numel, dtype=dtype, device=gpu.device)
    for tensor, (offset, count) in zip(tensors, segments, strict=True):
        expected[offset : offset + count] = (
            tensor if scale == 1 else rounded(tensor.double() * scale, dtype)
        )
    assert torch.equal(bits(fused), bits(expected)), "padding is zero"
    check_squares(squares, [fused[o : o + n] for o, n in segments])

    back = [gpu.nothing(n + shift, dtype) for n in NUMELS]
    nonfinite = gpu.nothing(len(segments), torch.int64)
    squares = gpu.nothing(len(segments))
    fused[segments[4][0]] = float("inf")
    fused[segments[7][0] + 20_010] = float("nan")
    gpu.testing.unpack(buffer, fused.data_ptr(), [t[shift:].data_ptr() for t in back], scale,
                       nonfinite.data_ptr(), squares.data_ptr(), gpu.stream())  # fmt: skip
    gpu.wait()
    for tensor, (offset, count) in zip(back, segments, strict=True):
        source = fused[offset : offset + count]
        wanted = source if scale == 1 else rounded(source.double() * scale, dtype)
        # Equal bits, but for sign and payload of a NaN.
        assert torch.equal(tensor[shift:].isnan(), wanted.isnan())
        numbers = ~wanted.isnan()
        assert torch.equal(bits(tensor[shift:])[numbers], bits(wanted)[numbers])
        assert tensor[:shift].isnan().all(), "nothing is written before a tensor"
    assert nonfinite.tolist() == [0, 0, 0, 0, 1, 0, 0, 1, 0]
    finite = [i for i in range(len(segments)) if i not in (4, 7)]
    parts = [fused[o : o + n] for o, n in segments]
    check_squares(squares[finite], [parts[i] for i in finite])
    assert squares[4].isinf()
    assert squares[7].isnan()


def check_squares(found: torch.Tensor, parts: list[torch.Tensor]) -> None:
    expected = torch.stack([part.double().square().sum() for part in parts])
    counts = torch.tensor([part.numel() for part in parts], device=found.device)
    assert ((found - expected).abs() <= 2 * (counts + 1) * DOUBLE * expected).all()


def test_2000_small_tensors_are_packed_and_summed_in_one_call(gpu: Machine) -> None:
    numels = [1 + 37 * index % 64 for index in range(2000)]
    segments, numel = lay_out(numels)
    buffer = gpu.testing.Buffer(segments, CODES[torch.float32])
    tensors = [gpu.put(random(n, torch.float32, i)) for i, n in enumerate(numels)]
    fused, squares = gpu.nothing(numel, torch.float32), gpu.nothing(2000)
    gpu.testing.pack(buffer, [t.data_ptr() for t in tensors], fused.data_ptr(), 1.0,
                     squares.data_ptr(), gpu.stream())  # fmt: skip
    gpu.wait()
    for tensor, (offset, count) in zip(tensors, segments, strict=True):
        assert torch.equal(fused[offset : offset + count], tensor)
    check_squares(squares, tensors)


def test_pointers_of_a_call_may_change_before_it_runs(gpu: Machine) -> None:
    # The host's array of pointers is the caller's again when the call returns.
    segments, numel = lay_out([1000] * 300)
    buffer = gpu.testing.Buffer(segments, CODES[torch.float32])
    first = [gpu.put(torch.full((1000,), 1.0 + i)) for i in range(300)]
    second = [gpu.put(torch.full((1000,), -1.0 - i)) for i in range(300)]
    fused = [gpu.nothing(numel, torch.float32) for _ in range(2)]
    for tensors, target in zip((first, second), fused, strict=True):
        gpu.testing.pack(buffer, [t.data_ptr() for t in tensors], target.data_ptr(), 1.0, 0,
                         gpu.stream())  # fmt: skip
    gpu.wait()
    for tensors, target in zip((first, second), fused, strict=True):
        for tensor, (offset, count) in zip(tensors, segments, strict=True):
            assert torch.equal(target[offset : offset + count], tensor)


def test_items_are_cut_at_segments_and_at_4096_elements(gpu: Machine) -> None:
    segments, _ = lay_out([4097, 0, 3])
    buffer = gpu.testing.Buffer(segments, CODES[torch.float32])
    third = segments[2][0]
    assert list(buffer.items) == [(0, 4096, 0), (4096, 1, 0), (third, 3, 2)]


def test_a_tensor_of_more_than_2_gib_is_walked_to_its_end(real_gpu: Machine) -> None:
    numel = 2**30 + 2**20 + 3  # of two bytes: offsets beyond 31 bits
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2 * numel:
        pytest.skip("needs 9 GiB of free device memory")
    segments, padded = lay_out([numel])
    buffer = real_gpu.testing.Buffer(segments, CODES[torch.bfloat16])
    lower = torch.ones(padded, dtype=torch.bfloat16, device="cuda")
    upper = torch.full_like(lower, 0.5)
    upper[numel - 1] = 4.0
    stats = real_gpu.nothing(3)
    real_gpu.testing.pair_stats(buffer, lower.data_ptr(), upper.data_ptr(), 0, padded,
                                stats.data_ptr(), real_gpu.stream())  # fmt: skip
    # Powers of two and small counts: every sum is exact in float64.
    expected = [(numel - 1) / 2 + 4, numel, (numel - 1) / 4 + 16]
    assert stats.tolist() == expected
    out = torch.full_like(lower, float("nan"))
    real_gpu.testing.pair_combine(buffer, lower.data_ptr(), upper.data_ptr(), 0, padded,
                                  stats.data_ptr(), out.data_ptr(), real_gpu.stream())  # fmt: skip
    a_share = 1 - 0.5 * (expected[0] / expected[1])
    b_share = 1 - 0.5 * (expected[0] / expected[2])
    for place in (0, 2**30, numel - 2, numel - 1):
        exact = torch.tensor(a_share * 1 + b_share * float(upper[place])).double()
        assert out[place].item() == rounded(exact, torch.bfloat16).item(), place
