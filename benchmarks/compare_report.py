"""Makes rows of what the jobs of compare_peers.py measured: medians, ratios, targets.

A ratio is that of the medians of one case in one job, whose contenders took turns; over the jobs
(rounds) its median counts. A repeat is near if the round trips between two cores right before it
and right after it were, far or on one core likewise, else unsteady.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from compare_targets import TARGETS, evaluated

from adareduce.bench.timing import LEAST_REPEATS, Ratio

Line = dict[str, Any]
# A round trip between two hardware threads of one core takes less: 50 ns on the machine of
# docs/performance.md, where cores are 150 ns and more apart. 80 ns was seen between two of a Zen 4
# that share a cache; where they are nearer than 65, another limit is wanted.
ONE_CORE_NS = 65.0
NEAR_NS = 200.0  # a round trip between two cores that share a cache takes less
DISTURBED_NS = 2000.0  # no two cores are so far from each other: something else had one of them
STATES = ("near", "far", "one core", "unsteady")
_RESAMPLES = 2000
_TAIL = 0.025
_OURS = (("sum", "ordinary"), ("sum", "shared"), ("adasum", "ordinary"), ("adasum", "shared"),
         ("average", "statistics"))  # fmt: skip
_SUM_ONLY = ("gloo", "mpi")
# Horovod's two operations are each compared with the same of ours.
_OTHERS = (*_SUM_ONLY, "horovod")
_LATENCY_BYTES = 64 * 2**10  # up to here a difference says more than a ratio

Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def interval(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], combine: Combine
) -> Ratio | None:
    """Median over the rounds of `combine` (theirs, ours), each of a round's medians, with 95 %.

    The interval is a bootstrap percentile interval of two stages: rounds are drawn with
    replacement, then repeats within each, ours and theirs of a repeat together, since what disturbs
    one disturbs both. Of few rounds it is hardly more than their range.

    Args:
        ours: Seconds, repeat by repeat, of each round.
        theirs: The same of the other contender.
        combine: ``torch.div`` or ``torch.sub``, elementwise.

    Returns:
        None where there are fewer than LEAST_REPEATS repeats in all.

    Source: Davison, Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    pairs = [
        torch.tensor([theirs_of, ours_of], dtype=torch.float64)
        for theirs_of, ours_of in zip(theirs, ours, strict=True)
        if len(ours_of) > 0
    ]
    if sum(pair.shape[1] for pair in pairs) < LEAST_REPEATS:
        return None
    rounds = len(pairs)
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for pair in pairs:
        count = pair.shape[1]
        repeats = torch.randint(count, (rounds, _RESAMPLES, count), generator=generator)
        medians = _medians(pair[:, repeats])
        drawn.append(combine(medians[0], medians[1]))
    # Which round fills each place of a resample.
    chosen = torch.randint(rounds, (1, rounds, _RESAMPLES), generator=generator)
    resampled = _medians(torch.stack(drawn).gather(0, chosen)[0].T)
    low, high = torch.quantile(
        resampled, torch.tensor([_TAIL, 1 - _TAIL], dtype=resampled.dtype)
    ).tolist()
    values = torch.stack([combine(*_medians(pair)) for pair in pairs])
    return Ratio(float(_medians(values)), low, high)


def states(round_trips_ns: Sequence[float | None]) -> list[str]:
    """Of each repeat, from the round trips around it: near, far, one core, or unsteady.

    Where both hardware threads of one core are all that a virtual machine has for a while, its
    ranks share what a core can do: a limit for two cores says nothing about that.
    """

    def state(nanoseconds: float | None) -> str:
        if nanoseconds is None or nanoseconds > DISTURBED_NS:
            return "unsteady"
        if nanoseconds < ONE_CORE_NS:
            return "one core"
        return "near" if nanoseconds < NEAR_NS else "far"

    found = [state(trip) for trip in round_trips_ns]
    pairs = itertools.pairwise(found)
    return [before if before == after else "unsteady" for before, after in pairs]


def make_rows(lines: Sequence[Line]) -> list[Line]:
    """A row for each case, number of ranks and type, and each of our operations and forms."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["case"], line["ranks"], line["dtype"]), []).append(line)
    return [row for group in groups.values() for row in _rows_of(group)]


def _rows_of(lines: list[Line]) -> Iterator[Line]:
    for op, form in _OURS:
        name = f"ours {op} {form}"
        measured = [line for line in lines if name in line["seconds"]]
        if measured:
            yield _row(name, op, form, measured)


def _row(name: str, op: str, form: str, lines: list[Line]) -> Line:
    first = lines[0]
    trips = [t for line in lines for t in line["round_trips_ns"] if t is not None]
    found = [state for line in lines for state in states(line["round_trips_ns"])]
    row: Line = {
        **{key: first[key] for key in ("case", "bytes", "tensors", "ranks", "dtype")},
        "op": op,
        "form": form,
        "rounds": len(lines),
        "repeats": sum(len(line["seconds"][name]) for line in lines),
        "calls": sorted({line["calls"][name] for line in lines}),
        "median_seconds": _median(lines, name),
        "wrong": sum(line["wrong"][name] for line in lines),
        "states": {s: found.count(s) / len(found) for s in STATES},
        "core_round_trip_ns": statistics.median(trips) if trips else None,
        "peers": {} if op == "average" else _peers(name, op, lines),
        "own": _own(name, op, form, lines),
        "choices": first["choices"],
        "settings": first["settings"],
        "shares_cores": first["shares_cores"],
        **{key: first[key] for key in ("date", "commit", "machine")},
        "versions": {
            **{name: text for line in lines for name, text in line["versions"].items()},
            "mpi": ", ".join(sorted({line["versions"]["mpi"] for line in lines})),
        },
    }
    row["targets"] = [entry for target in TARGETS for entry in evaluated(target, row)]
    return row


def _peers(name: str, op: str, lines: list[Line]) -> dict[str, Line]:
    """How each peer compares, by its name; MPI by the vendor's."""
    found = {}
    for library in _OTHERS:
        vendors = sorted({_vendor(line) for line in lines}) if library == "mpi" else [library]
        word = "sum" if library in _SUM_ONLY else op
        for peer in vendors:
            jobs = [line for line in lines if library != "mpi" or _vendor(line) == peer]
            found[peer] = _peer(name, f"{library} {word} ", jobs)
    return found


def _peer(name: str, prefix: str, lines: list[Line]) -> Line:
    """The peer's form with the lowest median, and ours beside it; or why there is none."""
    forms = {n for line in lines for n in line["seconds"] if n.startswith(prefix)}
    if not forms:
        return {"unavailable": _reason(prefix, lines)}
    medians = {form: _median([x for x in lines if form in x["seconds"]], form) for form in forms}
    best = min(medians, key=lambda form: medians[form])
    jobs = [line for line in lines if best in line["seconds"]]
    entry: Line = {
        "contender": best,
        "median_seconds": medians[best],
        "wrong": sum(line["wrong"][best] for line in jobs),
        "ratio": _compared(jobs, name, best, torch.div),
        "medians": medians,  # of all forms
    }
    if jobs[0]["bytes"] <= _LATENCY_BYTES:
        entry["difference"] = _compared(jobs, best, name, torch.sub)  # seconds that we take more
    return entry


def _own(name: str, op: str, form: str, lines: list[Line]) -> dict[str, Line]:
    """Ratios to our own simpler call: Adasum to the sum, statistics to the average without."""
    simpler = {"adasum": f"ours sum {form}", "average": "ours average ordinary"}.get(op)
    jobs = [line for line in lines if simpler in line["seconds"]]
    if simpler is None or not jobs:
        return {}
    return {
        simpler: {
            "median_seconds": _median(jobs, simpler),
            "wrong": sum(line["wrong"][simpler] for line in jobs),
            "ratio": _compared(jobs, simpler, name, torch.div),
        }
    }


def _compared(lines: list[Line], below: str, above: str, combine: Combine) -> Line:
    """The interval over all repeats, over the near ones and over the far ones."""
    result = {}
    for state in ("all", "near", "far"):
        kept = [
            [
                index
                for index, is_in in enumerate(states(line["round_trips_ns"]))
                if state in ("all", is_in)
            ]
            for line in lines
        ]
        ours = [[x["seconds"][below][i] for i in k] for x, k in zip(lines, kept, strict=True)]
        theirs = [[x["seconds"][above][i] for i in k] for x, k in zip(lines, kept, strict=True)]
        found = interval(ours, theirs, combine)
        result[state] = None if found is None else found._asdict()
    return result


def _vendor(line: Line) -> str:
    name: str = line["versions"]["mpi"]
    return " ".join(word for word in name.split() if not word[:1].isdigit())


def _median(lines: list[Line], name: str) -> float:
    return statistics.median(seconds for line in lines for seconds in line["seconds"][name])


def _reason(prefix: str, lines: list[Line]) -> str:
    library = prefix.split()[0]
    for line in lines:  # of a job that had the library, if there is one
        for name, reason in line["unavailable"].items():
            if name.startswith(prefix):
                return str(reason)
    found = [line["missing"][library] for line in lines if library in line["missing"]]
    return str(found[0]) if found else "not measured"


def _medians(values: torch.Tensor) -> torch.Tensor:
    return torch.quantile(values, 0.5, dim=-1)  # torch.median takes the lower of two middle ones


def is_wrong(lines: Sequence[Line]) -> bool:
    """Whether any contender gave a wrong element."""
    return any(count for line in lines for count in line["wrong"].values())
