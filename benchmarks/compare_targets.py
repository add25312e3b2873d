"""What compare_peers.py's ratios are to be; docs/performance.md, "Targets", says the same in words.

All of two ranks, float32. A target holds where the cores are near and where they are far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_MPIS = ("MPICH", "Open MPI")
_MEDIUM = ("1M", "4M", "16M")
_LARGE = ("64M", "256M", "1G", "resnet50")


@dataclass(frozen=True)
class Target:
    """One limit of a kind of rows.

    Attributes:
        text: What is wanted.
        op: Of our call.
        form: Of our call.
        cases: Keys of the rows.
        against: Peers, of which the best counts; or our own contender.
        near: The limit where cores are near.
        far: The limit where cores are far.
        is_least: Whether more is better: a peer's time / ours. Else ours / our own simpler call's,
            or (`is_difference`) seconds that we take more than the peer.
        is_difference: The limit is of a difference.
    """

    text: str
    op: str
    form: str
    cases: tuple[str, ...]
    against: tuple[str, ...]
    near: float
    far: float
    is_least: bool = True
    is_difference: bool = False


TARGETS = (
    Target("Adasum, 4 times as fast as Horovod's", "adasum", "ordinary", ("resnet50",),
           ("horovod",), 4.0, 4.0),
    Target("Adasum, 2.5 times (far: 2) as fast as MPI's sum", "adasum", "ordinary", ("resnet50",),
           _MPIS, 2.5, 2.0),
    Target("Adasum of shared tensors, 5 times as fast as MPI's sum", "adasum", "shared",
           ("resnet50",), _MPIS, 5.0, 5.0),
    Target("sum, 1 to 16 MB, twice as fast (far: as fast) as the best of gloo and MPI", "sum",
           "ordinary", _MEDIUM, ("gloo", *_MPIS), 2.0, 1.0),
    Target("sum, 64 MB and up, ResNet-50: 3 times as fast as the best of gloo and MPI", "sum",
           "ordinary", _LARGE, ("gloo", *_MPIS), 3.0, 3.0),
    Target("sum, 4 KB: at most 8 us more than mpi4py", "sum", "ordinary", ("4K",), _MPIS,
           8e-6, 8e-6, is_least=False, is_difference=True),
    Target("Adasum at most 1.5 times our sum", "adasum", "ordinary", ("resnet50",),
           ("ours sum ordinary",), 1.5, 1.5, is_least=False),
    Target("Adasum of shared tensors at most 1.9 times our sum", "adasum", "shared", ("resnet50",),
           ("ours sum shared",), 1.9, 1.9, is_least=False),
    Target("average with statistics at most 1.03 times without", "average", "statistics",
           ("resnet50",), ("ours average ordinary",), 1.03, 1.03, is_least=False),
)  # fmt: skip


def evaluated(target: Target, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The target's verdict for near and for far cores; nothing where it does not speak of the row.

    The verdict is "met" or "missed" where the whole interval is on that side of the limit,
    "perhaps met" or "perhaps missed" where only the value is, else "not measured": also where it
    would be met, and one of the row's peers has too few such repeats.
    """
    key = (row["op"], row["form"], row["ranks"], row["dtype"])
    if key != (target.op, target.form, 2, "float32") or row["case"] not in target.cases:
        return
    kind = "difference" if target.is_difference else "ratio"
    entries = {
        name: entry[kind]
        for name, entry in {**row["peers"], **row["own"]}.items()
        if name in target.against and kind in entry
    }
    for state, limit in (("near", target.near), ("far", target.far)):
        found = {name: of[state] for name, of in entries.items() if of[state] is not None}
        pick = min if target.is_least else max  # the best peer
        worst = pick(found, key=lambda name: found[name]["value"]) if found else None
        said = verdict(found[worst], limit, target.is_least) if worst else "not measured"
        if said.endswith("met") and len(found) < len(entries):
            worst, said = None, "not measured"  # a peer that has no such repeats may be better
        yield {
            "target": target.text,
            "state": state,
            "limit": limit,
            "is_least": target.is_least,
            "unit": "s" if target.is_difference else "",
            "against": worst,
            "not_compared": sorted(set(target.against) - set(found)),
            "found": found.get(worst) if worst is not None else None,
            "verdict": said,
        }


def verdict(found: dict[str, float], limit: float, is_least: bool) -> str:
    """On which side of the limit an interval and its value are."""
    sign = 1 if is_least else -1
    distances = [sign * (found[key] - limit) for key in ("low", "value", "high")]
    if min(distances) >= 0:
        return "met"
    if max(distances) < 0:
        return "missed"
    return "perhaps met" if distances[1] >= 0 else "perhaps missed"
