"""Declare once how each kind of model state lives; every pipeline reads that one declaration."""

from statewise.errors import (
    ContestedError,
    DamagedError,
    FilterError,
    KindError,
    PlacementError,
    RestoreError,
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
from statewise.state import State
from statewise.steps import Compiled, Lowered, Step, step, train_step
