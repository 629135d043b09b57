"""Restores a checkpoint in a process of its own and prints how much memory that took; run by test_meshes.py."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import statewise as sw
from checkpoint.test_meshes import large_plan, mesh_of


def used() -> int:
    """The most that this process has had, in bytes; `getrusage` would count what its parent had when it was forked."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def main(path: str, shape: tuple[int, ...]) -> None:
    plan = large_plan(len(shape))
    target = plan.abstract(mesh_of(shape))
    before = used()
    state, _ = sw.restore(path, target)
    jax.block_until_ready(state)
    print(used() - before)


if __name__ == "__main__":
    main(sys.argv[1], tuple(map(int, sys.argv[2].split(","))))
