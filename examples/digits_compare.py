"""All methods from several seeds: one table, a JSON line per training, figures.

python examples/digits_compare.py FILE.jsonl    prints the table of an earlier run as Markdown
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace

from digits_data import Settings
from digits_methods import Result, train
from digits_table import COLUMNS, Record, label, summarise
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

import adareduce.torch as hvd
from adareduce.bench.machine import describe

# Rates of one worker. 0.5 is about the largest that a single worker trains well with, 0.1 is
# conservative: with it there is room for a sum, too.
RATES = (0.5, 0.1)
ADASCALE_RATE = 0.2


def compare(arguments: argparse.Namespace) -> None:
    """Runs and prints everything. Collective; blocks."""
    base = Settings(
        method="",
        workers=1,
        batch=arguments.batch,
        epochs=arguments.epochs,
        reference_steps=arguments.steps,
        hidden=arguments.hidden,
        activation=arguments.activation,
        raw_pixels=arguments.raw_pixels,
    )
    workers, seeds = sorted(set(arguments.workers)), range(arguments.seeds)
    if arguments.quick:
        base = replace(
            base, epochs=min(3, base.epochs), reference_steps=min(400, base.reference_steps)
        )
        workers, seeds = workers[:1], range(1)
    for count in workers:
        if count < 2 or count % hvd.size() != 0:
            raise SystemExit(
                f"--workers must be multiples of the {hvd.size()} ranks and above 1, got {count}"
            )
    is_first = hvd.rank() == 0
    console = Console(soft_wrap=True)
    progress = Progress(
        TextColumn("{task.description:36}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    if is_first:
        print_settings(console, base, seeds)
    origin = describe()
    records: list[Record] = []
    with progress if is_first else nullcontext():
        plan = list(trainings(base, workers, seeds))
        bar = progress.add_task("", total=len(plan))
        now = progress.add_task("", total=100)
        adascale_steps: dict[tuple[int, int], int] = {}
        for settings, is_stretched in plan:
            if is_stretched:
                settings = replace(
                    settings, num_steps=adascale_steps[settings.workers, settings.seed]
                )
            progress.update(bar, description=label(asdict(settings)))
            workers_and_seed = f"  {settings.workers} workers, seed {settings.seed}"
            progress.update(now, description=workers_and_seed, completed=0)

            def show(share: float, result: Result) -> None:
                if is_first and (result.steps % 20 == 0 or share >= 1.0):
                    progress.update(now, completed=min(100, round(100 * share)))

            result = train(settings, show)
            if settings.method == "adascale":
                adascale_steps[settings.workers, settings.seed] = result.steps
            records.append(to_record(settings, result, origin))
            progress.advance(bar)
    if not is_first:
        return
    console.print(as_table(summarise(records)))
    if arguments.json is not None:
        with arguments.json.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    if arguments.figures is not None:
        import digits_figures  # matplotlib may be missing

        for file in digits_figures.draw(records, arguments.figures):
            console.print(f"wrote {file}")


def trainings(
    base: Settings, workers: Sequence[int], seeds: Sequence[int]
) -> Iterator[tuple[Settings, bool]]:
    """All trainings in order, and whether one takes as many steps as AdaScale has before it."""
    for seed in seeds:
        base = replace(base, seed=seed)
        for rate in RATES:
            settings = replace(base, rate=rate)
            yield replace(settings, method="sum"), False
            for count in workers:
                for method in ("sum", "average", "adasum"):
                    yield replace(settings, method=method, workers=count), False
        settings = replace(base, rate=ADASCALE_RATE)
        yield replace(settings, method="adascale"), False
        for count in workers:
            yield replace(settings, method="adascale", workers=count), False
            yield replace(settings, method="lsw", workers=count), False
            yield replace(settings, method="lsw", workers=count), True


def print_settings(console: Console, base: Settings, seeds: Sequence[int]) -> None:
    console.print(
        f"{hvd.size()} ranks, seeds 0 to {len(seeds) - 1}, network 64-{base.hidden}-10 with"
        f" {base.activation},"
        f" {base.batch} samples per worker and step, pixels"
        f" {'as they are' if base.raw_pixels else 'centred'}\n"
        f"sum, average, Adasum: {base.epochs} epochs, no momentum, warm-up over 10 % of the steps,"
        " then linear decay; the rate is never rescaled\n"
        f"AdaScale, LSW (linear scaling with warm-up; stretched: in as many steps as AdaScale):"
        f" momentum {base.momentum}, rate {ADASCALE_RATE} decaying to {base.final_rate} over"
        f" {base.reference_steps} steps of one worker"
    )


def to_record(settings: Settings, result: Result, origin: Record) -> Record:
    """What the JSON line of a training says; undefined numbers are null there."""
    return {
        "example": "train_digits",
        "ranks": hvd.size(),
        **asdict(settings),
        "steps": result.steps,
        "accuracy": result.accuracy,
        "train_loss": None if result.diverged else result.train_loss,
        "diverged": result.diverged,
        "gains": [round(gain, 4) for gain in result.gains],
        "orthogonality": [[round(ratio, 4) for ratio in row] for row in result.orthogonality],
        "seconds": round(result.seconds, 2),
        **origin,
    }


def as_table(rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title="mean +- standard deviation over seeds")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*row, end_section=following is None or following[3] != row[3])
    return table
