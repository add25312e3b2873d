"""What a training step costs with and without the library, on a network of 161 tensors.

    mpirun -n 2 python benchmarks/training_step.py --json benchmarks/results/training_step.jsonl

A ResNet-50 on small images takes one step after the other in turns: by itself, with averaging that
overlaps with backward, with the same averaging after backward, with AdaScale, with Adasum. Times
are those of the slowest rank, medians; ratios have bootstrap intervals of 95 %. How much of the
communication was hidden: (after backward - overlapped) / (after backward - by itself); and which
share of the requests had been reduced when backward ended, on the rank that has fewest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import adareduce.torch as hvd
from adareduce.bench import machine
from adareduce.bench.ranks import Ranks
from adareduce.bench.timing import LEAST_REPEATS, Contender, measure, ratio_of_medians, summarise

PAIRS = [
    ("overlapped", "alone"),
    ("after backward", "alone"),
    ("after backward", "overlapped"),
    ("adascale", "overlapped"),
    ("adasum", "overlapped"),
]


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
    """By name, one step of training, each on a model of its own.

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
        if name in ("overlapped", "adascale", "adasum"):
            op = hvd.Adasum if name == "adasum" else hvd.Average
            optimizer = hvd.DistributedOptimizer(optimizer, model.named_parameters(), op=op)
        if name == "adascale":
            optimizer = hvd.AdaScale(optimizer)
        # One bucket that waits for the last gradient: nothing is left to overlap with.
        if name == "after backward":
            optimizer = hvd.DistributedOptimizer(
                optimizer, model.named_parameters(), groups=[parameters]
            )

        def step() -> None:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            if name == "overlapped":
                finished.append(optimizer.reducer.num_finished / optimizer.reducer.num_buckets)
            optimizer.step()

        return step

    return {n: make(n) for n in ("alone", "overlapped", "after backward", "adascale", "adasum")}


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
    seconds = measure([Contender(n, step) for n, step in steps.items()], ranks, 2, given.iters)
    medians = {name: summarise(times).median for name, times in seconds.items()}
    ratios = {f"{a} / {b}": ratio_of_medians(seconds[a], seconds[b]) for a, b in PAIRS}
    visible = medians["overlapped"] - medians["alone"]
    whole = medians["after backward"] - medians["alone"]
    shares = [torch.tensor(theirs).mean() for theirs in ranks.gather(finished)]
    share_finished = float(torch.stack(shares).min())
    round_trip = ranks.core_round_trip_ns()
    if ranks.rank == 0:
        origin = machine.describe()
        print(f"{ranks.size} ranks, {given.batch} images of {given.pixels} pixels each")
        for name, median in medians.items():
            print(f"{name:<28} {1e3 * median:8.1f} ms")
        for name, ratio in ratios.items():
            print(f"{name:<28} {ratio.value:8.3f}    [{ratio.low:.3f}, {ratio.high:.3f}]")
        print(f"{'communication hidden':<28} {1 - visible / whole:8.2f}")
        print(f"{'reduced during backward':<28} {share_finished:8.2f}")
        if given.json:
            row = {
                "ranks": ranks.size,
                "settings": {k: v for k, v in vars(given).items() if k != "json"},
                "median_seconds": medians,
                "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
                "hidden": 1 - visible / whole,
                "reduced_during_backward": share_finished,
                "core_round_trip_ns": round_trip,
                **origin,
            }
            with Path(given.json).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
