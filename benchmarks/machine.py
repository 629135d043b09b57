"""What the numbers were taken on, how much memory a process has used at most, and processes for one number."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import random
import resource
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["RUN", "commit", "describe", "in_own_process", "order", "peak_bytes"]

# The environment variable with the number of this process among those of its workload, from 0.
RUN = "STATEWISE_BENCHMARK_RUN"

ROOT = Path(__file__).parent.parent
PACKAGES = ("statewise", "jax", "jaxlib", "flax", "optax", "equinox", "numpy")


def describe() -> dict[str, Any]:
    """The machine, the versions, the commit and the moment, as plain data."""
    return {
        "machine": {
            "cpu": _cpu(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
            "system": f"{platform.system()} {platform.machine()}",
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": commit("src", "benchmarks", ":!benchmarks/results"),
        "when": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def order(keys: Iterable[str]) -> list[str]:
    """The order in which this process makes its ways: another in each pair of processes, and the reverse in the second.

    A first call may gain from what the ones before it have traced, and of two copies of one program, the one made first
    may be faster by a sixth.  The processes of a workload have one parent, from whose number the order is drawn.
    """
    run = int(os.environ.get(RUN, "0"))
    drawn = list(keys)
    random.Random(1000 * os.getppid() + run // 2).shuffle(drawn)
    return drawn[::-1] if run % 2 else drawn


def in_own_process(workload: str, *arguments: Any) -> dict[str, Any]:
    """What `child` of a workload's module returns in a process that does nothing else; all of it goes through JSON."""
    command = [sys.executable, "-m", "benchmarks", "--child", workload, json.dumps(arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit(*paths: str) -> str | None:
    """The commit of the checkout, with "+" if something in these paths was changed since; None without git."""
    try:
        name = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--", *paths)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{name}+" if changed else name


def peak_bytes() -> int:
    """The largest resident size that this process has had so far.

    Linux hands `ru_maxrss` on from the process that started this one; its own mark stands in /proc.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
