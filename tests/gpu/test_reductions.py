"""Element-wise reductions, their squares, and the statistics of groups, against torch."""

from __future__ import annotations

import pytest
import torch
from device import (
    CODES,
    DOUBLE,
    FLOATS,
    Machine,
    bits,
    clipped,
    lay_out,
    random,
    rounded,
    unit_of,
)

INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


def reduced_in_order(inputs: list[torch.Tensor], op: int, divisor: float) -> torch.Tensor:
    dtype = inputs[0].dtype
    is_half = dtype in (torch.float16, torch.bfloat16)
    total = inputs[0].float() if is_half else inputs[0].clone()
    for other in inputs[1:]:
        value = other.to(total.dtype)
        if op == 0:
            total = total + value
        elif op == 3:
            total = total * value
        else:
            total = torch.minimum(total, value) if op == 1 else torch.maximum(total, value)
    if divisor != 1:
        total = total.double() / divisor
        return rounded(total, dtype) if dtype.is_floating_point else total.trunc().to(dtype)
    return total.to(dtype)


@pytest.mark.parametrize(("op", "divisor"), [(0, 1.0), (0, 3.0), (1, 1.0), (2, 1.0), (3, 1.0)])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_reduce_takes_the_inputs_in_their_order(
    gpu: Machine, dtype: torch.dtype, op: int, divisor: float
) -> None:
    for numel in (0, 1, 5, 4099):
        if dtype.is_floating_point:
            inputs = [gpu.put(random(numel, dtype, seed)) for seed in range(3)]
        else:
            generator = torch.Generator().manual_seed(numel)
            inputs = [
                gpu.put(torch.randint(0, 4, (numel,), generator=generator).to(dtype))
                for _ in range(3)
            ]
        out = gpu.nothing(numel, dtype)
        pointers = [t.data_ptr() for t in inputs]
        gpu.testing.reduce(CODES[dtype], op, pointers, out.data_ptr(), numel, divisor, gpu.stream())
        gpu.wait()
        assert torch.equal(bits(out), bits(reduced_in_order(inputs, op, divisor))), numel


@pytest.mark.parametrize("op", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minimum_and_maximum_keep_a_nan_of_any_input(
    gpu: Machine, dtype: torch.dtype, op: int
) -> None:
    inputs = [gpu.put(random(64, dtype, seed)) for seed in range(3)]
    for place, tensor in enumerate(inputs):
        tensor[place] = float("nan")
    out = gpu.nothing(64, dtype).zero_()
    gpu.testing.reduce(CODES[dtype], op, [t.data_ptr() for t in inputs], out.data_ptr(), 64, 1.0,
                       gpu.stream())  # fmt: skip
    gpu.wait()
    assert out.isnan().nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reduce_squares_adds_to_the_groups(gpu: Machine, dtype: torch.dtype) -> None:
    segments, numel = lay_out([5, 9001, 0, 300])
    group_of = torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    buffer = gpu.testing.Buffer(segments, CODES[dtype])
    begin, end = 16, numel
    wholes = [gpu.put(random(numel, dtype, seed)) for seed in range(3)]
    inputs = [whole[begin:end] for whole in wholes]
    out, plain = gpu.nothing(end - begin, dtype), gpu.nothing(end - begin, dtype)
    squares = gpu.put(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))
    on_device = gpu.put(group_of)
    pointers = [t.data_ptr() for t in inputs]
    gpu.testing.reduce_squares(buffer, pointers, out.data_ptr(), begin, end, 3.0,
                               on_device.data_ptr(), squares.data_ptr(), gpu.stream())  # fmt: skip
    gpu.testing.reduce(CODES[dtype], 0, pointers, plain.data_ptr(), end - begin, 3.0, gpu.stream())
    gpu.wait()
    expected = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    scale = expected.clone()
    for segment, group in zip(segments, group_of.tolist(), strict=True):
        part = clipped(segment, begin, end)
        of_inputs = sum(float(whole[part].double().square().sum()) for whole in wholes)
        mean = torch.stack([whole[part].double() for whole in wholes]).sum(0)
        expected[group] += torch.tensor(
            [of_inputs, float(mean.square().sum())], dtype=torch.float64
        )
        scale[group] += 9 * of_inputs  # |a + b + c|^2 <= 3 (|a|^2 + ...), and sums of squares
        inside = slice(part.start - begin, part.stop - begin)
        assert torch.equal(bits(out[inside]), bits(plain[inside]))
    # The sum is rounded to its accumulator before it is squared, twice for three inputs.
    unit = 2 * numel * DOUBLE + 6 * max(unit_of(torch.float64), min(unit_of(dtype), 2.0**-24))
    assert ((squares.cpu() - expected).abs() <= unit * scale).all()


@pytest.mark.parametrize("of_groups", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_group_stats_are_the_estimates_of_float64(
    gpu: Machine, ranks: int, of_groups: bool
) -> None:
    group_of = torch.tensor([1, 0, 1, 1], dtype=torch.int32)
    generator = torch.Generator().manual_seed(ranks)
    columns = 2 if of_groups else 4
    squares = 1 + torch.rand(ranks, columns, generator=generator, dtype=torch.float64)
    result = torch.rand(4, generator=generator, dtype=torch.float64)
    times = 2.0
    arrays = [gpu.put(t) for t in (group_of, squares, result)]
    out = gpu.nothing(8)
    gpu.testing.group_stats(4, arrays[0].data_ptr(), 2, ranks, arrays[1].data_ptr(), of_groups,
                            arrays[2].data_ptr(), times, ranks > 1, out.data_ptr(),
                            gpu.stream())  # fmt: skip
    gpu.wait()
    for group, row in enumerate(out.view(2, 4).cpu()):
        member = group_of == group
        total = float(squares[:, group].sum() if of_groups else squares[:, member].sum())
        mean = float(result[member].sum()) / times**2
        allowed = 4 * (4 * ranks + 4) * DOUBLE * (total + ranks * mean)
        assert abs(row[0] - total) <= allowed
        assert abs(row[1] - mean) <= allowed
        if ranks == 1:
            assert row[2:].isnan().all()
        else:
            variance = (total - ranks * mean) / (ranks - 1)
            assert abs(row[2] - variance) <= allowed
            assert abs(row[3] - (mean - variance / ranks)) <= 2 * allowed
