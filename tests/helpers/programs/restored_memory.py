"""Restores a checkpoint in a process of its own and prints how much memory that took; run by test_meshes.py."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # imported by a test, this changes nothing there
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax

import statewise as sw
from large_states import large_plan, mesh_of
from programs.made_memory import used


def main(path: str, shape: tuple[int, ...]) -> None:
    plan = large_plan(len(shape))
    target = plan.abstract(mesh_of(shape))
    before = used()
    state, _ = sw.restore(path, target)
    jax.block_until_ready(state)
    print(used() - before)


if __name__ == "__main__":
    main(sys.argv[1], tuple(map(int, sys.argv[2].split(","))))
