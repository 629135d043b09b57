"""The targets, and whether they were reached: each read from the results by workload, table and row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from benchmarks.lookup import Found, MissingError, Value, cost, growth, largest, median_s, row_of, times

__all__ = ["TARGETS", "Target", "packing_pays", "targets_markdown"]


@dataclasses.dataclass(frozen=True)
class Target:
    """One target, or a number that belongs beside one.

    Attributes:
      what: what is compared.
      reach: the target, in words; why there is none.
      value: reads the number from the results.
      met: whether a value is enough; None if there is no target.
      show: how a value reads.
    """

    what: str
    reach: str
    value: Value
    met: Callable[[float], bool] | None
    show: str = "{:.2f} times"


def _faster(least: float) -> Callable[[float], bool]:
    return lambda value: value >= least


def _at_most(most: float) -> Callable[[float], bool]:
    return lambda value: value <= most


OURS, HAND, PACKED, BUFFER = "statewise", "by-hand", "statewise-packed", "by-hand-buffer"
SPLIT = "`nnx.split(model, ...)` by the same kinds"

# A noisy machine does not tell 1.00 from 1.03: "no slower" allows that much.
NO_SLOWER = 1.03

TARGETS = (
    Target("many small leaves: `nnx.jit` over ours", "6", times("many_small", "nnx.jit", OURS), _faster(6)),
    Target("the same: by hand over ours", "more than 1", times("many_small", HAND, OURS), _faster(1)),
    Target(
        "the same, first call: ours over by hand",
        "at most 1.03",
        times("first_whole", OURS, HAND),
        _at_most(1.03),
    ),
    Target(
        "the same: ours over by hand, traced before it is differentiated",
        "no slower",
        times("first_whole", OURS, "by-hand-traced"),
        _at_most(NO_SLOWER),
    ),
    Target("packed: `nnx.jit` over ours", "25", times("many_small", "nnx.jit", PACKED), _faster(25)),
    Target("packed: `nnx.jit_partial` over ours", "5", times("many_small", "nnx.jit_partial", PACKED), _faster(5)),
    Target("packed: by hand over ours", "5", times("many_small", HAND, PACKED), _faster(5)),
    Target(
        "the same: ours over one flat buffer by hand",
        "no slower",
        times("many_small", PACKED, BUFFER),
        _at_most(NO_SLOWER),
    ),
    Target(
        "packed, first call: ours over by hand",
        "at most 2",
        times("many_small", PACKED, HAND, "first_call_s"),
        _at_most(2),
    ),
    Target("16 steps in one scan: by hand, a call each, over ours", "8", times("scan", HAND, "scan"), _faster(8)),
    Target("the same, packed", "8", times("scan", HAND, "packed-scan"), _faster(8)),
    Target(
        "the same, the loop by hand on one flat buffer, which is the limit",
        "none",
        times("scan", HAND, "by-hand-buffer-scan"),
        None,
    ),
    Target(
        "16 steps in one scan, first call", "at most 1.5", times("scan", "scan", HAND, "first_call_s"), _at_most(1.5)
    ),
    Target(
        "the same: ours over the same loop by hand",
        "no slower",
        times("scan", "scan", "by-hand-scan"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "the same, packed: ours over the same loop by hand on one flat buffer",
        "no slower",
        times("scan", "packed-scan", "by-hand-buffer-scan"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "leaves of 256 × 256: ours over by hand",
        "no slower",
        times("few_large_256", OURS, HAND),
        _at_most(NO_SLOWER),
    ),
    Target(
        "leaves up to 1024 × 1024: ours over by hand",
        "no slower",
        times("few_large_1024", OURS, HAND),
        _at_most(NO_SLOWER),
    ),
    Target(
        "`nonfinite='skip'`, compute-bound: over the step without",
        "at most 1.03",
        cost("products", "skip"),
        _at_most(1.03),
    ),
    Target("the same, leaves of 1024 × 1024", "at most 1.15", cost("memory", "skip"), _at_most(1.15)),
    Target("the same, about 2,000 small leaves", "at most 1.10", cost("small", "skip"), _at_most(1.10)),
    Target(
        "`measure=True`, compute-bound: over the step without",
        "at most 1.05",
        cost("products", "measure"),
        _at_most(1.05),
    ),
    Target("the same, about 2,000 small leaves", "at most 1.20", cost("small", "measure"), _at_most(1.20)),
    Target("one small kind, large model over small", "at most 1.5", growth("small_kind", OURS), _at_most(1.5)),
    Target("its restart, large model over small", "at most 1.5", growth("restart", "restart"), _at_most(1.5)),
    Target(
        "a decode step: ours less by hand",
        "at most 50 µs",
        lambda found: 1e6 * (median_s("decode", OURS)(found) - median_s("decode", HAND)(found)),
        _at_most(50),
        "{:.1f} µs",
    ),
    Target(
        "a decode step over some 7,600 Variables, each in a process of its own: ours over by hand",
        "at most 1.05",
        times("alone_wide", OURS, HAND),
        _at_most(1.05),
    ),
    Target(
        "32 tokens of that, in one call: ours over by hand",
        "at most 1.05",
        times("alone_loop", "loop", "by-hand-loop"),
        _at_most(1.05),
    ),
    Target(
        "a billion parameters, abstract: the slowest verb",
        "at most 3 s",
        largest("large", "median_s"),
        _at_most(3),
        "{:.2f} s",
    ),
    Target(
        "the same: the most memory that a verb takes",
        "at most 1 GB",
        lambda found: largest("large", "peak_bytes")(found) / 1e9,
        _at_most(1),
        "{:.3f} GB",
    ),
    Target(
        "up to 100,000 leaves, every verb: time by leaves to the power of",
        "at most 1.15",
        largest("growth", "exponent"),
        _at_most(1.15),
        "{:.2f}",
    ),
    Target(
        "`plan` over `nnx.split`",
        "no slower",
        times("look_plan", "`sw.plan(model)`", SPLIT),
        _at_most(NO_SLOWER),
    ),
    Target(
        "a repeated `plan` of an equal model over the first",
        "0.5",
        times("look_plan", "`sw.plan(model)`, repeated", "`sw.plan(model)`"),
        _at_most(0.5),
    ),
    Target(
        "`plan.take` of 20,000 leaves, with copies, over `nnx.state`",
        "no slower",
        times("look_take", "`plan.take(model)`", "`nnx.state(model)`, which shares"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "the same, `plan.take(copy=False)`",
        "no slower",
        times("look_take", "`plan.take(model, copy=False)`", "`nnx.state(model)`, which shares"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "`plan.put(copy=False)` of 20,000 leaves over `nnx.update`",
        "no slower",
        times("look_put", "`plan.put(state, model, copy=False)`", "`nnx.update(model, state)`, which shares"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "the same, `plan.put(state, model)`",
        "none: it copies, NNX shares",
        times("look_put", "`plan.put(state, model)`", "`nnx.update(model, state)`, which shares"),
        None,
    ),
    Target(
        "`plan.build(copy=False)` of 20,000 leaves over `nnx.merge` of arrays",
        "no slower",
        times("look_build", "`plan.build(state, copy=False)`", "`nnx.merge(graphdef, arrays)`, which shares"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "the same, `plan.build(state)`",
        "none: it copies, NNX shares",
        times("look_build", "`plan.build(state)`", "`nnx.merge(graphdef, arrays)`, which shares"),
        None,
    ),
    Target(
        "`import statewise` and its training verbs, beyond `flax.nnx`",
        "0.1 s",
        lambda found: median_s("start_import", "statewise")(found) - median_s("start_import", "flax")(found),
        _at_most(0.1),
        "{:.2f} s",
    ),
    Target(
        "the first step of a second process over by hand, compilation cache warm",
        "1.1",
        lambda found: 1 / row_of(found, "start_first", "by-hand")["ratio"],
        _at_most(1.1),
    ),
    Target(
        'a repeated `state["params"]`: `nnx.split` over ours',
        "10",
        lambda found: median_s("look_plan", SPLIT)(found) / median_s("look_select", '`state["params"]`')(found),
        _faster(10),
        "{:.0f} times",
    ),
    Target(
        "peak memory, donated: ours over by hand",
        "no more",
        times("memory_large", "statewise-shared", HAND, "peak_bytes"),
        _at_most(1.02),
    ),
    Target(
        "save and restore of 1,200 small arrays, packed: Orbax over ours",
        "20",
        times("keep_small", "Orbax `StandardCheckpointer`", 'Statewise, `layout="packed"`'),
        _faster(20),
    ),
    Target(
        "the same, named: Orbax over ours",
        "3",
        times("keep_small", "Orbax `StandardCheckpointer`", "Statewise"),
        _faster(3),
    ),
    Target(
        "save and restore of 1 GB in large arrays: ours over Orbax",
        "no slower",
        times("keep_large", "Statewise", "Orbax `StandardCheckpointer`"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "an asynchronous save: the loop's wait over one copy of the arrays",
        "at most 1",
        times("keep_async", "`checkpoints.save(step, state)` returns", "one copy of all arrays on the host"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "saving large arrays on a disk: its own rate, write and flush, over ours",
        "at least 0.8",
        times("disk_save", "alone", OURS),
        _faster(0.8),
    ),
    Target(
        "restoring them, warm: ours over safetensors' `load_file` and `device_put`",
        "no slower",
        times("disk_warm", OURS, "safetensors"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "saving to an object store with 20 ms of added latency: ours over Orbax's manager",
        "no slower",
        times("disk_store_save", OURS, "orbax-gs"),
        _at_most(NO_SLOWER),
    ),
    Target(
        "restoring from it: ours over Orbax's manager",
        "no slower",
        times("disk_store_restore", OURS, "orbax-gs"),
        _at_most(NO_SLOWER),
    ),
    *(
        Target(
            f"two processes over one, on one machine: {verb} large arrays",
            "none",
            times(f"together_large_{verb}", "statewise-2", "statewise-1"),
            None,
        )
        for verb in ("save", "restore")
    ),
    Target(
        "reading published weights: ours over `load_file` and `device_put`",
        "at most 1",
        times(
            "names", "`sw.restore(names=)`, as the arrays are", "`safetensors.numpy.load_file`, then `jax.device_put`"
        ),
        _at_most(1),
    ),
)


def targets_markdown(found: Found, oldest: Found | None = None) -> str:
    """The targets as a table in Markdown.

    Args:
      found: the results on the newest libraries.
      oldest: those on the oldest that are supported, for columns of their own; None or empty for none.
    """
    heads = (
        ("what", "target", "newest libraries", "", "oldest libraries", "")
        if oldest
        else ("what", "target", "found", "")
    )
    lines = [f"| {' | '.join(heads)} |", "| --- | --- |" + " ---: | --- |" * (2 if oldest else 1)]
    for target in TARGETS:
        cells = [target.what, target.reach, *_verdict(target, found)]
        if oldest:
            cells += _verdict(target, oldest)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def _verdict(target: Target, found: Found) -> tuple[str, str]:
    """What was found, and whether it is enough."""
    try:
        value = target.value(found)
    except MissingError as missing:
        return "", str(missing)
    if target.met is None:
        return target.show.format(value), ""
    return target.show.format(value), "reached" if target.met(value) else "**not reached**"


def packing_pays(found: Found) -> str:
    """From how many steps on packing pays: the longer first call over what each step saves."""
    heads = ("a step", "arrays", "longer first call", "saved a step", "pays from")
    lines = [f"| {' | '.join(heads)} |", "| --- | ---: | ---: | ---: | --- |"]
    for result in found.values():
        for table in result["tables"]:
            rows = {row["key"]: row for row in table["rows"] if "first_call_s" in row and "median_s" in row}
            if not {OURS, PACKED} <= set(rows):
                continue
            longer = rows[PACKED]["first_call_s"] - rows[OURS]["first_call_s"]
            saved = rows[OURS]["median_s"] - rows[PACKED]["median_s"]
            small = saved < 0.03 * rows[OURS]["median_s"]  # what a noisy machine does not tell from nothing
            pays = "never" if small else "the first step" if longer <= 0 else f"{longer / saved:,.0f} steps"
            arrays = table["facts"].get("arrays", table["facts"].get("leaves"))
            cells = (
                table["title"],
                "-" if arrays is None else f"{arrays:,}",
                f"{longer:.1f} s",
                f"{1e3 * saved:.2f} ms",
                pays,
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
