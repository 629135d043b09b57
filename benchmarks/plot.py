"""The plot: seconds for one step against the number of leaves, both axes logarithmic, as SVG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["curves", "write_plot"]

# Ours stand out; the others are told apart by colour and by the label at their end.
COLOURS = {
    "statewise": "#0b6e4f",
    "statewise-packed": "#08a045",
    "by-hand": "#222222",
    "nnx.jit": "#b3001b",
    "nnx.jit-tree": "#e4572e",
    "nnx.cached_partial": "#f3a712",
    "nnx.jit_partial": "#a8763e",
    "jax.jit-graphdef": "#6a4c93",
    "equinox": "#1982c4",
    "equinox-flat": "#8ac6f2",
}


def curves(result: dict[str, Any]) -> dict[str, tuple[str, list[tuple[int, float]]]]:
    """By key of a rival: its label, and (leaves, seconds) in rising order."""
    found: dict[str, tuple[str, list[tuple[int, float]]]] = {}
    for table in sorted(result["tables"], key=lambda table: table["facts"]["leaves"]):
        for row in table["rows"]:
            if "median_s" in row:
                _, points = found.setdefault(row["key"], (row["label"].replace("`", ""), []))
                points.append((table["facts"]["leaves"], row["median_s"]))
    return found


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Draws the sweep over leaves."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same numbers give the same file.
    with pyplot.rc_context({"svg.hashsalt": "statewise", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        drawn = sorted(curves(result).items(), key=lambda item: -item[1][1][-1][1])
        for key, (label, points) in drawn:
            counts, values = zip(*points, strict=True)
            width = 2.5 if key.startswith("statewise") else 1.3
            axes.loglog(
                counts, [1e3 * value for value in values], "o-", ms=3, lw=width, color=COLOURS[key], label=label
            )
        axes.set_xlabel("leaves, each read and written")
        axes.set_ylabel("milliseconds a step")
        axes.grid(which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # in the order of the curves' ends
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
