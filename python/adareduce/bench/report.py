"""What a reader sees: header, one line per row, trailer; and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from adareduce.bench import machine
from adareduce.bench.arguments import Settings, dtype_name
from adareduce.bench.peers import NAMES
from adareduce.bench.timing import Ratio, Summary

OUT_OF_PLACE = "out-of-place"
IN_PLACE = "in-place"

_SHORT_NAMES = {"float16": "half", "float32": "float", "float64": "double"}  # as nccl-tests
_MISSING = "N/A"


@dataclass(frozen=True)
class Form:
    """One form of our call: its times, and wrong elements (None: not checked)."""

    summary: Summary
    wrong: int | None


@dataclass(frozen=True)
class Other:
    """Something that a row is compared with, and the ratio of its median to ours, or ours to it."""

    summary: Summary
    ratio: Ratio


@dataclass
class Row:
    """One size."""

    collective: str
    num_bytes: int
    count: int
    dtype: str
    redop: str
    root: int
    tensors: int
    factor: float
    forms: dict[str, Form]
    others: dict[str, Other] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # peers, and why they are
    core_round_trip_ns: float | None = None  # between two cores, after the row

    def algbw(self, seconds: float) -> float:
        """GB/s of the row's size."""
        return self.num_bytes / seconds / 1e9

    def busbw(self, seconds: float) -> float:
        """GB/s that the busiest link has carried, by nccl-tests' convention."""
        return self.algbw(seconds) * self.factor

    def wrong(self) -> int:
        """Wrong elements of all forms."""
        return sum(form.wrong or 0 for form in self.forms.values())


class Table:
    """Columns as nccl-tests', further ones to their right."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._peers = NAMES[settings.device] if settings.peers else ()
        self._extra = ["stats"] if settings.stats else []
        self._extra += self._peers

    def header(self, placement: Sequence[str], of_device: Sequence[str] = ()) -> str:
        """Settings, where each rank runs (one line each), and the titles of the columns."""
        s = self._settings
        step = f"{s.stepfactor}(factor)" if s.stepfactor > 1 else f"{s.stepbytes}(bytes)"
        lines = [
            f"adareduce bench: {s.collective}",
            f"nRanks {len(placement)} minBytes {s.minbytes} maxBytes {s.maxbytes} step: {step}"
            f" warmup iters: {s.warmup_iters} iters: {s.iters} validation: {int(s.check)}",
            "",
            "Using ranks",
            *placement,
            "",
            machine.versions_line(),
            *of_device,
            "time: median over the iterations; an iteration takes as long as on its slowest rank",
        ]
        if s.layers != 1:
            lines.append(f"layers: {s.layers}; tensors of a row are reduced by one grouped call")
        if s.check:
            lines.append("#wrong: every element of two calls, against float64 or exact integers")
        if s.stats:
            lines.append("stats: median with AdaScale statistics; ratio: stats / plain in place")
        if s.graph:
            lines.append("calls are captured once and replayed, those of peers too")
        if s.peers:
            peers = ", ".join(self._peers)
            lines.append(
                f"{peers}: medians, interleaved with ours iteration by iteration; ratio: peer /"
                " ours (in place where there is that form)"
            )
            if s.is_reduction and s.op == "adasum":
                lines.append(f"{peers}: no Adasum there; this is the sum")
        if self._extra:
            lines.append("[low, high]: 95 % bootstrap interval of the ratio of medians")
        return "\n".join([f"# {line}".rstrip() for line in [*lines, ""]] + self._titles())

    def line(self, row: Row) -> str:
        """One row."""
        name = _SHORT_NAMES.get(row.dtype, row.dtype)
        text = f"{row.num_bytes:>12} {row.count:>13} {name:>9} {row.redop:>7} {row.root:>7}"
        for form in (OUT_OF_PLACE, IN_PLACE):
            text += self._form(row, row.forms.get(form))
        for extra in self._extra:
            text += self._other(row.others.get(extra))
        return text

    def trailer(self, rows: Sequence[Row]) -> str:
        """The verdict and the average."""
        wrong = sum(row.wrong() for row in rows)
        speeds = [row.busbw(form.summary.median) for row in rows for form in row.forms.values()]
        missing = {name: reason for row in rows for name, reason in row.missing.items()}
        lines = [f"{name}: n/a: {reason}" for name, reason in missing.items()]
        lines.append(f"Out of bounds values : {wrong} {'FAILED' if wrong else 'OK'}")
        lines.append(f"Avg bus bandwidth    : {sum(speeds) / len(speeds):.6g}")
        return "\n".join(f"# {line}" for line in lines)

    def _titles(self) -> list[str]:
        tails = [" p50      p99"] if self._settings.percentiles else []
        first = f"#{'size':>11} {'count':>13} {'type':>9} {'redop':>7} {'root':>7}"
        units = f"#{'(B)':>11} {'(elements)':>13} {'':>9} {'':>7} {'':>7}"
        above = "#" + " " * (len(first) - 1)
        form = f" {'time':>9} {'algbw':>7} {'busbw':>7}"
        form_units = f" {'(us)':>9} {'(GB/s)':>7} {'(GB/s)':>7}"
        if tails:
            form += f" {'p50':>9} {'p99':>9}"
            form_units += f" {'(us)':>9} {'(us)':>9}"
        form, form_units = f"{form} {'#wrong':>6}", f"{form_units} {'':>6}"
        for name in (OUT_OF_PLACE, IN_PLACE):
            above += f"{name:^{len(form)}}"
            first += form
            units += form_units
        for name in self._extra:
            first += f" {name:>9} {'ratio':>6} {'[low, high]':>15}"
            units += f" {'(us)':>9} {'':>6} {'':>15}"
        return [above.rstrip(), first.rstrip(), units.rstrip()]

    def _form(self, row: Row, form: Form | None) -> str:
        percentiles = self._settings.percentiles
        if form is None:
            text = f" {_MISSING:>9} {_MISSING:>7} {_MISSING:>7}"
            text += f" {_MISSING:>9} {_MISSING:>9}" if percentiles else ""
            return f"{text} {_MISSING:>6}"
        times = form.summary
        text = f" {_microseconds(times.median)} {row.algbw(times.median):>7.2f}"
        text += f" {row.busbw(times.median):>7.2f}"
        if percentiles:
            p99 = f"{_MISSING:>9}" if times.p99 is None else _microseconds(times.p99)
            text += f" {_microseconds(times.p50)} {p99}"
        return f"{text} {_MISSING if form.wrong is None else form.wrong:>6}"

    def _other(self, other: Other | None) -> str:
        if other is None:
            return f" {'n/a':>9} {'n/a':>6} {'n/a':>15}"
        value, low, high = other.ratio
        interval = f"[{low:.2f},{high:.2f}]"
        return f" {_microseconds(other.summary.median)} {value:>6.2f} {interval:>15}"


def to_json(row: Row, settings: Settings, hosts: Sequence[str], origin: dict[str, Any]) -> str:
    """One line. Times in microseconds, bandwidths in GB/s (10^9)."""
    content = {
        "collective": row.collective,
        "bytes": row.num_bytes,
        "count": row.count,
        "dtype": row.dtype,
        "redop": row.redop,
        "root": row.root,
        "tensors": row.tensors,
        "ranks": len(hosts),
        "hosts": len(set(hosts)),
        "busbw_factor": row.factor,
        **{
            name.replace("-", "_"): (
                {**_numbers(row, form.summary), "wrong": form.wrong} if form else None
            )
            for name in (OUT_OF_PLACE, IN_PLACE)
            for form in [row.forms.get(name)]
        },
        "compared": {
            name: {**_numbers(row, other.summary), "ratio": other.ratio._asdict()}
            for name, other in row.others.items()
        },
        "unavailable": row.missing,
        "core_round_trip_ns": row.core_round_trip_ns,
        "settings": settings.for_json(),
        **origin,
    }
    return json.dumps(content)


def row_dtype(settings: Settings) -> str:
    """Torch's name of the elements."""
    return dtype_name(settings.dtype)


def _numbers(row: Row, summary: Summary) -> dict[str, float | None]:
    times = {
        f"{name}_us": None if value is None else value * 1e6
        for name, value in asdict(summary).items()
    }
    return {
        **times,
        "algbw_gbps": row.algbw(summary.median),
        "busbw_gbps": row.busbw(summary.median),
    }


def _microseconds(seconds: float) -> str:
    value = seconds * 1e6
    digits = 2 if value < 100 else 1 if value < 10_000 else 0  # about four that mean something
    return f"{value:>9.{digits}f}"
