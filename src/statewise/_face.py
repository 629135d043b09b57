"""The public names, each with the room that it lives in; a room is imported when a name of it is first used.

Importing JAX and Flax takes seconds, which `statewise --help` should not, so `import statewise` loads no room.
Some functions are called as their room is (`statewise.plan`, `statewise.census`): the import system sets a
package's attribute to each submodule that it loads, and would put the room over the function.  The class here keeps
the public name in place.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["ROOMS"]

ROOMS = {
    "filters": ("Exactly", "Meta", "Path", "Where"),
    "select": ("Explanation", "count", "explain", "merge", "select", "split", "update"),
    "census": ("Census", "census"),
    "tables": ("KindCount",),
    "kinds": ("Kind", "Kinds"),
    "placements": (
        "FromMetadata",
        "PerDevice",
        "Replicated",
        "Sharded",
    ),
    "averages": ("EMA",),
    "plan": ("Plan", "plan"),
    "memory": ("KindMemory", "Memory", "memory"),
    "state": ("State",),
    "transfer": ("transfer",),
    "lowered": ("Compiled", "Lowered"),
    "steps": ("Step",),
    "decorators": ("step", "train_step"),
    "layers": ("scan_layers",),
    "grads": ("grad", "value_and_grad"),
    "audit": (
        "Audit",
        "KindAudit",
        "LeafAudit",
        "audit",
    ),
    "watch": (
        "LeafChange",
        "Seen",
        "watch",
    ),
    "checkpoint": (
        "Checkpointable",
        "Checkpoints",
        "Conversion",
        "Diff",
        "LeafDiff",
        "RestoreReport",
        "Restored",
        "RestoredLeaf",
        "checkpointable",
        "convert",
        "diff",
        "inspect",
        "preview",
        "restore",
        "save",
    ),
    "lint": ("Finding", "Findings", "lint"),
    "report": (
        "Report",
        "ReportedLeaf",
        "report",
    ),
    "paths": ("Leaf", "format_path"),
    "errors": (
        "ContestedError",
        "DamagedError",
        "FilterError",
        "KindError",
        "PlacementError",
        "RestoreError",
        "SaveError",
        "StatewiseError",
        "StatewiseWarning",
        "StructureError",
        "UnclaimedError",
        "UndeclaredWriteError",
        "WatchError",
    ),
}
_HOMES = {name: room for room, names in ROOMS.items() for name in names}


class _Face(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'statewise' has no attribute {name!r}")
        thing = getattr(importlib.import_module(f"statewise.{_HOMES[name]}"), name)
        setattr(self, name, thing)  # found at once from now on
        return thing

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *_HOMES})


sys.modules["statewise"].__class__ = _Face
