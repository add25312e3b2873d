"""What a training step costs with and without the library, on a network of 161 tensors.

    mpirun -n 2 python benchmarks/training_step.py --json benchmarks/results/training_step.jsonl

A ResNet-50 on small images takes one step after the other in turns: by itself; with averaging that
overlaps with backward; with the same requests, begun after backward; with gradients that lie in
shared buckets, where this adareduce has them; with AdaScale; with Adasum. "communication" is the
requests of the overlapped step without a step around them. Times are those of the slowest rank,
medians; ratios have bootstrap intervals of 95 %. Hidden is the share of what the step without
overlap adds to the computation that overlap takes away again:
(not overlapped - overlapped) / (not overlapped - alone). The last line is the share of the requests
that had been reduced when backward ended, on the rank that has fewest.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import adareduce.torch as hvd
from adareduce.bench import machine
from adareduce.bench.ranks import Ranks
from adareduce.bench.timing import (
    LEAST_REPEATS,
    Contender,
    Ratio,
    measure,
    ratio_of_medians,
    summarise,
)
from adareduce.torch.gradients import GradientReducer

PAIRS = [
    ("overlapped", "alone"),
    ("not overlapped", "alone"),
    ("not overlapped", "overlapped"),
    ("shared", "overlapped"),
    ("adascale", "overlapped"),
    ("adasum", "overlapped"),
]
SHARED_OPTION = "gradient_as_bucket_view"
_RESAMPLES = 2000
_ITERATIONS_PER_PROBE = 5


class Block(nn.Module):
    """A bottleneck of ResNet-50."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.main = nn.Sequential(
            *layer(channels, width, 1, 1), nn.ReLU(),
            *layer(width, width, 3, stride), nn.ReLU(),
            *layer(width, out, 1, 1),
        )  # fmt: skip
        is_same = channels == out and stride == 1
        self.shortcut = (
            nn.Identity() if is_same else nn.Sequential(*layer(channels, out, 1, stride))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Adds what the block has learned to its input."""
        return torch.relu(self.main(x) + self.shortcut(x))


def layer(channels: int, out: int, extent: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A convolution and its normalisation."""
    return (
        nn.Conv2d(channels, out, extent, stride, extent // 2, bias=False),
        nn.BatchNorm2d(out),
    )


def resnet50(classes: int = 1000) -> nn.Module:
    """161 tensors, 25.6 million parameters (He et al., arXiv 1512.03385)."""
    parts: list[nn.Module] = [*layer(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)]):
        for block in range(blocks):
            parts.append(Block(channels, width, 2 if block == 0 and stage > 0 else 1))
            channels = 4 * width
    return nn.Sequential(
        *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def trainers(batch: int, pixels: int, finished: list[float]) -> dict[str, Callable[[], None]]:
    """By name, one step of training, each on a model of its own; and the communication of one.

    To ``finished`` each overlapped step adds the share of its requests that had been reduced when
    backward ended.
    """
    images = torch.randn(batch, 3, pixels, pixels)
    labels = torch.randint(1000, (batch,))

    def make(name: str) -> Callable[[], None]:
        torch.manual_seed(1)
        model = resnet50()
        # Small: nobody looks at the loss, and nothing may become infinite.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        parameters = list(model.parameters())
        reducer = None
        if name in ("communication", "not overlapped"):
            # The same requests as the overlapped one's. It waits for a second pass, which does not
            # come, so that nothing begins before reduce() is called.
            reducer = GradientReducer([parameters], passes_per_step=2)
        elif name != "alone":
            op = hvd.Adasum if name == "adasum" else hvd.Average
            options = {SHARED_OPTION: True} if name == "shared" else {}
            optimizer = hvd.DistributedOptimizer(
                optimizer, model.named_parameters(), op=op, **options
            )
        if name == "adascale":
            optimizer = hvd.AdaScale(optimizer)

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            if name == "overlapped":
                finished.append(optimizer.reducer.num_finished / optimizer.reducer.num_buckets)
            if reducer is not None:
                reducer.reduce()
            optimizer.step()

        if name == "communication":
            assert reducer is not None
            nn.functional.cross_entropy(model(images), labels).backward()
            return reducer.reduce
        return step

    names = ["alone", "overlapped", "not overlapped", "adascale", "adasum", "communication"]
    if SHARED_OPTION in inspect.signature(hvd.DistributedOptimizer).parameters:
        names.insert(3, "shared")
    return {name: make(name) for name in names}


def hidden_share(seconds: dict[str, torch.Tensor]) -> Ratio:
    """(not overlapped - overlapped) / (not overlapped - alone) of the medians, with 95 %.

    Iterations are drawn with replacement, all steps of an iteration together.
    """
    times = torch.stack([seconds[name] for name in ("not overlapped", "overlapped", "alone")])
    count = times.shape[1]
    drawn = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))

    def share(rows: torch.Tensor) -> torch.Tensor:
        later, overlapped, alone = torch.quantile(rows, 0.5, dim=-1)
        return (later - overlapped) / (later - alone)

    ends = torch.quantile(share(times[:, drawn]), torch.tensor([0.025, 0.975], dtype=times.dtype))
    return Ratio(float(share(times)), float(ends[0]), float(ends[1]))


def measured(
    steps: dict[str, Callable[[], None]], ranks: Ranks, iters: int
) -> tuple[dict[str, torch.Tensor], list[float | None]]:
    """Seconds of every iteration, and the round trips between two cores before each few of them.

    Cores move between near and far while a job runs.
    """
    contenders = [Contender(name, step) for name, step in steps.items()]
    parts, round_trips = [], []
    for begin in range(0, iters, _ITERATIONS_PER_PROBE):
        round_trips.append(ranks.core_round_trip_ns())
        count = min(_ITERATIONS_PER_PROBE, iters - begin)
        parts.append(measure(contenders, ranks, 2 if begin == 0 else 0, count))
    return {name: torch.cat([part[name] for part in parts]) for name in steps}, round_trips


def main() -> int:
    """Prints a table, appends a JSON line; returns the exit status. Collective."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="images per rank (4)")
    parser.add_argument("--pixels", type=int, default=64, help="width of an image (64)")
    parser.add_argument("--iters", type=int, default=20, help="steps of each kind (20)")
    parser.add_argument("--json", metavar="FILE", help="append a JSON line")
    given = parser.parse_args()
    if given.iters < LEAST_REPEATS:
        parser.error(f"--iters must be at least {LEAST_REPEATS}, got {given.iters}")
    hvd.init()
    torch.set_num_threads(1)
    ranks = Ranks()
    finished: list[float] = []
    steps = trainers(given.batch, given.pixels, finished)
    seconds, round_trips = measured(steps, ranks, given.iters)
    medians = {name: summarise(times).median for name, times in seconds.items()}
    pairs = [pair for pair in PAIRS if pair[0] in steps]
    ratios = {f"{a} / {b}": ratio_of_medians(seconds[a], seconds[b]) for a, b in pairs}
    hidden = hidden_share(seconds)
    shares = [torch.tensor(theirs).mean() for theirs in ranks.gather(finished)]
    share_finished = float(torch.stack(shares).min())
    if ranks.rank == 0:
        row = {
            "ranks": ranks.size,
            "settings": {k: v for k, v in vars(given).items() if k != "json"},
            "median_seconds": medians,
            "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
            "hidden": hidden.value,
            "hidden_interval": hidden._asdict(),
            "reduced_during_backward": share_finished,
            "core_round_trip_ns": _median(round_trips),
            "core_round_trips_ns": round_trips,
            **machine.describe(),
        }
        print(f"{ranks.size} ranks, {given.batch} images of {given.pixels} pixels each")
        for name, median in medians.items():
            print(f"{name:<28} {1e3 * median:8.1f} ms")
        for name, ratio in [*ratios.items(), ("communication hidden", hidden)]:
            print(f"{name:<28} {ratio.value:8.3f}    [{ratio.low:.3f}, {ratio.high:.3f}]")
        print(f"{'reduced during backward':<28} {share_finished:8.2f}")
        print(f"{'core round trips, ns':<28} {' '.join(f'{t or 0:.0f}' for t in round_trips)}")
        if given.json:
            with Path(given.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


if __name__ == "__main__":
    sys.exit(main())
