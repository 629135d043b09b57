"""JSON to Markdown: the results of several processes in one, tables for the terminal and for docs/performance.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["OLDEST", "SCHEMA", "load", "markdown", "merge", "show", "write_docs"]

SCHEMA = 1
NUMBERS = (
    *("median_s", "q1_s", "q3_s", "ratio", "ratio_q1", "ratio_q3"),
    *("setup_s", "first_call_s", "peak_bytes", "compiled_bytes"),
)
BEGIN, END = "<!-- written by python -m benchmarks --write-docs -->", "<!-- end of the written part -->"

# The folder, in that of the results, of those measured on the oldest libraries that are supported.
OLDEST = "oldest"

Result = dict[str, Any]


def merge(name: str, runs: Sequence[Result], quick: bool) -> Result:
    """One result of several processes': of each number the median; what each process found stays beside it."""
    tables = []
    for number, first in enumerate(runs[0]["tables"]):
        rows = [
            _merged([run["tables"][number]["rows"][position] for run in runs]) for position in range(len(first["rows"]))
        ]
        tables.append({**first, "rows": rows})
    seconds = round(sum(run["seconds"] for run in runs), 1)
    loads = [run["machine"]["load_before"] for run in runs]
    result = {"schema": SCHEMA, "name": name, "quick": quick, "processes": len(runs), **runs[0]}
    return {**result, "seconds": seconds, "loads_before": loads, "tables": tables}


def _merged(rows: Sequence[Result]) -> Result:
    made = dict(rows[0])
    for number in NUMBERS:
        if number in made:
            made[number] = statistics.median(row[number] for row in rows)
    if "samples" in made:
        made["samples"] = sum(row["samples"] for row in rows)
        made["process_medians_s"] = [row["median_s"] for row in rows]
        made["process_ratios"] = [row["ratio"] for row in rows]
    if "difference" in made:
        made["difference"] = max(row["difference"] for row in rows)
    return made


def load(folder: Path) -> dict[str, Result]:
    """The results in a folder, by name.

    Raises:
      ValueError: a file of another schema.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        if result.get("schema") != SCHEMA:
            raise ValueError(f"{path.name} has schema {result.get('schema')}, not {SCHEMA}: run the benchmarks again")
        found[result["name"]] = result
    return found


# --- tables ----------------------------------------------------------------------------------------------------


def seconds(value: float) -> str:
    """A time with three digits and a unit that suits it."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}" if value / scale < 100 else f"{value / scale:.0f} {unit}"
    return f"{value * 1e9:.0f} ns"


def amount(value: float) -> str:
    """Bytes, in kB, MB or GB."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e3:.0f} kB"


def times(value: float) -> str:
    """A ratio, with as many digits as say something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _columns(rows: Sequence[Result]) -> list[tuple[str, Any]]:
    """The columns that these rows have something for: a name, and what makes a cell of a row."""
    counts = sorted({int(count) for row in rows for count in row.get("seconds_by_leaves", ())})
    columns = [
        *((f"{count:,} leaves", "seconds_by_leaves", _at_leaves(count)) for count in counts),
        ("exponent", "exponent", lambda row: f"{row['exponent']:.2f}"),
        ("median", "median_s", lambda row: seconds(row["median_s"])),
        ("interquartile range", "q1_s", lambda row: f"{seconds(row['q1_s'])} to {seconds(row['q3_s'])}"),
        ("process", "peak_bytes", lambda row: amount(row["peak_bytes"])),
        ("compiled step", "compiled_bytes", lambda row: amount(row["compiled_bytes"])),
        ("ratio to the first row", "ratio", lambda row: times(row["ratio"]) + _spread(row)),
        ("first call", "first_call_s", lambda row: seconds(row["first_call_s"])),
        ("rate", "gigabytes_per_s", lambda row: f"{row['gigabytes_per_s']:.2f} GB/s"),
        ("arithmetic", "teraflops_per_s", lambda row: f"{row['teraflops_per_s']:.0f} TFLOP/s"),
    ]

    def cell(number: str, render: Any) -> Any:
        return lambda row: render(row) if number in row else ""

    return [(name, cell(number, render)) for name, number, render in columns if any(number in row for row in rows)]


def _at_leaves(count: int) -> Any:
    def cell(row: Result) -> str:
        value = row["seconds_by_leaves"].get(str(count))
        return "" if value is None else seconds(value)

    return cell


def _spread(row: Result) -> str:
    return f" ({times(row['ratio_q1'])} to {times(row['ratio_q3'])})" if "ratio_q1" in row else ""


def cells(table: Result) -> tuple[list[str], list[list[str]], list[str]]:
    """Header, lines, and what was left out and why; the row of reference comes first."""
    rows = sorted(table["rows"], key=lambda row: row["key"] != table["reference"])
    shown = [row for row in rows if "skipped" not in row]
    columns = _columns(shown)
    lines = [[row["label"], *(render(row) for _, render in columns)] for row in shown]
    not_saved = [f"{row['label']}: {row['skipped']}" for row in rows if "skipped" in row]
    return [f"for one {table['per']}", *(name for name, _ in columns)], lines, not_saved


def markdown(table: Result) -> str:
    """A table in Markdown."""
    header, lines, not_saved = cells(table)
    text = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    text += [f"| {' | '.join(line)} |" for line in lines]
    text += [f"\nLeft out: {'; '.join(not_saved)}."] * bool(not_saved)
    return "\n".join(text)


def show(result: Result) -> str:
    """A result for the terminal."""
    text = []
    for table in result["tables"]:
        header, lines, not_saved = cells(table)
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        text.append(f"  {table['title']}")
        for line in (header, *lines):
            first, *others = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            text.append("    " + "  ".join((first, *others)).rstrip())
        text += [f"    left out: {reason}" for reason in not_saved]
    return "\n".join(text)


# --- docs/performance.md ---------------------------------------------------------------------------------------


def write_docs(results: Path, docs: Path, order: Sequence[str] = ()) -> list[Path]:
    """Writes the tables and the plot into docs/performance.md, between its two marks; the prose stays as it is.

    Args:
      results: the folder of the JSON; its folder `oldest` has that of the oldest libraries, for the targets.
      docs: the folder of the page.
      order: names of workloads, in the order of their sections; any others come first.

    Returns:
      the files written.

    Raises:
      ValueError: there are no results, or the page has lost its marks.
    """
    from benchmarks.plot import write_growth_plot, write_plot
    from benchmarks.targets import packing_pays, targets_markdown

    found = load(results)
    if not found:
        raise ValueError(f"there are no results in {results}: run the benchmarks first")
    page = docs / "performance.md"
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page.name} has lost its marks, {BEGIN} and {END}")
    written = [page]
    oldest = load(results / OLDEST)
    about = _about(found)
    if oldest:
        about = f"{about}\n\nThe columns of the oldest libraries below: {_about(oldest)}"
    sections = [about, "## Targets", targets_markdown(found, oldest)]
    if "leaves" in found:
        plot = docs / "performance-leaves.svg"
        write_plot(found["leaves"], plot)
        written.append(plot)
        sections += ["## Cost against the number of leaves", f"![milliseconds a step by leaves]({plot.name})"]
    if "growth" in found:
        plot = docs / "performance-growth.svg"
        write_growth_plot(found["growth"], plot)
        written.append(plot)
        sections += ["## How every verb grows with the model", f"![seconds a call by leaves]({plot.name})"]
    sections += ["## From how many steps on packing pays", packing_pays(found)]
    places = {name: place for place, name in enumerate(order)}
    ordered = sorted(found.values(), key=lambda result: places.get(result["name"], -1))
    sections += [_section(result) for result in ordered]
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join(sections) + f"\n\n{END}{after}", encoding="utf-8")
    return written


def _about(found: dict[str, Result]) -> str:
    result = next(iter(found.values()))
    machine, versions = result["machine"], result["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    loads = [load for other in found.values() for load in other["loads_before"]]
    # Numbers of several evenings in one table would be compared as if they were of one.
    moments = {(str(other["machine"]["cpu"]), str(other["versions"])) for other in found.values()}
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['system']}; {packages};",
        f"{_range(found)}; load average before each workload {min(loads):.1f} to {max(loads):.1f}.",
    ]
    if len(moments) > 1:
        lines.append("**Not all of it was taken on the same machine with the same versions: see the JSON.**")
    if any(other["quick"] for other in found.values()):
        lines.append("**A quick run: small models, few rounds.**")
    return "\n".join(lines)


def _range(found: dict[str, Result]) -> str:
    """From when to when results were taken, and of which commits, if they say so."""
    moments = sorted({result["when"] for result in found.values()})
    commits = sorted({commit for result in found.values() if (commit := result.get("commit"))})
    text = moments[0] if len(moments) == 1 else f"{moments[0]} to {moments[-1]}"
    return text + (f"; commit{'s' * (len(commits) > 1)} {', '.join(commits)}" if commits else "")


def _section(result: Result) -> str:
    parts = [f"## {result['title']}"]
    for table in result["tables"]:
        facts = ", ".join(f"{name} {_fact(name, value)}" for name, value in table["facts"].items())
        parts += [f"**{table['title']}.**" + (f" {facts[:1].upper()}{facts[1:]}." if facts else ""), markdown(table)]
    return "\n\n".join(parts)


def _fact(name: str, value: Any) -> str:
    if name == "bytes":
        return amount(value)
    if isinstance(value, list):
        return " and ".join(f"{item:,}" for item in value)
    return f"{value:,}"
