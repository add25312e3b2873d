"""The table of a comparison, from the records of its JSON lines.

python examples/digits_table.py FILE.jsonl    prints it as Markdown
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("method", "workers", "batch", "rate", "steps", "test accuracy, %")
LABELS = {"lsw": "LSW", "adascale": "AdaScale", "adasum": "Adasum"}
Record = dict[str, Any]


def label(record: Record) -> str:
    if record["workers"] == 1:
        return "one worker"
    name = LABELS.get(record["method"], record["method"])
    return f"{name}, stretched" if record["num_steps"] is not None else name


def summarise(records: Sequence[Record]) -> list[tuple[str, ...]]:
    """Rows of COLUMNS, each of all seeds: mean +- standard deviation."""
    rows: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        key = (record["rate"], record["workers"], label(record), record["batch"])
        rows.setdefault(key, []).append(record)
    return [
        (
            name,
            str(workers),
            str(workers * batch),
            f"{rate:g}",
            spread([record["steps"] for record in same], 0),
            spread([100 * record["accuracy"] for record in same], 2) + diverged(same),
        )
        for (rate, workers, name, batch), same in rows.items()
    ]


def diverged(records: Sequence[Record]) -> str:
    count = sum(record["diverged"] for record in records)
    return f" ({count} diverged)" if count else ""


def spread(values: Sequence[float], digits: int) -> str:
    """Mean +- sample standard deviation; steps that are equal by plan have none."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1 or (digits == 0 and len(set(values)) == 1):
        return mean
    return f"{mean} +- {statistics.stdev(values):.{digits}f}"


def as_markdown(rows: Sequence[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ("---",) + ("---:",) * (len(COLUMNS) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    text = Path(sys.argv[1]).read_text()
    print(as_markdown(summarise([json.loads(line) for line in text.splitlines()])))
