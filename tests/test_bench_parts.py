"""The benchmark's parts by themselves: arguments, conventions, statistics, oracles, #wrong."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reference
from adareduce.bench import arguments, cases, machine, oracles, presets, timing, verification
from adareduce.bench.inputs import PERIOD, Source, poison

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


# ---- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("512", 512), ("4K", 4096), ("64m", 64 << 20), ("1G", 1 << 30)]
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert arguments.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-4K", "4T", "1.5M", "K"])
def test_a_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="positive size"):
        arguments.parse_size(text)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ("-b 4K -e 64K -f 4", [4096, 16384, 65536]),
        ("-b 4K -e 12K -i 4K", [4096, 8192, 12288]),
        ("-b 1K", [1024]),
        ("", [32 << 20]),
        ("--layers resnet50", [0]),
    ],
)
def test_rows_go_from_minbytes_to_maxbytes(options: str, sizes: list[int]) -> None:
    assert arguments.parse(["allreduce", *options.split()]).sizes() == sizes


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("allreduce -o adasum -d int32", "must be a floating point type"),
        ("allreduce -d bool", "must be min, max or prod"),
        ("reducescatter -o adasum", "must not be adasum"),
        ("allreduce -b 8K -e 4K", "must be at least --minbytes=8192, got 4096"),
        ("allreduce --peers -n 4", "must be at least 5"),
        ("alltoall --layers 2", "must be left out"),
        ("allgather --layers resnet50", "must be a number"),
        ("allreduce --layers resnet", "must be a positive number or one of"),
        ("allgather --stats", "must go with an allreduce"),
    ],
)
def test_what_makes_no_sense_is_refused(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        arguments.parse(command.split())
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        arguments.parse(["allreduce", "--plot", "x.png"])
    assert "needs matplotlib; pip install 'adareduce[bench]'" in capsys.readouterr().err


# ---- conventions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("collective", "factor"),
    [
        ("allreduce", 1.5),
        ("reducescatter", 0.75),
        ("allgather", 0.75),
        ("alltoall", 0.75),
        ("broadcast", 1.0),
    ],
)
def test_busbw_factors_of_4_ranks_are_those_of_nccl_tests(collective: str, factor: float) -> None:
    assert cases.factor(collective, 4) == factor


@pytest.mark.parametrize(
    ("collective", "layers", "num_bytes", "count"),
    [
        ("allreduce", 1, 1024, 256),
        ("allreduce", 7, 1024, 256),
        ("broadcast", 1, 1024, 256),
        ("reducescatter", 1, 1020, 85),  # 85 elements for each of 3 ranks
        ("reducescatter", 7, 1020, 85),
        ("allgather", 1, 1020, 85),
        ("allgather", 7, 1020, 85),
        ("alltoall", 1, 1020, 85),
    ],
)
def test_a_size_is_that_of_the_largest_buffer(
    collective: str, layers: int, num_bytes: int, count: int
) -> None:
    settings = arguments.parse([collective, "--layers", str(layers)])
    case = cases.make_case(settings, 1024, 0, 3)
    assert (case.num_bytes, case.count) == (num_bytes, count)
    assert len(case.inputs) == layers
    if collective == "reducescatter":
        assert all(numel % 3 == 0 for numel in case.numels), "each tensor is shared equally"


def test_resnet50_has_its_161_tensors() -> None:
    shapes = presets.resnet50()
    assert len(shapes) == 161
    assert sum(map(math.prod, shapes)) == 25_557_032
    assert shapes[0] == (64, 3, 7, 7)
    assert shapes[-2:] == [(1000, 2048), (1000,)]


def test_bert_large_has_24_layers_and_fits_into_memory() -> None:
    shapes = presets.bert_large()
    assert len(shapes) == 398
    assert 4 * sum(map(math.prod, shapes)) < 400e6


def test_tiny2000_has_2000_tensors_of_1_to_64_elements() -> None:
    sizes = [math.prod(shape) for shape in presets.tiny2000()]
    assert len(sizes) == 2000
    assert set(sizes) == set(range(1, 65))


# ---- statistics of times ------------------------------------------------------------------------


def test_a_ratio_of_constant_times_has_no_width() -> None:
    ratio = timing.ratio_of_medians(torch.full((9,), 6.0), torch.full((9,), 2.0))
    assert ratio == (3.0, 3.0, 3.0)


def test_a_ratio_of_noisy_times_lies_within_an_interval_that_covers_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(2, 400, generator=generator, dtype=torch.float64)
    ratio = timing.ratio_of_medians(2 + noise[0], 1 + noise[1])
    assert ratio.low < ratio.value < ratio.high
    assert ratio.low < 2.5 / 1.5 < ratio.high
    assert ratio.high - ratio.low < 0.2


def test_a_disturbance_of_both_contenders_does_not_widen_a_ratio() -> None:
    common = 1 + 9 * torch.rand(51, generator=torch.Generator().manual_seed(2)).double()
    ratio = timing.ratio_of_medians(2 * common, common)
    assert ratio == pytest.approx((2.0, 2.0, 2.0), rel=1e-12)


def test_a_ratio_of_few_repeats_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 5 repeats, got 4"):
        timing.ratio_of_medians(torch.ones(4), torch.ones(4))


def test_a_summary_has_median_and_percentiles() -> None:
    found = timing.summarise(torch.arange(101, dtype=torch.float64))
    assert found == timing.Summary(median=50.0, p50=50.0, p99=99.0, min=0.0, mean=50.0)
    assert timing.summarise(torch.ones(99, dtype=torch.float64)).p99 is None, (
        "of so few it would be the maximum"
    )


class OneRank:
    """Stands for the channel in a job of one rank."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.meetings = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value

    def align(self) -> None:
        self.meetings += 1


class OtherRank(OneRank):
    """Rank 1 of 2, where rank 0 has `bits_of_rank_0` and counts no wrong elements."""

    rank, size = 1, 2

    def __init__(self, bits_of_rank_0: list[torch.Tensor]) -> None:
        super().__init__()
        self._bits = bits_of_rank_0

    def gather(self, value: Any) -> list[Any]:
        rank_0: dict[type, Any] = {bool: True, str: "another digest", int: 0}
        return [rank_0[type(value)], value]

    def broadcast(self, value: Any) -> Any:
        return self._bits


def test_contenders_take_turns_behind_a_common_start() -> None:
    log = []
    ranks = OneRank()
    contenders = [
        timing.Contender(name, lambda name=name: log.append(name), lambda: log.append("prepare"))
        for name in ("a", "b")
    ]
    seconds = timing.measure(contenders, ranks, 1, 2)  # type: ignore[arg-type]
    a, b = ["prepare", "a"], ["prepare", "b"]
    assert log == [*b, *a, *a, *b, *b, *a], "each round another one is first"
    assert ranks.meetings == 6
    assert {name: times.numel() for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_an_iteration_counts_with_its_slowest_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slower(OneRank):
        def gather(self, value: torch.Tensor) -> list[torch.Tensor]:
            return [value, torch.tensor([[7.0, 0.0]], dtype=torch.float64)]

    ticks = iter([0.0, 1.0, 10.0, 13.0])  # this rank takes 1 s, then 3 s
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    contender = timing.Contender("a", lambda: None)
    seconds = timing.measure([contender], Slower(), 0, 2)["a"]  # type: ignore[arg-type]
    assert seconds.tolist() == [7.0, 3.0]


# ---- inputs, oracles, #wrong --------------------------------------------------------------------


def test_inputs_repeat_and_differ_between_ranks() -> None:
    source = Source(torch.float32, "sum", 2)
    tensor = source.tensor(0, 0, PERIOD + 5)
    assert torch.equal(tensor[PERIOD:], tensor[:5])
    assert torch.equal(tensor, source.tensor(0, 0, PERIOD + 5))
    assert not torch.equal(tensor[:100], source.tensor(1, 0, PERIOD + 5)[:100])


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("op", ["sum", "prod"])
@pytest.mark.parametrize("size", [2, 5, 16])
def test_nothing_overflows(dtype: torch.dtype, op: str, size: int) -> None:
    source = Source(dtype, op, size)
    wide = torch.stack([source.period(rank, 0, 1000).double() for rank in range(size)])
    limit = (torch.finfo if dtype.is_floating_point else torch.iinfo)(dtype).max
    assert bool(wide.abs().max() > 0)
    for partial in (wide.cumsum(0), wide.cumprod(0)) if op == "prod" else (wide.cumsum(0),):
        assert bool((partial.abs() <= limit).all())


@pytest.mark.parametrize("size", range(1, 10))
def test_the_tree_is_that_of_the_reference(size: int) -> None:
    assert oracles.adasum_tree(size) == reference.adasum_tree(size)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("numel", [1000, PERIOD + 12_345])
def test_the_oracle_of_adasum_agrees_with_the_reference(size: int, numel: int) -> None:
    # Oracle: tests/reference.py in long double, on the whole tensor.
    source = Source(torch.float64, "adasum", size)
    values, bound = oracles.adasum([source.period(r, 0, numel) for r in range(size)], numel)
    expected = reference.adasum([source.tensor(r, 0, numel).numpy() for r in range(size)])
    error = (values - torch.from_numpy(expected[:PERIOD].astype("float64"))).abs()
    assert bool((error <= bound).all())
    # A bound that allowed one part in a million would let errors of float32 pass.
    assert float(bound.max()) < 1e-9


@pytest.mark.parametrize("op", ["sum", "avg", "prod", "min", "max", "adasum"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bounds_hold_for_one_rounding_and_are_not_much_wider(op: str, dtype: torch.dtype) -> None:
    source = Source(dtype, op, 3)
    found = oracles.reduced(op, [source.period(r, 0, 5000) for r in range(3)], 0, 5000, 5000)
    rounded = found.values.to(dtype)
    assert not bool(verification.differs(rounded, [found]).any())
    # 64 roundings off is wrong wherever the result is as large as the inputs; but statistics of
    # doubles in doubles meet 5000 / 16 roundings themselves.
    roundings = 2000 if op == "adasum" and dtype == torch.float64 else 64
    large = found.values.double().abs() > 0.5
    off = rounded * (1 + roundings * torch.finfo(dtype).eps)
    assert bool(verification.differs(off, [found])[large].all())


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
@pytest.mark.parametrize("op", ["sum", "avg", "prod", "min", "max"])
def test_verification_notices_what_is_wrong(dtype: torch.dtype, op: str) -> None:
    source = Source(dtype, op, 2)
    numel = 1000
    found = oracles.reduced(op, [source.period(r, 0, numel) for r in range(2)], 0, numel, numel)
    right = found.values.to(dtype)

    def count(first: torch.Tensor, second: torch.Tensor | None = None) -> int:
        outputs = [first], [first if second is None else second]
        return verification.count_wrong(
            OneRank(), *outputs, [[found]], dtype, ranks_agree=True  # type: ignore[arg-type]
        )  # fmt: skip

    def changed(change: Callable[[torch.Tensor], object]) -> torch.Tensor:
        copy = right.clone()
        change(copy)
        return copy

    three = changed(lambda t: t[[3, 500, 999]].add_(0))
    three[[3, 500, 999]] += 3
    poisoned = changed(lambda t: poison(t[10:20]))
    assert count(right) == 0
    assert count(three) == 3
    assert 9 <= count(poisoned) <= 10  # an integer may be the pattern by chance
    assert count(right, three) == 3, "two calls that differ"
    assert count(right[:-1]) == numel, "too short"
    if dtype.is_floating_point:
        assert count(poisoned) == 10
        assert count(poisoned, poisoned) == 10


def test_verification_notices_bits_that_differ_between_ranks() -> None:
    source = Source(torch.float32, "sum", 2)
    found = oracles.reduced("sum", [source.period(r, 0, 100) for r in range(2)], 0, 100, 100)
    mine = found.values.float()
    of_rank_0 = verification.bits(mine).clone()
    of_rank_0[7] += 1  # the next float: within the bound, and yet not the same
    assert not bool(verification.differs(of_rank_0.view(torch.float32), [found]).any())
    for ranks_agree, wrong in ((True, 1), (False, 0)):
        ranks: Any = OtherRank([of_rank_0])
        assert wrong == verification.count_wrong(
            ranks, [mine], [mine], [[found]], torch.float32, ranks_agree=ranks_agree
        )


@pytest.mark.parametrize("collective", ["allgather", "alltoall", "reducescatter"])
def test_stretches_of_long_tensors_are_found_in_their_period(collective: str) -> None:
    # Oracle: the collective's definition, on whole tensors.
    settings = arguments.parse([collective, "-d", "int32"])
    size, rank = 3, 2
    numel = 3 * (PERIOD + 1000)
    num_bytes = 4 * numel * (3 if collective == "allgather" else 1)
    case = cases.make_case(settings, num_bytes, rank, size)
    tensors = [cases.make_case(settings, num_bytes, r, size).inputs[0] for r in range(size)]
    part = slice(rank * numel // 3, (rank + 1) * numel // 3)
    actual = {
        "allgather": lambda: torch.cat(tensors),
        "alltoall": lambda: torch.cat([tensor[part] for tensor in tensors]),
        "reducescatter": lambda: torch.stack(tensors).sum(0).int()[part],
    }[collective]()
    (expected,) = case.expected()
    assert not bool(verification.differs(actual, expected).any())
    moved = actual.roll(PERIOD - 1)
    assert int(verification.differs(moved, expected).sum()) > 0.99 * actual.numel()


def test_a_result_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.hvd, "mpi_enabled", lambda: False)  # nobody has called init()
    described = machine.describe()
    assert described["machine"]["cores"] >= 1
    assert described["machine"]["memory_bytes"] > 1e8
    assert described["versions"]["torch"] == torch.__version__
    if (Path(__file__).resolve().parents[1] / ".git").exists() and described["commit"] is not None:
        assert len(described["commit"].removesuffix("-dirty")) == 40
