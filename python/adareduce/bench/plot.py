"""Draws busbw against size."""

from __future__ import annotations

from collections.abc import Sequence

from adareduce.bench.report import Row


def draw(rows: Sequence[Row], title: str, file: str) -> None:
    """Writes a picture of all rows. Call it on one rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    sizes = [row.num_bytes for row in rows]
    for name in rows[0].forms:
        heights = [row.busbw(row.forms[name].summary.median) for row in rows]
        axes.plot(sizes, heights, marker="o", label=name)
    for name in {name: None for row in rows for name in row.others}:
        points = [(row.num_bytes, row.busbw(row.others[name].summary.median))
                  for row in rows if name in row.others]  # fmt: skip
        axes.plot(*zip(*points, strict=True), marker=".", linestyle="--", label=name)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size (B)")
    axes.set_ylabel("busbw (GB/s)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
