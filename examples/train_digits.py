"""Trains a small network on real handwritten digits, data parallel over MPI ranks.

    mpirun -n 2 python examples/train_digits.py --reduce adasum --workers-per-rank 32
    mpirun -n 2 python examples/train_digits.py --compare --json digits.jsonl --figures .

The data ship with scikit-learn. Every worker computes the gradient of its own micro-batch, and one
reduction makes one step of them all. The rate is the one for a single worker: average keeps it,
sum multiplies it by the workers, Adasum lets the gradients decide, AdaScale multiplies it by the
gain, and lsw (linear scaling with warm-up) by the workers after a warm-up.

--compare runs all of them from several seeds, prints one table, and one worker alone beside them.
"""

from __future__ import annotations

import argparse
import importlib.util
from contextlib import nullcontext
from pathlib import Path

import digits_compare
import torch
from digits_data import BY_STEPS, METHODS, Settings
from digits_methods import Result, train
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import adareduce.torch as hvd


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--reduce", choices=METHODS, default="adasum")
    add("--workers-per-rank", type=int, default=1, metavar="K", help="computed one after the other")
    add("--epochs", type=int, default=10, help="of average, sum and adasum")
    add("--steps", type=int, default=3600, help="of one worker, for adascale and lsw")
    add("--batch", type=int, default=8, help="samples per worker and step")
    add("--rate", type=float, help="of one worker; 0.5, adascale and lsw: 0.2, decaying to 0.002")
    add("--hidden", type=int, default=64, help="width of the hidden layer")
    add("--seed", type=int, default=0)
    add("--activation", choices=["relu", "tanh"], default="relu")
    add("--raw-pixels", action="store_true", help="do not subtract the mean image")
    group = parser.add_argument_group("comparison")
    add = group.add_argument
    add("--compare", action="store_true", help="all methods; takes a few minutes")
    add("--quick", action="store_true", help="a comparison of seconds that shows nothing but life")
    add("--workers", type=int, nargs="+", default=[16, 64], help="over all ranks")
    add("--seeds", type=int, default=3)
    add("--json", type=Path, metavar="FILE", help="appends one line per training")
    add("--figures", type=Path, metavar="FOLDER", help="writes PNG files; needs matplotlib")
    arguments = parser.parse_args()
    for name in ("workers_per_rank", "epochs", "steps", "batch", "hidden", "seeds"):
        if getattr(arguments, name) < 1:
            option = name.replace("_", "-")
            parser.error(f"--{option} must be at least 1, got {getattr(arguments, name)}")
    if arguments.rate is not None and not arguments.rate > 0:
        parser.error(f"--rate must be above 0, got {arguments.rate}")
    if arguments.figures is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--figures needs matplotlib; pip install 'adareduce[bench]'")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)  # these matrices are far too small to share
    hvd.init()
    if arguments.compare or arguments.quick:
        digits_compare.compare(arguments)
    else:
        train_once(arguments)


def train_once(arguments: argparse.Namespace) -> None:
    method = arguments.reduce
    settings = Settings(
        method=method,
        workers=hvd.size() * arguments.workers_per_rank,
        batch=arguments.batch,
        rate=arguments.rate or (0.2 if method in BY_STEPS else 0.5),
        epochs=arguments.epochs,
        reference_steps=arguments.steps,
        hidden=arguments.hidden,
        activation=arguments.activation,
        raw_pixels=arguments.raw_pixels,
        seed=arguments.seed,
    )
    console = Console(soft_wrap=True)
    is_first = hvd.rank() == 0
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("step {task.fields[steps]}  loss {task.fields[loss]:.3f}{task.fields[gain]}"),
        TimeRemainingColumn(),
        console=console,
    )
    if is_first:
        console.print(f"{hvd.size()} ranks x {arguments.workers_per_rank} workers, {settings}")
    with progress if is_first else nullcontext():
        bar = progress.add_task("", total=1.0, steps=0, loss=float("nan"), gain="")

        def show(share: float, result: Result) -> None:
            if is_first and (result.steps % 20 == 0 or share >= 1.0):
                gain = f"  gain {result.gains[-1]:.1f}" if result.gains else ""
                progress.update(
                    bar, completed=share, steps=result.steps, loss=result.losses[-1], gain=gain
                )

        result = train(settings, show)
    if is_first:
        samples = result.steps * settings.workers * settings.batch
        console.print(
            f"test accuracy {result.accuracy:.2%}   {result.steps} steps   "
            f"{samples / result.seconds:,.0f} samples/s   "
            f"communication {result.communication:.2f} s of {result.seconds:.2f} s"
        )


if __name__ == "__main__":
    main()
