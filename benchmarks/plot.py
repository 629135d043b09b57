"""The plots: seconds for one step, and for a call of each verb, against the number of leaves; axes are logarithmic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["curves", "write_growth_plot", "write_plot"]

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


GROUPS = {"nnx": "#222222", "plans": "#0b6e4f", "states": "#1982c4", "looks": "#f3a712", "files": "#b3001b"}


def write_plot(result: dict[str, Any], path: Path) -> None:
    """Draws the sweep over leaves."""
    drawn = sorted(curves(result).items(), key=lambda item: -item[1][1][-1][1])

    def draw(axes: Any) -> None:
        for key, (label, points) in drawn:
            counts, values = zip(*points, strict=True)
            width = 2.5 if key.startswith("statewise") else 1.3
            axes.loglog(
                counts, [1e3 * value for value in values], "o-", ms=3, lw=width, color=COLOURS[key], label=label
            )

    _write(draw, "leaves, each read and written", "milliseconds a step", path)


def write_growth_plot(result: dict[str, Any], path: Path) -> None:
    """Draws every verb's time against the number of leaves, and how a cost per leaf and a quadratic one would grow."""
    (table,) = result["tables"]

    def draw(axes: Any) -> None:
        labelled: set[str] = set()
        for row in table["rows"]:
            counts = [int(count) for count in row["seconds_by_leaves"]]
            label = None if row["group"] in labelled else row["group"]
            labelled.add(row["group"])
            width = 1.8 if row["group"] == "nnx" else 0.8
            values = list(row["seconds_by_leaves"].values())
            axes.loglog(counts, values, "o-", ms=2, lw=width, color=GROUPS[row["group"]], label=label)
        low, high = min(table["facts"]["counts"]), max(table["facts"]["counts"])
        for power, style, name in ((1, "--", "per leaf"), (2, ":", "the square")):
            axes.loglog([low, high], [1e-2, 1e-2 * (high / low) ** power], style, color="#888888", label=name)

    _write(draw, "leaves of the model", "seconds a call", path)


def _write(draw: Callable[[Any], None], across: str, up: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # The same numbers give the same file.
    with pyplot.rc_context({"svg.hashsalt": "statewise", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
        draw(axes)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))  # in the order of the curves' ends
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
