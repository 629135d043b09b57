"""What is measured: each workload is a function of the settings that returns tables.

A workload runs in a process of its own; `__main__` says with how many devices, and how often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.measure import Settings
from benchmarks.workloads import (
    alone,
    disk,
    first,
    grow,
    growth,
    keep,
    large,
    look,
    loops,
    memory,
    names,
    options,
    serve,
    start,
    together,
    train,
)

__all__ = ["WORKLOADS", "Workload"]


@dataclasses.dataclass(frozen=True)
class Workload:
    """One workload: what gives its tables, and what it is, in a line."""

    run: Callable[[Settings], list[dict[str, Any]]]
    title: str


WORKLOADS = {
    "many_small": Workload(train.many_small, "A train step on many small leaves"),
    "few_large": Workload(train.few_large, "A train step on few large leaves"),
    "resnet": Workload(train.resnet, "A train step of a small ResNet, with BatchNorm"),
    "transformer": Workload(train.transformer, "A train step of a small transformer, with Dropout"),
    "mesh": Workload(train.mesh, "Many small leaves on a mesh of eight devices"),
    "decode": Workload(serve.decode, "A decode step with a KV cache"),
    "decode_wide": Workload(serve.decode_wide, "A decode step of a model of many small Variables"),
    "alone": Workload(alone.alone, "The same, each way in processes of its own"),
    "rl": Workload(serve.rl, "A loop of acting and learning, in tiny steps"),
    "noop": Workload(serve.noop, "A step that does nothing, on many leaves"),
    "scan": Workload(loops.scan, "Sixteen train steps in one call"),
    "options": Workload(options.options, "What the options of a train step cost"),
    "small_kind": Workload(grow.small_kind, "One small kind in a small and in a large model"),
    "leaves": Workload(grow.leaves, "Cost against the number of leaves"),
    "growth": Workload(growth.growth, "How every verb grows with the model"),
    "large": Workload(large.large, "A billion parameters, abstract"),
    "look": Workload(look.look, "Planning, selecting, splitting, counting"),
    "first": Workload(first.first, "The first call"),
    "start": Workload(start.start, "The start of a program"),
    "keep": Workload(keep.keep, "Saving and restoring"),
    "disk": Workload(disk.disk, "Large states on a disk, and in object stores"),
    "together": Workload(together.together, "Saving and restoring by several processes"),
    "names": Workload(names.names, "Reading published weights"),
    "memory": Workload(memory.memory, "Peak memory of a train step"),
}
