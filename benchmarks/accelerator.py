"""The command for a machine with an accelerator: `python -m benchmarks.accelerator [--quick] [--json FILE]`.

It runs the workloads whose numbers depend on the device, in one process and under eight minutes, and prints and
writes what the suite writes: tables of medians and ratios, with the versions and the device.  Each row has two
figures of correctness beside its time:

- `difference`: the largest difference of its first outputs from ours;
- `difference_to_cpu`: at most how far they are from what our step computes on this machine's CPU.

Rows that move arrays have the elements that differ and the arrays that ended up elsewhere instead, both 0.

A section that fails is written down with its error, the others still run, and the exit status is 1.  On a machine
without an accelerator the same code runs on the CPU; with `--quick` on small models, which is how it is tested.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax import nnx

import statewise as sw
from benchmarks.case import Case
from benchmarks.compare import WrongResultError, compare, table, time_calls
from benchmarks.machine import describe
from benchmarks.measure import Settings, timed
from benchmarks.report import merge, show
from benchmarks.styles.ours import Ours
from benchmarks.workloads import loops, serve, train
from benchmarks.workloads.bfloat16 import microbatches, transformer_case

__all__ = ["SECTIONS", "main", "run"]

Tables = list[dict[str, Any]]
RESULTS = Path(__file__).parent / "results"
RIVALS = ("statewise", "statewise-packed", "by-hand", "nnx.jit_partial", "nnx.jit")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models, few rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="NAME", help="some of: " + ", ".join(SECTIONS))
    parser.add_argument("--budget", type=float, default=420.0, help="seconds after which no further section starts")
    parser.add_argument("--json", type=Path, help="where the JSON goes (benchmarks/results/accelerator/DEVICE.json)")
    args = parser.parse_args(argv)
    settings = Settings.short() if args.quick else Settings(budget_s=5.0, rounds=(7, 30))
    # In a folder of its own: docs/performance.md is written from the results of one machine.
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    out = args.json or RESULTS / ("quick" if args.quick else "") / "accelerator" / f"{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    result = run(settings, args.only or tuple(SECTIONS), args.budget, lambda found: _write(out, found))
    for failure in result["failures"]:
        print(f"failed: {failure['section']}: {failure['error'].strip().splitlines()[-1]}", file=sys.stderr)
    return 1 if result["failures"] else 0


def run(
    settings: Settings, names: tuple[str, ...] | list[str], budget_s: float, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Runs sections one after another.

    Args:
      settings: for how long each looks.
      names: the sections.
      budget_s: seconds after which no further section starts.
      keep: called with the result after each section, so that a run that is cut off leaves what it has.

    Returns:
      the result, as plain data.
    """
    start, about = time.perf_counter(), describe()
    # A GPU's default product of float32 keeps ten bits: the figures of correctness would be figures of that.
    jax.config.update("jax_default_matmul_precision", "float32")
    tables: Tables = []
    failures: list[dict[str, str]] = []

    def result() -> dict[str, Any]:
        seconds = round(time.perf_counter() - start, 1)
        one = {**about, "title": "On an accelerator", "device": _device(), "tables": tables, "seconds": seconds}
        return {**merge("accelerator", [one], settings.quick), "failures": failures}

    for name in names:
        began = time.perf_counter()
        if began - start > budget_s:
            failures.append({"section": name, "error": f"not started: {budget_s:.0f} s were over"})
            continue
        print(f"{name}: running on {_device()} ...", flush=True)
        try:
            found = SECTIONS[name](settings)
        except Exception:  # noqa: BLE001  whatever a section raises is written down, and fails the run
            failures.append({"section": name, "error": traceback.format_exc()})
            print(failures[-1]["error"], file=sys.stderr, flush=True)
            found = []
        tables += found
        keep(result())
        print(show({"tables": found}), flush=True)
        print(f"{name}: {time.perf_counter() - began:.0f} s\n", flush=True)
    return result()


def _write(out: Path, result: dict[str, Any]) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _device() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


# --- steps -----------------------------------------------------------------------------------------------------


def _with_cpu(found: dict[str, Any], case: Case, settings: Settings) -> dict[str, Any]:
    """The table with each rival's difference from our step on the CPU: its own from ours on the device is added."""
    outputs = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            call = case.loop(Ours(case, case.build()).program)
            outputs.append([np.asarray(call(), np.float64) for _ in range(settings.check_steps)])
    ours = max(
        float(np.max(np.abs(a - b) / np.maximum(1.0, np.abs(b)), initial=0.0)) for a, b in zip(*outputs, strict=True)
    )
    if not np.isfinite(ours) or ours > 10 * case.tolerance:
        raise WrongResultError(f"{found['key']}: the device differs from the CPU by {ours:.2g}")
    for row in found["rows"]:
        if "difference" in row:
            row["difference_to_cpu"] = ours + row["difference"]
    return found


def many_small(settings: Settings) -> Tables:
    """Many small leaves, packed as well: what crosses the boundary of a compiled function."""
    blocks = 8 if settings.quick else 100  # 1,200 arrays; 2,400 take a minute more to compile than there is
    case = train.many_small_case(blocks)
    title = f"{blocks} blocks of width 8, Adam"
    return [_with_cpu(compare(case, settings, key="many_small", title=title, names=RIVALS), case, settings)]


def decode_wide(settings: Settings) -> Tables:
    """A decode step over thousands of Variables."""
    depth = 2 if settings.quick else 64
    case = serve.decode_wide_case(depth)
    title = f"{depth} layers of 119 Variables"
    found = compare(case, settings, key="decode_wide", title=title, per="token", names=serve.WIDE[:4])
    return [_with_cpu(found, case, settings)]


def scan(settings: Settings) -> Tables:
    """Sixteen steps in one program."""
    return loops.scan(settings, blocks=None if settings.quick else 40)


def transformer(settings: Settings) -> Tables:
    """A train step that is compute-bound: what is left of the chip's rate."""
    width, depth, batch, length, heads = (32, 1, 2, 8, 2) if settings.quick else (1024, 12, 8, 1024, 16)
    case = transformer_case(width, depth, batch, length, heads)
    names = ("statewise", "by-hand", "nnx.jit_partial")
    params = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: nnx.state(case.build(), nnx.Param))))
    # Kaplan et al. 2020 (arXiv:2001.08361): 6 for each parameter and token, and 12 x width x length for attention.
    flops = batch * length * (6 * params + 12 * depth * width * length)
    title = f"A transformer of {params / 1e6:.0f} million parameters in bfloat16, {batch} x {length} tokens, AdamW"
    found = compare(case, settings, key="transformer_bf16", title=title, names=names, flops=flops)
    for row in found["rows"]:
        if "median_s" in row:
            row["teraflops_per_s"] = flops / row["median_s"] / 1e12
    small = transformer_case(64, 2, 2, 16, 2) if not settings.quick else case
    # On the CPU the large one would take minutes: the two devices are compared on a small one of the same code.
    return [_with_cpu(found, small, settings)]


# --- keeping and placing ---------------------------------------------------------------------------------------


def _arrays(settings: Settings) -> dict[str, jax.Array]:
    count, size = (3, 1 << 12) if settings.quick else (16, 1 << 24)
    keys = jax.random.split(jax.random.key(0), count)
    return {f"leaf_{number:02}": jax.random.normal(keys[number], (size,)) for number in range(count)}


def _checked(
    settings: Settings,
    ways: Mapping[str, Callable[[], Any]],
    expected: list[np.ndarray],
    read_back: Mapping[str, Callable[[Any], Any]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Times ways of moving the same arrays; each has to give them back to the bit, which is checked once.

    A row's two figures of correctness are the number of elements that differ, and of arrays that are elsewhere than
    they should be.
    """
    figures = {}
    for label, way in ways.items():
        out = way()
        arrays = jax.tree.leaves(read_back[label](out) if label in read_back else out)
        differ = sum(int((np.asarray(a) != b).sum()) for a, b in zip(arrays, expected, strict=True))
        elsewhere = sum(isinstance(a, jax.Array) and a.devices() != {jax.devices()[0]} for a in arrays)
        figures[label] = {"elements_that_differ": differ, "arrays_elsewhere": elsewhere}
        if differ or elsewhere:
            raise WrongResultError(f"{label}: {differ} elements differ, {elsewhere} arrays are elsewhere")
    rows = time_calls(ways, next(iter(ways)), settings)
    return {label: {"key": label, "label": label, **rows[label], **figures[label]} for label in ways}


def _rates(rows: dict[str, Any], size: int) -> list[dict[str, Any]]:
    for row in rows.values():
        row["gigabytes_per_s"] = size / row["median_s"] / 1e9
    return list(rows.values())


def keep(settings: Settings) -> Tables:
    """Saving from the device's memory and restoring into it, beside the plain copies to the host and back."""
    import orbax.checkpoint as ocp

    arrays = _arrays(settings)
    expected = [np.asarray(array) for array in arrays.values()]
    size = sum(array.nbytes for array in expected)
    few = Settings(quick=settings.quick, budget_s=0.0, rounds=(3, 3), sample_s=0.0)
    state = sw.plan(model := nnx.Dict(**{name: nnx.Param(array) for name, array in arrays.items()})).take(model)
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), arrays)
    with tempfile.TemporaryDirectory() as folder:
        fresh, kept = Path(folder) / "fresh", Path(folder) / "kept"

        def ours_restore(path: Path) -> Any:
            return sw.restore(path, state)[0]

        def orbax_save(path: Path) -> None:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, arrays)

        def orbax_restore(path: Path) -> Any:
            with ocp.StandardCheckpointer() as checkpointer:
                return checkpointer.restore(path, shapes)

        def saving(save: Callable[[Path], Any]) -> Callable[[], Any]:
            def way() -> Path:
                shutil.rmtree(fresh, ignore_errors=True)
                save(fresh)
                return fresh

            return way

        sw.save(kept / "ours", state)
        orbax_save(kept / "orbax")
        saves = {
            "Statewise, `sw.save`": saving(lambda path: sw.save(path, state)),
            "Orbax `StandardCheckpointer`, save": saving(orbax_save),
            "device to host alone": lambda: jax.device_get([array + 0 for array in arrays.values()]),
        }
        restores = {
            "Statewise, `sw.restore`": lambda: ours_restore(kept / "ours"),
            "Orbax `StandardCheckpointer`, restore": lambda: orbax_restore(kept / "orbax"),
            "host to device alone": lambda: jax.device_put(expected),
        }
        # What a save wrote is read back by its own library before anything is timed.
        read_back = dict(zip(saves, (ours_restore, orbax_restore), strict=False))
        return [
            table(
                f"keep_{name}",
                f"{name.capitalize()} {size / 1e6:,.0f} MB of the device's memory",
                _rates(_checked(few, ways, expected, read_back), size),
                per=name,
                reference=next(iter(ways)),
                bytes=size,
            )
            for name, ways in (("save", saves), ("restore", restores))
        ]


def pinned(settings: Settings) -> Tables:
    """Parameters kept in the host's pinned memory: placed there, copied to the device and back, restored there."""
    arrays = _arrays(settings)
    expected = [np.asarray(array) for array in arrays.values()]
    size = sum(array.nbytes for array in expected)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,))
    model = nnx.Dict(**{name: nnx.Param(array) for name, array in arrays.items()})
    host = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Replicated(memory="pinned_host"))).plan(model)
    device = sw.Kinds(params=sw.Kind(nnx.Param)).plan(model)
    there = host.take(model, mesh=mesh)
    kinds_of_memory = {array.sharding.memory_kind for array in jax.tree.leaves(there)}
    if kinds_of_memory != {"pinned_host"}:
        raise WrongResultError(f"placed in pinned_host, the arrays are in {sorted(map(str, kinds_of_memory))}")
    here = device.take(model, mesh=mesh)
    ways = {
        "`sw.transfer`, device to pinned host": lambda: sw.transfer(here, there, kinds="params"),
        "`sw.transfer`, pinned host to device": lambda: sw.transfer(there, here, kinds="params"),
        "`jax.device_put`, pinned host to device": lambda: jax.device_put(
            jax.tree.leaves(there), jax.NamedSharding(mesh, jax.P())
        ),
    }
    rows = _rates(_checked(settings, ways, expected), size)
    with tempfile.TemporaryDirectory() as folder:
        sw.save(Path(folder) / "run", here)
        seconds, (back, _) = timed(lambda: sw.restore(Path(folder) / "run", host.abstract(mesh)))
    restored = jax.tree.leaves(back)
    if {array.sharding.memory_kind for array in restored} != {"pinned_host"}:
        raise WrongResultError("a restore into pinned_host put the arrays elsewhere")
    if not all(np.array_equal(one, other) for one, other in zip(restored, expected, strict=True)):
        raise WrongResultError("a restore into pinned_host gave other values")
    title = f"{size / 1e6:,.0f} MB between the device and the host's pinned memory"
    reference = next(iter(ways))
    return [table("pinned", title, rows, per="copy", reference=reference, bytes=size, restore_ms=round(1e3 * seconds))]


SECTIONS: dict[str, Callable[[Settings], Tables]] = {
    "transformer": transformer,
    "microbatches": microbatches,
    "keep": keep,
    "pinned": pinned,
    "many_small": many_small,
    "decode_wide": decode_wide,
    "scan": scan,
}

if __name__ == "__main__":
    sys.exit(main())
