"""Declare once how each kind of model state lives; every pipeline reads that one declaration."""

from typing import TYPE_CHECKING

import statewise._face  # noqa: F401  (it defers the imports below to the first use of a name)

if TYPE_CHECKING:
    from statewise.census import Census, census
    from statewise.checkpoint import (
        Checkpointable,
        Checkpoints,
        Conversion,
        Diff,
        LeafDiff,
        Restored,
        RestoredLeaf,
        RestoreReport,
        checkpointable,
        convert,
        diff,
        inspect,
        preview,
        restore,
        save,
    )
    from statewise.errors import (
        ContestedError,
        DamagedError,
        FilterError,
        KindError,
        PlacementError,
        RestoreError,
        SaveError,
        StatewiseError,
        StructureError,
        UnclaimedError,
        UndeclaredWriteError,
    )
    from statewise.filters import Exactly, Meta, Path, Where
    from statewise.grads import grad, value_and_grad
    from statewise.kinds import Kind, Kinds
    from statewise.memory import KindMemory, Memory, memory
    from statewise.paths import Leaf, format_path
    from statewise.placements import FromMetadata, Replicated, Sharded
    from statewise.plan import Plan, plan
    from statewise.select import Explanation, count, explain, merge, select, split, update
    from statewise.state import State
    from statewise.steps import Compiled, Lowered, Step, step, train_step
    from statewise.tables import KindCount

__version__ = "0.1.0"

__all__ = [
    "Census",
    "Checkpointable",
    "Checkpoints",
    "Compiled",
    "ContestedError",
    "Conversion",
    "DamagedError",
    "Diff",
    "Exactly",
    "Explanation",
    "FilterError",
    "FromMetadata",
    "Kind",
    "KindCount",
    "KindError",
    "KindMemory",
    "Kinds",
    "Leaf",
    "LeafDiff",
    "Lowered",
    "Memory",
    "Meta",
    "Path",
    "PlacementError",
    "Plan",
    "Replicated",
    "RestoreError",
    "RestoreReport",
    "Restored",
    "RestoredLeaf",
    "SaveError",
    "Sharded",
    "State",
    "StatewiseError",
    "Step",
    "StructureError",
    "UnclaimedError",
    "UndeclaredWriteError",
    "Where",
    "census",
    "checkpointable",
    "convert",
    "count",
    "diff",
    "explain",
    "format_path",
    "grad",
    "inspect",
    "memory",
    "merge",
    "plan",
    "preview",
    "restore",
    "save",
    "select",
    "split",
    "step",
    "train_step",
    "update",
    "value_and_grad",
]
