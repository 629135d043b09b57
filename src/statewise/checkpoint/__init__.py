"""Keeping: states to disk and back.

`saving` writes, `restoring` reads; both go through `records` (which leaf is what, and where it goes) and `manifest`
(what a checkpoint says of itself).  `matching` compares a target with a manifest before anything is read, `report`
says what came of it.  `handler` is the part that Orbax calls; `items` and `managed` stand on it.  `converting` goes to
other formats and back, `differing` compares.
"""

from statewise.checkpoint.converting import Conversion, convert
from statewise.checkpoint.differing import Diff, LeafDiff, diff
from statewise.checkpoint.items import Checkpointable, checkpointable
from statewise.checkpoint.managed import Checkpoints, Restored
from statewise.checkpoint.report import RestoredLeaf, RestoreReport
from statewise.checkpoint.restoring import inspect, preview, restore
from statewise.checkpoint.saving import save

__all__ = [
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
]
