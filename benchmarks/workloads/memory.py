"""Peak memory of a train step: each way in a process of its own.

Two numbers for each: the largest resident size of the process while it takes a few steps, above what it had
before the model was made; and what XLA says of the compiled step (arguments, outputs and temporaries, with what
is donated counted once).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.case import Case
from benchmarks.compare import array_count, check, table
from benchmarks.machine import in_own_process, peak_bytes
from benchmarks.measure import Settings
from benchmarks.styles import LABELS, OURS, STYLES, why_not
from benchmarks.workloads.train import few_large_case, many_small_case

__all__ = ["WAYS", "child", "memory"]

# By key: the style, its options, and whether the case donates.
WAYS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "statewise-shared": (OURS, {"copy": False}, True),
    OURS: (OURS, {}, True),
    "statewise-packed": ("statewise-packed", {}, True),
    "by-hand": ("by-hand", {"copy": False}, True),
    "nnx.jit_partial": ("nnx.jit_partial", {}, True),
    "nnx.jit": ("nnx.jit", {}, True),
    "nnx.jit-kept": ("nnx.jit", {}, False),
    "equinox": ("equinox", {}, True),
}
WAY_LABELS = {
    "statewise-shared": "Statewise, `plan.take(model, copy=False)`",
    OURS: "Statewise, `plan.take(model)`, which copies",
    "nnx.jit_partial": "`nnx.jit_partial(graph=False)`, donated",
    "nnx.jit": "`nnx.jit`, donated",
    "nnx.jit-kept": "`nnx.jit`, not donated",
    "equinox": "Equinox `filter_jit`, donated",
}
STEPS = 3


def _case(name: str, size: int) -> Case:
    return few_large_case((size,) * 9) if name == "large" else many_small_case(size)


def memory(settings: Settings, large: int | None = None, small: int | None = None) -> list[dict[str, Any]]:
    large, small = large or (256 if settings.quick else 4096), small or (4 if settings.quick else 100)
    tables = [_table("memory_large", "large", large, f"Eight layers of {large} × {large}, Adam", settings)]
    if not settings.quick:
        tables.append(_table("memory_small", "small", small, f"{small} blocks of width 8, Adam", settings))
    return tables


def _table(key: str, name: str, size: int, title: str, settings: Settings) -> dict[str, Any]:
    case = _case(name, size)
    rows, losses = [], {}
    ways = ("statewise-shared", "by-hand", "nnx.jit_partial", "nnx.jit") if settings.quick else tuple(WAYS)
    for way in ways:
        label = WAY_LABELS.get(way) or LABELS[way]
        reason = why_not(WAYS[way][0], case)
        if reason:
            rows.append({"key": way, "label": label, "skipped": reason})
            continue
        found = in_own_process("memory", way, name, size)
        losses[way] = found.pop("losses")
        rows.append({"key": way, "label": label, **found})
    reference = rows[0]
    for row in rows:
        if "skipped" not in row:
            row["difference"] = check(row["key"], losses[row["key"]], losses[reference["key"]], case.tolerance)
            row["ratio"] = row["peak_bytes"] / reference["peak_bytes"]
    return table(key, title, rows, per="peak", reference=reference["key"], **array_count(case))


def child(way: str, name: str, size: int) -> dict[str, Any]:
    """What one process finds out about one way."""
    style_name, options, donate = WAYS[way]
    case = _case(name, size)
    if case.donate != donate:
        case = Case(case.build, case.programs, case.loop, case.tx, eqx=case.eqx, donate=donate)
    before = peak_bytes()
    style = STYLES[style_name](case, case.build(), **options)
    call = case.loop(style.program)
    losses = [float(np.asarray(call())) for _ in range(STEPS)]
    found: dict[str, Any] = {"losses": losses, "peak_bytes": peak_bytes() - before}
    compiled = _compiled_bytes(case, style)
    return found if compiled is None else {**found, "compiled_bytes": compiled}


def _compiled_bytes(case: Case, style: Any) -> int | None:
    """What the compiled step needs; None for ways that do not hand out what they compiled."""
    if not hasattr(style, "lower") or getattr(style, "variant", "") == "cached":
        return None
    batch: list[Any] = []
    case.loop(lambda _: lambda *args: batch.extend(args))()  # the arguments that the loop would pass
    compiled = style.lower("train", *batch).compile()
    compiled = getattr(compiled, "compiled", compiled)
    analysis = getattr(compiled, "memory_analysis", lambda: None)()
    if analysis is None:
        return None
    kept = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return int(kept + analysis.temp_size_in_bytes)
