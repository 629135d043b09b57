"""Declare once how each kind of model state lives; every pipeline reads that one declaration."""

from typing import TYPE_CHECKING

import statewise._face  # noqa: F401  (it defers the imports below to the first use of a name)

if TYPE_CHECKING:
    from statewise.census import Census, census
    from statewise.checkpoint import (
        Checkpointable,
        Checkpoints,
        Restored,
        RestoredLeaf,
        RestoreReport,
        checkpointable,
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
    from statewise.paths import Leaf, format_path
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
    "DamagedError",
    "Exactly",
    "Explanation",
    "FilterError",
    "Kind",
    "KindCount",
    "KindError",
    "Kinds",
    "Leaf",
    "Lowered",
    "Meta",
    "Path",
    "PlacementError",
    "Plan",
    "RestoreError",
    "RestoreReport",
    "Restored",
    "RestoredLeaf",
    "SaveError",
    "State",
    "StatewiseError",
    "Step",
    "StructureError",
    "UnclaimedError",
    "UndeclaredWriteError",
    "Where",
    "census",
    "checkpointable",
    "count",
    "explain",
    "format_path",
    "grad",
    "inspect",
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
