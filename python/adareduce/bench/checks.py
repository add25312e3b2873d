"""The single checks of ``python -m adareduce.check``: each says on every rank what is wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import adareduce.torch as hvd
from adareduce.bench.arguments import parse
from adareduce.bench.cases import make_case
from adareduce.bench.ranks import OtherRankError, Ranks
from adareduce.bench.timing import Contender, measure, summarise
from adareduce.bench.verification import count_wrong

_LATE_SECONDS = 0.2
_IDLE_SECONDS = 1.0
_MOST_IDLE_SHARE = 0.1  # of one core; a spinning thread takes all of it
_SMALL = "100K"
_LARGE = "64M"
_REPEATS = 3


class Failure(Exception):  # noqa: N818
    """A check has failed; the text says how."""


class Outcome(NamedTuple):
    """A check's end, the same on all ranks; the remark is its result or the reason."""

    name: str
    passed: bool
    remark: str


_Check = Callable[[Ranks], str]


def run_checks(ranks: Ranks) -> Iterator[Outcome]:
    """Runs all checks that make sense on so many ranks. Collective, blocks."""
    for name, check, least_ranks in _CHECKS:
        if ranks.size >= least_ranks:
            yield _run(name, check, ranks)


def _run(name: str, check: _Check, ranks: Ranks) -> Outcome:
    # Each rank takes part in as many exchanges, whoever fails where: the others learn of it in the
    # one that they wait in, at the latest in the last.
    try:
        try:
            remark = check(ranks)
        except OtherRankError:
            raise
        except Exception as error:  # whatever it is, it is the finding
            kind = "" if isinstance(error, Failure) else f"{type(error).__name__}: "
            ranks.announce(" ".join(f"{kind}{error}".split()))
        ranks.gather(None)
    except OtherRankError as error:
        return Outcome(name, False, str(error))
    return Outcome(name, True, remark)


def _gives(command: str, *dtypes: str) -> _Check:
    """A check that a collective's results are right, for several dtypes."""

    def check(ranks: Ranks) -> str:
        for dtype in dtypes:
            _require_right(ranks, f"{command} -d {dtype} -b {_SMALL}", dtype)
        return ", ".join(dtypes)

    return check


def _require_right(ranks: Ranks, command: str, label: str) -> None:
    settings = parse(command.split())
    case = make_case(settings, settings.minbytes, ranks.rank, ranks.size)
    first, second = case.run(), case.run()
    wrong = count_wrong(
        ranks, first, second, case.expected(), case.dtype, ranks_agree=case.ranks_agree
    )
    if wrong > 0:
        total = sum(ranks.gather(sum(output.numel() for output in first)))
        raise Failure(f"{label}: {wrong} of {total} elements are wrong")


def _barrier(ranks: Ranks) -> str:
    ranks.align()
    begin = time.perf_counter()
    if ranks.rank == 0:
        time.sleep(_LATE_SECONDS)
    hvd.barrier()
    elapsed = time.perf_counter() - begin
    if elapsed < _LATE_SECONDS / 2:
        raise Failure(f"went on after {elapsed:.3f} s, before rank 0 came")
    return "waits for the last rank"


def _disagreement(ranks: Ranks) -> str:
    is_odd = ranks.rank == ranks.size - 1
    raised = False
    try:
        hvd.allreduce(torch.ones(3 if is_odd else 2), name="intended disagreement", op=hvd.Sum)
    except hvd.HorovodInternalError:
        raised = True
    if not all(ranks.gather(raised)):
        raise Failure("two shapes in one allreduce: no error" if not raised else "others: no error")
    total = hvd.allreduce(torch.ones(2), op=hvd.Sum)
    if total.tolist() != [ranks.size] * 2:
        raise Failure(f"afterwards a sum of ones is {total.tolist()}")
    return "raises on every rank; works on afterwards"


def _bandwidth(ranks: Ranks) -> str:
    command = f"allreduce -b {_LARGE}"
    _require_right(ranks, command, _LARGE)
    settings = parse(command.split())
    case = make_case(settings, settings.minbytes, ranks.rank, ranks.size)
    seconds = measure([Contender("ours", case.run)], ranks, 1, _REPEATS)["ours"]
    median = summarise(seconds).median
    algbw = case.num_bytes / median / 1e9
    busbw = algbw * case.factor(ranks.size)
    return f"{1e3 * median:.1f} ms, algbw {algbw:.2f} GB/s, busbw {busbw:.2f} GB/s"


def _idle(ranks: Ranks) -> str:
    hvd.barrier()
    time.sleep(_LATE_SECONDS)  # torch's threads wait for more work a while
    begin = time.process_time()
    time.sleep(_IDLE_SECONDS)
    share = (time.process_time() - begin) / _IDLE_SECONDS
    if share > _MOST_IDLE_SHARE:
        raise Failure(f"uses {100 * share:.0f} % of a core while nothing happens")
    return f"{100 * max(ranks.gather(share)):.1f} % of a core at most"


_CHECKS: list[tuple[str, _Check, int]] = [
    ("sum", _gives("allreduce -o sum", "float32", "float64", "int32", "int64"), 1),
    ("average", _gives("allreduce -o avg", "float32", "float64"), 1),
    ("minimum", _gives("allreduce -o min", "float32", "uint8"), 1),
    ("maximum", _gives("allreduce -o max", "float32", "uint8"), 1),
    ("Adasum", _gives("allreduce -o adasum", "float32", "float64"), 1),
    ("half types, sum", _gives("allreduce -o sum", "float16", "bfloat16"), 1),
    ("half types, Adasum", _gives("allreduce -o adasum", "float16", "bfloat16"), 1),
    ("broadcast", _gives("broadcast", "float32", "bool"), 1),
    ("allgather", _gives("allgather", "float32", "int64"), 1),
    ("alltoall", _gives("alltoall", "float32", "int64"), 1),
    ("reducescatter", _gives("reducescatter", "float32", "int32"), 1),
    ("barrier", _barrier, 1),
    ("disagreement", _disagreement, 2),
    (f"{_LARGE}B allreduce", _bandwidth, 1),
    ("idle", _idle, 1),
]
