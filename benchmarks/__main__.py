"""The command line: `python -m benchmarks [--quick] [--only NAME ...] [--write-docs]`.

This process measures nothing and does not import JAX: it starts one process for each workload, with the
environment that it needs, and writes what comes back as JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import RUN
from benchmarks.report import merge, show, write_docs

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
# Name -> (fake devices, processes): what this process has to know without importing the workloads.
PLANNED: dict[str, tuple[int, int]] = {
    "many_small": (1, 2),
    "few_large": (1, 2),
    "resnet": (1, 1),
    "transformer": (1, 1),
    "mesh": (8, 1),
    "decode": (1, 2),
    "decode_wide": (1, 2),
    "alone": (1, 1),
    "rl": (1, 1),
    "noop": (1, 1),
    "scan": (1, 2),
    "options": (1, 2),
    "small_kind": (1, 2),
    "leaves": (1, 1),
    "growth": (1, 1),
    "large": (1, 1),
    "look": (1, 1),
    "first": (1, 1),
    "start": (1, 1),
    "keep": (1, 2),
    "disk": (1, 1),
    "together": (1, 1),
    "names": (1, 2),
    "memory": (1, 1),
}


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.child:
        return _child(*args.child)
    if args.worker:
        return _work(args.worker, args.quick, Path(args.json))
    results = Path(args.results) if args.results else RESULTS / "quick" if args.quick else RESULTS
    failed = [] if args.write_docs and not args.only else _run_all(args, results)
    if args.write_docs:
        for path in write_docs(results, ROOT / "docs", tuple(PLANNED)):
            print(f"wrote {path.relative_to(ROOT)}")
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="The numbers, side by side.")
    parser.add_argument("--quick", action="store_true", help="small models, few rounds")
    parser.add_argument("--only", nargs="+", choices=PLANNED, metavar="NAME", help="some of: " + ", ".join(PLANNED))
    parser.add_argument("--processes", type=int, help="how many processes each workload is run in")
    parser.add_argument("--results", help="where the JSON goes (benchmarks/results; its folder quick/ for --quick)")
    parser.add_argument("--write-docs", action="store_true", help="write docs/performance.md from the JSON there is")
    for hidden in ("--worker", "--json"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser


def _run_all(args: argparse.Namespace, results: Path) -> list[str]:
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only or PLANNED:
        start = time.perf_counter()
        processes = args.processes or (1 if args.quick else PLANNED[name][1])
        print(f"{name}: running in {processes} process{'es' if processes > 1 else ''} ...", flush=True)
        found = [run for number in range(processes) if (run := _spawn(name, args.quick, number)) is not None]
        if len(found) < processes:
            failed.append(name)
            continue
        result = merge(name, found, args.quick)
        (results / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(show(result))
        print(f"{name}: {time.perf_counter() - start:.0f} s\n", flush=True)
    return failed


def _spawn(name: str, quick: bool, number: int) -> dict[str, Any] | None:
    """Runs a workload in a process of its own; None if it fails, which it has told on standard error."""
    devices = PLANNED[name][0]
    environment = {
        **os.environ,
        RUN: str(number),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if devices > 1:
        flag = f"--xla_force_host_platform_device_count={devices}"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
        environment["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks", "--worker", name, "--json", str(out)]
        done = subprocess.run(command + ["--quick"] * quick, env=environment, check=False)
        return json.loads(out.read_text(encoding="utf-8")) if done.returncode == 0 else None


def _work(name: str, quick: bool, out: Path) -> int:
    from benchmarks.machine import describe
    from benchmarks.measure import Settings
    from benchmarks.workloads import WORKLOADS

    about = describe()
    start = time.perf_counter()
    tables = WORKLOADS[name].run(Settings.short() if quick else Settings())
    result = {**about, "seconds": round(time.perf_counter() - start, 1), "device": _device(), "tables": tables}
    out.write_text(json.dumps({"title": WORKLOADS[name].title, **result}), encoding="utf-8")
    return 0


def _device() -> str:
    import jax

    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def _child(workload: str, arguments: str) -> int:
    """The other side of `benchmarks.machine.in_own_process`."""
    child = importlib.import_module(f"benchmarks.workloads.{workload}").child
    print(json.dumps(child(*json.loads(arguments))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
