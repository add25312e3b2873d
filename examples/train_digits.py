"""Trains a small network on real handwritten digits, data parallel over MPI ranks.

    mpirun -n 2 python examples/train_digits.py --reduce adasum

The data (1,797 images of 8 x 8 pixels) ship with scikit-learn. Every rank computes the gradient of
its own micro-batch; one grouped all-reduce makes one gradient of them all; every rank takes the
same step. The learning rate is the one for a single worker, whatever the number of ranks: with
--reduce sum the step grows with the ranks, with average it does not, Adasum decides from the
gradients.
"""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from sklearn.datasets import load_digits

import adareduce.torch as hvd

TEST_SAMPLES = 360
REDUCTIONS = {"average": hvd.Average, "sum": hvd.Sum, "adasum": hvd.Adasum}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reduce", choices=REDUCTIONS, default="adasum")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8, help="samples per rank and step")
    parser.add_argument("--rate", type=float, default=0.5, help="learning rate of one worker")
    parser.add_argument("--hidden", type=int, default=64, help="width of the hidden layer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for name in ("epochs", "batch", "hidden"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    return arguments


def load_data(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images and labels, test images and labels; the same split on every rank."""
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:TEST_SAMPLES], order[TEST_SAMPLES:]
    return images[train], labels[train], images[test], labels[test]


def rate_at(step: int, steps: int, rate: float) -> float:
    """Linear warm-up over the first tenth, then linear decay to zero."""
    warm_up = max(1, steps // 10)
    return rate * min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def main() -> None:
    arguments = parse_arguments()
    hvd.init()
    torch.manual_seed(arguments.seed)
    images, labels, test_images, test_labels = load_data(arguments.seed)

    model = torch.nn.Sequential(
        torch.nn.Linear(64, arguments.hidden),
        torch.nn.ReLU(),
        torch.nn.Linear(arguments.hidden, 10),
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=arguments.rate)

    global_batch = arguments.batch * hvd.size()
    steps_per_epoch = len(labels) // global_batch
    if steps_per_epoch == 0:
        raise SystemExit(f"{hvd.size()} ranks x --batch {arguments.batch} exceed the data")
    steps = arguments.epochs * steps_per_epoch
    # Every rank draws the same order and takes its own part of each global batch.
    shuffler = torch.Generator().manual_seed(arguments.seed)

    console = Console(soft_wrap=True)
    is_first = hvd.rank() == 0
    progress = Progress(
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
        console=console,
    )
    if is_first:
        console.print(
            f"{hvd.size()} ranks, --reduce {arguments.reduce}, rate {arguments.rate} (not"
            f" rescaled), {arguments.batch} samples per rank and step, seed {arguments.seed}"
        )
    communication = 0.0
    started = time.perf_counter()
    with progress if is_first else nullcontext():
        bar = progress.add_task("", total=steps, loss=float("nan"))
        for step in range(steps):
            if step % steps_per_epoch == 0:
                order = torch.randperm(len(labels), generator=shuffler)
            first = step % steps_per_epoch * global_batch + hvd.rank() * arguments.batch
            batch = order[first : first + arguments.batch]

            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()

            before = time.perf_counter()
            gradients = [parameter.grad for parameter in model.parameters()]
            hvd.grouped_allreduce_(gradients, name="gradients", op=REDUCTIONS[arguments.reduce])
            communication += time.perf_counter() - before

            optimizer.param_groups[0]["lr"] = rate_at(step, steps, arguments.rate)
            optimizer.step()
            if is_first and (step % 20 == 0 or step == steps - 1):
                progress.update(bar, completed=step + 1, loss=loss.item())
    elapsed = time.perf_counter() - started

    if is_first:
        with torch.no_grad():
            correct = (model(test_images).argmax(dim=1) == test_labels).float().mean().item()
        console.print(
            f"test accuracy {correct:.2%}   {steps} steps   "
            f"{steps * global_batch / elapsed:,.0f} samples/s   "
            f"communication {communication:.2f} s of {elapsed:.2f} s"
        )


if __name__ == "__main__":
    main()
