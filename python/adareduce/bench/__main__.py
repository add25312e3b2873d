"""``python -m adareduce.bench``: one row per size, printed as soon as it is measured."""

from __future__ import annotations

import functools
import os
import socket
import sys
from collections.abc import Callable, Sequence

import torch

import adareduce.torch as hvd
from adareduce.bench import gpu, machine, plot
from adareduce.bench.arguments import Settings, parse
from adareduce.bench.cases import Allreduce, Case, InPlaceCase, make_case
from adareduce.bench.inputs import poisoned_allocations
from adareduce.bench.peers import Peers
from adareduce.bench.ranks import Ranks
from adareduce.bench.report import (
    IN_PLACE,
    OUT_OF_PLACE,
    Form,
    Other,
    Row,
    Table,
    row_dtype,
    to_json,
)
from adareduce.bench.timing import Contender, HostClock, measure, ratio_of_medians, summarise
from adareduce.bench.verification import count_wrong

_PLAIN, _STATS = "plain", "stats"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark. Collective, blocks.

    Returns:
        The exit status: 1 if an element was wrong.
    """
    settings = parse(arguments)
    hvd.init()
    ranks = Ranks()
    return ranks.run(lambda: _run(settings, ranks))


def _run(settings: Settings, ranks: Ranks) -> int:
    problem = ranks.broadcast(_problem(settings, ranks) if ranks.rank == 0 else None)
    if problem is not None:
        ranks.print(f"python -m adareduce.bench: error: {problem}")
        return 2
    table = Table(settings)
    of_device = {}
    if settings.on_gpu:
        gpu.select()
        of_device = gpu.describe()
    placement = ranks.gather(_placement(ranks.rank, settings))
    ranks.print(table.header(placement, gpu.header(of_device) if of_device else _on_cpu()))
    origin = machine.describe() | of_device if ranks.rank == 0 else {}
    peers = Peers(ranks, settings.device) if settings.peers else None
    clock = gpu.DeviceClock() if settings.on_gpu else HostClock()
    rows = []
    for size in settings.sizes():
        case = make_case(settings, size, ranks.rank, ranks.size)
        row = _measure_row(case, ranks, peers, clock)
        rows.append(row)
        ranks.print(table.line(row))
        if settings.json and ranks.rank == 0:
            with open(settings.json, "a", encoding="utf-8") as file:
                now = origin | {"shared_memory": hvd.shared_memory_choices()._asdict()}
                file.write(to_json(row, settings, ranks.hosts, now) + "\n")
    if peers is not None:
        peers.close()
    ranks.print(table.trailer(rows))
    for what, choice, calls in hvd.shared_memory_choices().choices:
        ranks.print(f"# shared memory, {what} ({calls} calls): {choice}")
    if settings.plot and ranks.rank == 0:
        plot.draw(rows, f"{settings.collective}, {ranks.size} ranks", settings.plot)
    return 1 if any(row.wrong() for row in rows) else 0


def _on_cpu() -> list[str]:
    """How CPU tensors travel, for the header."""
    found = hvd.shared_memory_choices()
    if not found.used:
        return [f"shared memory: not used: {found.why_not}"]
    workers = f", {found.workers} workers on rank 0" if found.workers > 1 else ""
    return [f"shared memory: used{workers}"]


def _problem(settings: Settings, ranks: Ranks) -> str | None:
    """Why this cannot be measured by so many ranks here; None if it can."""
    if settings.root >= ranks.size:
        return f"--root must be below the {ranks.size} ranks, got {settings.root}"
    if settings.collective != "barrier":
        smallest = make_case(settings, settings.sizes()[0], ranks.rank, ranks.size)
        if smallest.num_bytes == 0:
            return f"--minbytes must be enough for an element per rank, got {settings.minbytes}"
    for option, path in (("--json", settings.json), ("--plot", settings.plot)):
        if path is not None:
            try:
                with open(path, "ab"):
                    pass
            except OSError as error:
                return (
                    f"{option} must be a file that can be written, got {path!r}: {error.strerror}"
                )
    return None


def _measure_row(case: Case, ranks: Ranks, peers: Peers | None, clock: HostClock) -> Row:
    settings = case.settings
    buffers = [tensor.clone() for tensor in case.inputs]
    wrong = _check(case, ranks, buffers)
    contenders = [Contender(OUT_OF_PLACE, case.run, case.touch), *_in_place(case, buffers)]
    able, missing = peers.contenders(case) if peers is not None else ([], {})
    everybody = [*contenders, *able]
    if settings.graph:
        everybody = [gpu.captured(contender) for contender in everybody]
    seconds = measure(everybody, ranks, settings.warmup_iters, settings.iters, clock)
    round_trip = None if settings.on_gpu else ranks.core_round_trip_ns()

    ours = seconds.get(IN_PLACE, seconds[OUT_OF_PLACE])
    others = {
        peer.name: Other(summarise(seconds[peer.name]), ratio_of_medians(seconds[peer.name], ours))
        for peer in able
    }
    if settings.stats:
        ratio = ratio_of_medians(seconds[_STATS], seconds[_PLAIN])
        others[_STATS] = Other(summarise(seconds[_STATS]), ratio)
    return Row(
        collective=settings.collective,
        num_bytes=case.num_bytes,
        count=case.count,
        dtype=row_dtype(settings),
        redop=case.redop,
        root=case.root,
        tensors=len(case.inputs),
        factor=case.factor(ranks.size),
        forms={name: Form(summarise(seconds[name]), wrong[name]) for name in wrong},
        others=others,
        missing=missing,
        core_round_trip_ns=round_trip,
    )


def _in_place(case: Case, buffers: list[torch.Tensor]) -> list[Contender]:
    """The contenders that leave their outputs in `buffers`."""
    if not isinstance(case, InPlaceCase):
        return []
    runs: dict[str, Callable[[list[torch.Tensor]], object]] = {IN_PLACE: case.run_in_place}
    if case.settings.stats and isinstance(case, Allreduce):
        runs |= {_PLAIN: case.run_plain, _STATS: case.run_with_stats}
    restore = functools.partial(case.restore, buffers)
    return [Contender(name, functools.partial(run, buffers), restore) for name, run in runs.items()]


def _check(case: Case, ranks: Ranks, buffers: list[torch.Tensor]) -> dict[str, int | None]:
    """Wrong elements of each form that the case has; None where nothing is checked."""

    def run_out_of_place() -> list[torch.Tensor]:
        with poisoned_allocations():
            return case.run()

    runs = {OUT_OF_PLACE: run_out_of_place}
    if isinstance(case, InPlaceCase):
        runs[IN_PLACE] = functools.partial(_run_in_place, case, buffers)
    if not case.settings.check:
        return dict.fromkeys(runs)
    expected = case.expected()
    found: dict[str, int | None] = {}
    for form, run in runs.items():
        found[form] = count_wrong(
            ranks, run(), run(), expected, case.dtype, ranks_agree=case.ranks_agree
        )
    if case.settings.stats and isinstance(case, Allreduce):
        found[IN_PLACE] = (found[IN_PLACE] or 0) + _count_wrong_with_stats(case, ranks, buffers)
    return found


def _run_in_place(case: InPlaceCase, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    case.restore(buffers)
    return [output.clone() for output in case.run_in_place(buffers)]


def _count_wrong_with_stats(case: Allreduce, ranks: Ranks, buffers: list[torch.Tensor]) -> int:
    """As for the other forms; a wrong statistic counts as one element per rank."""
    calls = []
    stats = None
    for _ in range(2):
        case.restore(buffers)
        outputs, stats = case.run_with_stats(buffers)
        calls.append([output.clone() for output in outputs])
    first, second = calls
    wrong = count_wrong(ranks, first, second, case.expected(), case.dtype, ranks_agree=True)
    assert stats is not None
    return wrong + sum(int(n) for n in ranks.gather(case.count_wrong_statistics(stats)))


def _placement(rank: int, settings: Settings) -> str:
    device = gpu.placement() if settings.on_gpu else f"cpu [{machine.cpu_model()}]"
    return f" Rank {rank:>2} Pid {os.getpid():>6} on {socket.gethostname():>10} device {device}"


if __name__ == "__main__":
    sys.exit(main())
