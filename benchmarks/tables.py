"""Writes the tables of docs/ from the JSON lines in benchmarks/results/.

    python benchmarks/tables.py            # rewrites what stands between the markers
    python benchmarks/tables.py --check    # exit status 1 where a table is not that of the results

A table stands between "<!-- table NAME FILE -->" and "<!-- end of table -->"; where there is no
such file, a line says that nothing was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table (\w+) (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
Row = dict[str, Any]
NO_RATIO = "no ratio"  # of too few repeats
FAR_NS = 200  # as benchmarks/kernels.py


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args(arguments)
    stale = []
    for document in sorted((ROOT / "docs").glob("*.md")):
        before = document.read_text()
        after = _BLOCK.sub(rewritten, before)
        if after != before:
            stale.append(document.name)
            if not given.check:
                document.write_text(after)
    if stale:
        print(f"{'out of date' if given.check else 'rewritten'}: {', '.join(stale)}")
    return 1 if stale and given.check else 0


def rewritten(block: re.Match[str]) -> str:
    """A block with the table that its results give."""
    head, name, file, tail = block.groups()
    if not (ROOT / file).exists():
        return f"{head}**Not measured yet.**\n\n{tail}"
    rows = [json.loads(line) for line in (ROOT / file).read_text().splitlines()]
    newest = {tuple(str(field(row, key)) for key in KEYS[name]): row for row in rows}
    rows = list(newest.values())
    return f"{head}{TABLES[name](rows)}\n{origin(rows)}\n{tail}"


def field(row: Row, key: str) -> object:
    """A field of a row, or of what it says of its settings and versions."""
    if key == "mpi":
        return row["versions"]["mpi"]
    if key in ("stats", "graph"):
        return row["settings"].get(key, False)
    if key == "processor":
        return processor(row)
    return row["gpu"]["name"] if key == "gpu" else row[key]


def by_processor(table: Callable[[list[Row]], str]) -> Callable[[list[Row]], str]:
    """A table for each processor, under its name, where there are several."""

    def tables_of(rows: list[Row]) -> str:
        found: dict[str, list[Row]] = {}
        for row in rows:
            found.setdefault(processor(row), []).append(row)
        if len(found) == 1:
            return table(rows)
        return "\n\n".join(f"**{name}**\n\n{table(of)}" for name, of in found.items())

    return tables_of


def kernels(rows: list[Row]) -> str:
    """Kernels by rows, sizes by columns: GB/s and the share of the yardstick.

    Of other instruction sets than the first only Adasum's kernels: the file has the others.
    """
    first = rows[0]["isa"]
    rows = [row for row in rows if row["isa"] == first or row["kernel"].startswith("pair_")]
    sizes = sorted({row["bytes"] for row in rows})
    lines = [["kernel", "type", "instructions", "yardstick", *map(size_text, sizes)]]
    keys = {(r["isa"], r["dtype"], r["kernel"], r["yardstick"]): None for r in rows}
    for isa, dtype, kernel, yardstick in keys:
        cells = []
        for size in sizes:
            found = [r for r in rows if (r["isa"], r["dtype"], r["kernel"], r["bytes"])
                     == (isa, dtype, kernel, size)]  # fmt: skip
            cells.append(share_text(found[-1]) if found else "")
        lines.append([kernel, dtype, isa, yardstick, *cells])
    return markdown(lines)


def collectives(rows: list[Row]) -> str:
    """A line for each row of the benchmark: our time and busbw, and how we compare."""
    names = list(dict.fromkeys(name for row in rows for name in row["compared"]))
    peers = {"gloo": "gloo / ours", "mpi": "MPI / ours", "stats": "with statistics / without"}
    titles = [peers[name] for name in names]
    lines = [["collective", "MPI", "ranks", "type", "tensors", "size", "ms", "busbw (GB/s)",
              "wrong", *titles]]  # fmt: skip
    for row in rows:
        ours = row["in_place"] or row["out_of_place"]
        note = " (its sum)" if row["redop"] == "adasum" else ""
        ratios = [
            ratio_text(row["compared"].get(name, {}).get("ratio"), note if name != "stats" else "")
            for name in names
        ]
        what = (
            row["collective"] if row["redop"] == "none" else f"{row['collective']} {row['redop']}"
        )
        lines.append([
            what, row["versions"]["mpi"], str(row["ranks"]), row["dtype"], str(row["tensors"]),
            size_text(row["bytes"]), f"{ours['median_us'] / 1e3:.3g}", f"{ours['busbw_gbps']:.2f}",
            str(ours["wrong"]), *ratios,
        ])  # fmt: skip
    return markdown(lines)


def steps(rows: list[Row]) -> str:
    """Whole training steps: medians in ms, ratios with intervals. Rows need not have the same."""
    names = list(dict.fromkeys(name for row in rows for name in row["median_seconds"]))
    pairs = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    lines = [["ranks", *(f"{name} (ms)" for name in names), *pairs, "hidden",
              "reduced during backward"]]  # fmt: skip
    for row in rows:
        medians = [row["median_seconds"].get(name) for name in names]
        hidden = row.get("hidden_interval")
        lines.append([
            str(row["ranks"]), *("" if m is None else f"{1e3 * m:.0f}" for m in medians),
            *(ratio_text(row["ratios"].get(name), "") for name in pairs),
            ratio_text(hidden, "") if hidden else f"{row['hidden']:.2f}",
            f"{row['reduced_during_backward']:.2f}" if "reduced_during_backward" in row else "",
        ])  # fmt: skip
    return markdown(lines)


def peers(rows: list[Row]) -> str:
    """A line for each call of ours in compare_peers.py: our time, each peer's, peer's / ours."""
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = [["case", "tensors", "size", "ranks", "type", "call", "repeats", "near", "wrong",
              "ours (ms)", *(f"{name} (ms), / ours" for name in names), "/ our own"]]  # fmt: skip
    for row in rows:
        beside = [
            f"{ratio_text(entry['ratio']['all'], '') or NO_RATIO} {name.removeprefix('ours ')}"
            for name, entry in row["own"].items()
        ]
        others = [*row["peers"].values(), *row["own"].values()]
        lines.append([
            row["case"], str(row["tensors"]), size_text(row["bytes"]), str(row["ranks"]),
            row["dtype"], f"{row['op']} {row['form']}", str(row["repeats"]), states_text(row),
            str(row["wrong"] + sum(entry.get("wrong", 0) for entry in others)),
            ms_text(row["median_seconds"]),
            *(peer_text(row["peers"].get(name)) for name in names), "; ".join(beside),
        ])  # fmt: skip
    return markdown(lines)


def targets(rows: list[Row]) -> str:
    """What the ratios were to be and what they are, for near and far cores."""
    lines = [["target", "case", "cores", "limit", "against", "found", "verdict"]]
    for row in rows:
        for entry in row["targets"]:
            scale, unit = (1e6, " us") if entry["unit"] == "s" else (1, "")
            found, side = entry["found"], "at least" if entry["is_least"] else "at most"
            lines.append([
                entry["target"], row["case"], entry["state"],
                f"{side} {scale * entry['limit']:g}{unit}",
                entry["against"] or "",
                ratio_text(found and {k: scale * v for k, v in found.items()}, unit),
                entry["verdict"],
            ])  # fmt: skip
    return markdown(lines)


def traffic(rows: list[Row]) -> str:
    """What memory's works and the calls that consist of them take, and the limit by the model."""
    lines = [["case", "ranks", "work or call", "ms", "limit (ms)", "call / limit"]]
    for row in rows:
        for name, seconds in row["median_seconds"].items():
            limit = row["limit_seconds"].get(name)
            lines.append([
                row["case"], str(row["ranks"]),
                f"sum by {row['versions']['mpi']}" if name.endswith("MPI") else name,
                ms_text(seconds),
                "" if limit is None else ms_text(limit),
                ratio_text(row["ratios"].get(name), ""),
            ])  # fmt: skip
    return markdown(lines)


def versions(rows: list[Row]) -> str:
    """A line for each call in compare_versions.py: both versions' times, after / before."""
    lines = [["call", "ranks", "start", "repeats", "wrong", "before (ms)", "after (ms)",
              "after / before"]]  # fmt: skip
    for row in rows:
        compared = row["compared"]
        if compared and row["kind"] == "difference":
            low, value, high = (1e3 * compared[key] for key in ("low", "value", "high"))
            text = f"{value:+.2g} ms [{low:+.2g}, {high:+.2g}]"
        else:
            text = ratio_text(compared, "") or NO_RATIO
        medians = (ms_text(row["median_seconds"][side]) for side in ("before", "after"))
        lines.append([row["case"], str(row["ranks"]), row["launch"], str(row["repeats"]),
                      str(sum(row["wrong"].values())), *medians, text])  # fmt: skip
    return markdown(lines)


def gpu_kernels(rows: list[Row]) -> str:
    """CUDA kernels: GB/s, the share of a copy, and torch's time / ours."""
    lines = [["kernel", "type", "tensors", "size", "GB/s (share of a copy)", "torch / ours",
              "wrong"]]  # fmt: skip
    for row in rows:
        beside = [f"{name} {ratio_text(entry['ratio'], '')}"
                  for name, entry in row["beside"].items()]  # fmt: skip
        lines.append([row["kernel"], row["dtype"], str(row["tensors"]), size_text(row["bytes"]),
                      share_text(row), "; ".join(beside), str(row["wrong"])])  # fmt: skip
    return markdown(lines)


def gpu_collectives(rows: list[Row]) -> str:
    """Collectives on CUDA tensors: our time and busbw, NCCL's in the same run, the path."""
    lines = [["collective", "ranks", "path", "type", "tensors", "size", "us", "busbw (GB/s)",
              "wrong", "NCCL / ours", "with statistics / without"]]  # fmt: skip
    for row in rows:
        ours = row["in_place"] or row["out_of_place"]
        note = " (its sum)" if row["redop"] == "adasum" else ""
        ratios = [row["compared"].get(name, {}).get("ratio") for name in ("nccl", "stats")]
        lines.append([
            f"{row['collective']} {row['redop']}", str(row["ranks"]), row["path"], row["dtype"],
            str(row["tensors"]), size_text(row["bytes"]), f"{ours['median_us']:.4g}",
            f"{ours['busbw_gbps']:.2f}", str(ours["wrong"]), ratio_text(ratios[0], note),
            ratio_text(ratios[1], ""),
        ])  # fmt: skip
    return markdown(lines)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "kernels": kernels,
    "collectives": collectives,
    "steps": steps,
    "peers": by_processor(peers),
    "targets": by_processor(targets),
    "traffic": by_processor(traffic),
    "versions": versions,
    "gpu_kernels": gpu_kernels,
    "gpu_collectives": gpu_collectives,
}
# What tells one measurement from another; of equal ones the last counts.
KEYS = {
    "kernels": ("isa", "dtype", "kernel", "bytes", "threads"),
    "collectives": ("collective", "redop", "ranks", "dtype", "tensors", "bytes", "mpi", "stats"),
    "steps": ("ranks", "commit"),
    "peers": ("processor", "case", "ranks", "dtype", "op", "form", "mpi"),
    "targets": ("processor", "case", "ranks", "dtype", "op", "form", "mpi"),
    "traffic": ("processor", "case", "ranks", "mpi"),
    "versions": ("case", "ranks", "launch", "settings"),
    "gpu_kernels": ("gpu", "kernel", "dtype", "set"),
    "gpu_collectives": ("gpu", "collective", "redop", "ranks", "path", "dtype", "tensors", "bytes",
                        "stats", "graph"),
}  # fmt: skip


def origin(rows: list[Row]) -> str:
    """Where the numbers come from, one line."""
    texts = dict.fromkeys(
        f"{processor(r)}, torch {r['versions']['torch']}, commit {commits(r)}, {r['date'][:10]}"
        for r in rows
    )
    trips = [r["core_round_trip_ns"] for r in rows if r.get("core_round_trip_ns") is not None]
    trips.sort()
    far = sum(trip > FAR_NS for trip in trips)
    probe = (
        f" Round trip between the cores: median {trips[len(trips) // 2]:.0f} ns; the medians of"
        f" {far} of {len(trips)} rows are far (more than {FAR_NS} ns)."
        if trips
        else ""
    )
    return f"\n*{'; '.join(texts)}.{probe}*\n"


def commits(row: Row) -> str:
    """What was measured; of two versions "before -> after"."""
    found = [row["before"]["commit"]] if "before" in row else []
    return " -> ".join((commit or "unknown")[:9] for commit in [*found, row["commit"]])


def processor(row: Row) -> str:
    """What has done the work."""
    if "gpu" in row:
        return f"{row['gpu']['name']}, CUDA {row['gpu_versions']['cuda']}"
    return f"{row['machine']['cpu']}, {row['machine']['usable_cores']} cores"


def size_text(num_bytes: int) -> str:
    """4 KiB, 64 MiB; others in MB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit and num_bytes % unit == 0:
            return f"{num_bytes // unit} {name}"
    return f"{num_bytes / 1e6:.3g} MB"


def share_text(row: Row) -> str:
    """GB/s, share and interval."""
    share = row["share"]
    return f"{row['gbps']:.1f} ({share['value']:.2f} [{share['low']:.2f}, {share['high']:.2f}])"


def ratio_text(ratio: Row | None, note: str) -> str:
    """Ratio and interval; nothing where it was not measured."""
    if ratio is None:
        return ""
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{note}"


def states_text(row: Row) -> str:
    """The share of repeats with near cores; where others say something, theirs."""
    shares = {key: f"{100 * share:.0f} %" for key, share in row["states"].items()}
    others = [f"{key} {shares[key]}" for key in ("far", "one core") if row["states"][key] >= 0.005]
    return f"{shares['near']} ({', '.join(others)})" if others else shares["near"]


def peer_text(entry: Row | None) -> str:
    """A peer's time and ratio, or why there is none; seconds more where that says more."""
    if entry is None:
        return ""
    if "unavailable" in entry:
        return str(entry["unavailable"])
    form = entry["contender"].split()[-1]
    more = (entry.get("difference") or {}).get("all")
    ratio = ratio_text(entry["ratio"]["all"], "") or NO_RATIO
    text = f"{ms_text(entry['median_seconds'])}, {ratio} {form}"
    for name, seconds in entry["medians"].items():
        if name.endswith(" packed") and name != entry["contender"]:
            text += f"; packed {ms_text(seconds)}"
    if more:
        low, value, high = (1e6 * more[key] for key in ("low", "value", "high"))
        text += f"; {value:+.1f} us [{low:+.1f}, {high:+.1f}]"
    return text


def ms_text(seconds: float) -> str:
    """Milliseconds with three digits that mean something."""
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line are its titles."""
    first, *rest = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([first, "|" + "---|" * len(lines[0]), *rest])


if __name__ == "__main__":
    sys.exit(main())
