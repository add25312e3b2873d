"""What a comparison looks like, as PNG files. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TENSORS = ("hidden weights", "hidden biases", "output weights", "output biases")


def draw(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Writes the figures of which there are data; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    gains = [record for record in records if record["gains"]]
    ratios = [record for record in records if record["orthogonality"]]
    figures = {}
    if gains:
        figures["digits_gain.png"] = _gains(gains)
    if ratios:
        figures["digits_orthogonality.png"] = _orthogonality(ratios)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
    return [folder / name for name in figures]


def _gains(records: Sequence[dict[str, Any]]) -> Any:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = {count: f"C{place}" for place, count in enumerate(sorted(_workers(records)))}
    for record in records:
        count = record["workers"]
        name = f"{count} workers" if record["seed"] == 0 else None
        axes.plot(record["gains"], color=colours[count], label=name, alpha=0.8)
        axes.axhline(count, color=colours[count], linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="gain (dotted: its limit S)", yscale="log", title="AdaScale")
    axes.legend()
    return figure


def _orthogonality(records: Sequence[dict[str, Any]]) -> Any:
    """A panel for each number of workers, at the largest rate; a line for each tensor and seed."""
    rate = max(record["rate"] for record in records)
    counts = sorted(_workers(records))
    figure, panels = plt.subplots(
        1, len(counts), figsize=(5 * len(counts), 4), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, count in zip(panels[0], counts, strict=True):
        for record in records:
            if (record["workers"], record["rate"]) != (count, rate):
                continue
            for place, curve in enumerate(zip(*record["orthogonality"], strict=True)):
                name = TENSORS[place] if record["seed"] == 0 else None
                panel.plot(curve, color=f"C{place}", label=name, alpha=0.8)
        panel.axhline(1 / count, color="grey", linestyle=":", linewidth=1)
        panel.set(xlabel="step", title=f"{count} workers, rate {rate}", ylim=(0, 1.02))
    panels[0][0].set_ylabel("|Adasum|² / Σ|g|² (dotted: equal gradients)")
    panels[0][0].legend()
    return figure


def _workers(records: Sequence[dict[str, Any]]) -> set[int]:
    return {record["workers"] for record in records}
