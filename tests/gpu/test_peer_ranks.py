"""One-shot kernels over the memory of P ranks that are streams of one process.

Oracle: the recursion of docs/algorithms.md in float64, written in torch here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device import CODES, FLOATS, Machine, bits, lay_out, rounded, unit_of

from adareduce.bench import oracles
from adareduce.bench.oracles import adasum_tree

DOUBLE = 2.0**-53
SIZES = [1, 2, 3, 4, 5, 8]
# Shards end inside segments, segments are shorter than a shard and longer than an item.
NUMELS = [5, 8, 9001, 0, 1, 4096, 130]


def adasum_of(vectors: list[torch.Tensor], tree: Any) -> torch.Tensor:
    """In float64, without a rounding to the type between the levels: the Gram form has none."""
    if isinstance(tree, int):
        return vectors[tree].double()
    a, b = adasum_of(vectors, tree[0]), adasum_of(vectors, tree[1])
    dot, aa, bb = float(a @ b), float(a @ a), float(b @ b)
    a_share = 1 - dot / (2 * aa) if aa >= 2.0**-511 else 1.0
    b_share = 1 - dot / (2 * bb) if bb >= 2.0**-511 else 1.0
    return a_share * a + b_share * b


class Ranks:
    """P ranks with random inputs in their windows."""

    def __init__(
        self, gpu: Machine, size: int, dtype: torch.dtype, numels: list[int] = NUMELS
    ) -> None:
        self.gpu, self.size, self.dtype = gpu, size, dtype
        self.segments, self.numel = lay_out(numels)
        self.peers = gpu.testing.PeerRanks(size, self.numel, CODES[dtype], self.segments)
        self.streams, self._alive = gpu.streams(size)
        generator = torch.Generator().manual_seed(size)
        common = torch.randn(self.numel, generator=generator, dtype=torch.float64)
        self.inputs = [
            (torch.randn(self.numel, generator=generator, dtype=torch.float64) + common).to(dtype)
            * (rank + 1)
            for rank in range(size)
        ]
        self.orthogonality = [gpu.nothing(len(numels)) for _ in range(size)]
        self.cancellation = [gpu.nothing(len(numels)) for _ in range(size)]

    def send(self) -> None:
        """Puts the inputs into the windows and poison into the outputs."""
        poison = self.gpu.nothing(self.numel, self.dtype)
        for rank, tensor in enumerate(self.inputs):
            source = self.gpu.put(tensor)
            for pointer, target in (
                (source.data_ptr(), self.peers.input(rank)),
                (poison.data_ptr(), self.peers.output(rank)),
            ):
                self.gpu.testing.copy(pointer, source.nbytes, target, self.gpu.stream())
            self.gpu.wait()

    def adasum(self, ranks: tuple[int, ...] = ()) -> None:
        self.peers.adasum(
            self.streams,
            [t.data_ptr() for t in self.orthogonality],
            [t.data_ptr() for t in self.cancellation],
            ranks,
        )

    def outputs(self) -> list[torch.Tensor]:
        self.gpu.wait()
        found = []
        for rank in range(self.size):
            tensor = self.gpu.nothing(self.numel, self.dtype)
            self.gpu.testing.copy(
                self.peers.output(rank), tensor.nbytes, tensor.data_ptr(), self.gpu.stream()
            )
            self.gpu.wait()
            found.append(tensor.cpu())
        return found

    def parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[offset : offset + count] for offset, count in self.segments]


def assert_is_adasum(ranks: Ranks, outputs: list[torch.Tensor]) -> None:
    """Within one rounding, and the error of coefficients that cancellation has magnified."""
    tree = adasum_tree(ranks.size)
    worst = ranks.cancellation[0].cpu()
    for index, part in enumerate(ranks.parts(outputs[0])):
        if part.numel() == 0:
            continue
        vectors = [ranks.parts(tensor)[index] for tensor in ranks.inputs]
        expected = adasum_of(vectors, tree)
        # Dot products of n terms are off by n 2^-53, a coefficient by that times the cancellation,
        # once per level, and so are the oracle's; half types go through float32.
        magnified = max(1.0, float(worst[index]))
        sloppy = 16 * ranks.size * (part.numel() + 64) * DOUBLE * magnified
        lengths = torch.stack([vector.double().abs() for vector in vectors]).sum(0)
        unit = unit_of(ranks.dtype) + (2.0**-24 if unit_of(ranks.dtype) > 2.0**-24 else 0)
        bound = unit * expected.abs() + sloppy * lengths + torch.finfo(ranks.dtype).tiny * unit
        assert ((part.double() - expected).abs() <= bound).all(), f"segment {index}"


def assert_equal_on_all_ranks(outputs: list[torch.Tensor]) -> None:
    for other in outputs[1:]:
        assert torch.equal(bits(other), bits(outputs[0]))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_adasum_agrees_with_the_float64_tree_and_repeats_bit_for_bit(
    gpu: Machine, dtype: torch.dtype, size: int
) -> None:
    ranks = Ranks(gpu, size, dtype)
    found = []
    for _ in range(2):
        ranks.send()
        ranks.adasum()
        found.append(ranks.outputs())
        assert ranks.peers.error() == 0
    assert_is_adasum(ranks, found[0])
    assert_equal_on_all_ranks(found[0])
    assert torch.equal(bits(found[0][0]), bits(found[1][0]))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_each_tensor_of_a_buffer_has_coefficients_of_its_own(gpu: Machine, size: int) -> None:
    # [5, 8] floats: one vector of 16 bytes holds elements of both. Orthogonal tensors are added,
    # equal ones averaged.
    ranks = Ranks(gpu, size, torch.float32, [5, 8])
    (first, count), (second, more) = ranks.segments
    for rank, tensor in enumerate(ranks.inputs):
        tensor.zero_()
        tensor[first : first + count] = 3.0
        tensor[second + rank % more] = 2.0
    ranks.send()
    ranks.adasum()
    outputs = ranks.outputs()
    assert torch.equal(outputs[0][first : first + count], torch.full((5,), 3.0))
    expected = torch.zeros(8)
    expected[:size] = 2.0
    assert torch.equal(outputs[0][second : second + more], expected)
    assert_equal_on_all_ranks(outputs)


@pytest.mark.parametrize("size", [2, 4, 5, 8])
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_partners_that_nearly_cancel_lose_no_digits(
    gpu: Machine, dtype: torch.dtype, size: int
) -> None:
    # Oracle: the recursion, with the error that it has itself, rounded at every level. Coefficients
    # from a Gram matrix alone are off by 1e8 2^-53 here, which float64 shows, so the fallback must
    # have worked.
    ranks = Ranks(gpu, size, dtype, [5000, 300, 40])
    generator = torch.Generator().manual_seed(3)
    for rank in range(1, size, 2):
        noise = torch.randn(ranks.numel, generator=generator, dtype=torch.float64)
        ranks.inputs[rank] = (-ranks.inputs[rank - 1].double() + 1e-4 * noise).to(dtype)
    ranks.inputs = [
        torch.where(torch.arange(ranks.numel) < ranks.segments[2][0], tensor, tensor.abs())
        for tensor in ranks.inputs
    ]
    ranks.send()
    ranks.adasum()
    outputs = ranks.outputs()
    assert_equal_on_all_ranks(outputs)
    for index, part in enumerate(ranks.parts(outputs[0])):
        vectors = [ranks.parts(tensor)[index] for tensor in ranks.inputs]
        expected, bound = oracles.adasum(vectors, part.numel())
        error = (part.double() - expected).abs()
        assert (error <= bound).all(), f"segment {index}: {float((error / bound).max())} bounds"
    worst = ranks.cancellation[0].cpu()
    if size > 2 and dtype != torch.bfloat16:  # leaves never cancel; bfloat16 loses the noise
        assert (worst[:2] > 1e4).all()
    assert worst[2] < 100, "partners that do not cancel"


@pytest.mark.parametrize("scale", [1e-22, 1e17])
def test_tiny_and_huge_gradients_keep_their_direction(gpu: Machine, scale: float) -> None:
    ranks = Ranks(gpu, 4, torch.float32, [3000])
    ranks.inputs = [tensor * scale for tensor in ranks.inputs]
    ranks.send()
    ranks.adasum()
    assert_is_adasum(ranks, ranks.outputs())


def test_a_rank_with_zeros_changes_nothing(gpu: Machine) -> None:
    ranks = Ranks(gpu, 2, torch.float32, [500])
    ranks.inputs[1].zero_()
    ranks.send()
    ranks.adasum()
    (found, *_) = ranks.outputs()
    assert torch.equal(ranks.parts(found)[0], ranks.parts(ranks.inputs[0])[0])


def test_a_nan_stays_in_its_tensor(gpu: Machine) -> None:
    ranks = Ranks(gpu, 3, torch.float32, [500, 700])
    ranks.inputs[1][3] = float("nan")
    ranks.send()
    ranks.adasum()
    first, second = ranks.parts(ranks.outputs()[0])
    assert first.isnan().any()
    assert second.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32], ids=str)
def test_sums_and_averages_add_in_rank_order(gpu: Machine, dtype: torch.dtype, size: int) -> None:
    ranks = Ranks(gpu, size, torch.float32 if dtype == torch.int32 else dtype)
    if dtype == torch.int32:
        ranks.dtype = dtype
        ranks.peers = gpu.testing.PeerRanks(size, ranks.numel, CODES[dtype], ranks.segments)
        ranks.inputs = [(9 * tensor).to(dtype) for tensor in ranks.inputs]
    for divisor in (1.0, float(size)):
        ranks.send()
        ranks.peers.reduce(0, divisor, ranks.streams)
        outputs = ranks.outputs()
        is_half = dtype in (torch.float16, torch.bfloat16)
        total = ranks.inputs[0].float() if is_half else ranks.inputs[0].clone()
        for other in ranks.inputs[1:]:
            total = total + other.to(total.dtype)
        if divisor != 1:
            exact = total.double() / divisor
            total = rounded(exact, dtype) if dtype.is_floating_point else exact.trunc()
        for found, expected in zip(
            ranks.parts(outputs[0]), ranks.parts(total.to(dtype)), strict=True
        ):
            assert torch.equal(bits(found), bits(expected))
        for other in outputs[1:]:
            for mine, theirs in zip(ranks.parts(outputs[0]), ranks.parts(other), strict=True):
                assert torch.equal(bits(mine), bits(theirs))


@pytest.mark.parametrize("size", SIZES)
def test_squares_of_inputs_and_result_are_the_same_on_all_ranks(gpu: Machine, size: int) -> None:
    ranks = Ranks(gpu, size, torch.float32)
    count = len(ranks.segments)
    squares = [gpu.nothing(2 * count) for _ in range(size)]
    ranks.send()
    ranks.peers.reduce(0, 1.0, ranks.streams, [tensor.data_ptr() for tensor in squares])
    gpu.wait()
    for other in squares[1:]:
        assert torch.equal(bits(other).cpu(), bits(squares[0]).cpu())
    of_inputs, of_result = squares[0].cpu().view(2, count)
    for index in range(count):
        parts = [ranks.parts(tensor)[index].double() for tensor in ranks.inputs]
        numel = parts[0].numel()
        total = sum(float(part.square().sum()) for part in parts)
        result = float(torch.stack(parts).sum(0).square().sum())
        unit = 2 * (numel + size + 1) * DOUBLE
        assert abs(float(of_inputs[index]) - total) <= unit * total
        # The sum is rounded to float32 with every addition, relative to sum |x| of its terms.
        slip = (2 * size * 2.0**-24 + unit) * size * total
        assert abs(float(of_result[index]) - result) <= slip


def test_captured_kernels_meet_again_at_every_replay(real_gpu: Machine) -> None:
    ranks = Ranks(real_gpu, 4, torch.float32)
    ranks.send()
    ranks.adasum()  # once before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    streams = [torch.cuda.Stream() for _ in range(4)]
    with torch.cuda.graph(graph, stream=side):
        for stream in streams:
            stream.wait_stream(side)
        ranks.streams = [stream.cuda_stream for stream in streams]
        ranks.adasum()
        for stream in streams:
            side.wait_stream(stream)
    for factor in (1.0, -2.0, 0.5):
        ranks.inputs = [factor * tensor for tensor in ranks.inputs]
        ranks.send()
        graph.replay()
        outputs = ranks.outputs()
        assert_is_adasum(ranks, outputs)
        assert_equal_on_all_ranks(outputs)
    assert ranks.peers.error() == 0


def test_a_rank_that_does_not_come_is_named_after_the_deadline(real_gpu: Machine) -> None:
    segments, numel = lay_out([1000])
    peers = real_gpu.testing.PeerRanks(3, numel, CODES[torch.float32], segments, 0, 0.2)
    streams, alive = real_gpu.streams(3)
    peers.adasum(streams, ranks=(0, 1))
    real_gpu.wait()
    assert peers.error() == 1 + 2
    del alive
