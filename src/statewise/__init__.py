"""Declare once how each kind of model state lives; every pipeline reads that one declaration."""

from typing import TYPE_CHECKING

import statewise._face  # noqa: F401  (it defers the imports below to the first use of a name)

if TYPE_CHECKING:
    from statewise.audit import (
        Audit,
        KindAudit,
        LeafAudit,
        audit,
    )
    from statewise.averages import EMA
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
    from statewise.decorators import step, train_step
    from statewise.errors import (
        ContestedError,
        DamagedError,
        FilterError,
        KindError,
        PlacementError,
        RestoreError,
        SaveError,
        StatewiseError,
        StatewiseWarning,
        StructureError,
        UnclaimedError,
        UndeclaredWriteError,
        WatchError,
    )
    from statewise.filters import Exactly, Meta, Path, Where
    from statewise.grads import grad, value_and_grad
    from statewise.kinds import Kind, Kinds
    from statewise.layers import scan_layers
    from statewise.lint import Finding, Findings, lint
    from statewise.lowered import Compiled, Lowered
    from statewise.memory import KindMemory, Memory, memory
    from statewise.paths import Leaf, format_path
    from statewise.placements import (
        FromMetadata,
        PerDevice,
        Replicated,
        Sharded,
    )
    from statewise.plan import Plan, plan
    from statewise.report import (
        Report,
        ReportedLeaf,
        report,
    )
    from statewise.select import Explanation, count, explain, merge, select, split, update
    from statewise.state import State
    from statewise.steps import Step
    from statewise.tables import KindCount
    from statewise.transfer import transfer
    from statewise.watch import (
        LeafChange,
        Seen,
        watch,
    )

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "Audit",
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
    "Finding",
    "Findings",
    "FromMetadata",
    "Kind",
    "KindAudit",
    "KindCount",
    "KindError",
    "KindMemory",
    "Kinds",
    "Leaf",
    "LeafAudit",
    "LeafChange",
    "LeafDiff",
    "Lowered",
    "Memory",
    "Meta",
    "Path",
    "PerDevice",
    "PlacementError",
    "Plan",
    "Replicated",
    "Report",
    "ReportedLeaf",
    "RestoreError",
    "RestoreReport",
    "Restored",
    "RestoredLeaf",
    "SaveError",
    "Seen",
    "Sharded",
    "State",
    "StatewiseError",
    "StatewiseWarning",
    "Step",
    "StructureError",
    "UnclaimedError",
    "UndeclaredWriteError",
    "WatchError",
    "Where",
    "audit",
    "census",
    "checkpointable",
    "convert",
    "count",
    "diff",
    "explain",
    "format_path",
    "grad",
    "inspect",
    "lint",
    "memory",
    "merge",
    "plan",
    "preview",
    "report",
    "restore",
    "save",
    "scan_layers",
    "select",
    "split",
    "step",
    "train_step",
    "transfer",
    "update",
    "value_and_grad",
    "watch",
]
