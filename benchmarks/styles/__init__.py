"""The rivals: ways of writing a step over a model.

A style is made with a case, and a fresh model of it; `program(name)` gives a callable of the arguments that holds
whatever state there is, runs the step on it, and returns the output.  Each follows its own documentation:

- `ours`: `plan.take`, `sw.train_step`, `sw.step`.
- `flax_nnx`: Flax's performance guide and the docstrings of `nnx.jit`, `nnx.cached_partial`, `nnx.jit_partial`.
- `by_hand`: `jax.jit` over flat lists of arrays, donated: what is left if one writes everything oneself.
- `by_hand_buffer`: the same over one flat buffer, what is left if one packs everything oneself; only where it is named.
- `by_hand_traced`: as `by_hand`, but the function is traced before it is differentiated; only in the workload `first`.
- `equinox`: `eqx.filter_jit`, plain and as "Low-overhead training loops" in its collection of tricks.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import statewise as sw
from benchmarks.case import Case
from benchmarks.styles.by_hand import ByHand
from benchmarks.styles.by_hand_buffer import ByHandBuffer
from benchmarks.styles.flax_nnx import GraphdefState, Nnx
from benchmarks.styles.ours import Ours

__all__ = ["BUFFER", "LABELS", "OURS", "STYLES", "Style", "why_not"]

Style = Callable[..., Any]
OURS = "statewise"
BUFFER = "by-hand-buffer"


def _equinox(case: Case, model: Any, **options: Any) -> Any:
    from benchmarks.styles.equinox import Equinox  # not everybody who imports this package has it

    return Equinox(case, model, **options)


STYLES: dict[str, Style] = {
    OURS: Ours,
    "statewise-packed": functools.partial(Ours, pack=True),
    "by-hand": ByHand,
    BUFFER: ByHandBuffer,
    "nnx.jit_partial": functools.partial(Nnx, variant="partial"),
    "nnx.cached_partial": functools.partial(Nnx, variant="cached"),
    "jax.jit-graphdef": GraphdefState,
    "nnx.jit-tree": functools.partial(Nnx, variant="tree"),
    "nnx.jit": functools.partial(Nnx, variant="jit"),
    "equinox": _equinox,
    "equinox-flat": functools.partial(_equinox, flat=True),
}

LABELS = {
    OURS: "Statewise",
    "statewise-packed": "Statewise, `pack=True`",
    "by-hand": "`jax.jit` by hand: flat lists, donated",
    BUFFER: "`jax.jit` by hand: one flat buffer, donated",
    "nnx.jit_partial": "`nnx.jit_partial(graph=False)`",
    "nnx.cached_partial": "`nnx.cached_partial`",
    "jax.jit-graphdef": "`jax.jit(graphdef, state)`",
    "nnx.jit-tree": "`nnx.jit(graph=False)`",
    "nnx.jit": "`nnx.jit`",
    "equinox": "Equinox `filter_jit`",
    "equinox-flat": "Equinox `filter_jit`, flattened by hand",
}


def why_not(name: str, case: Case) -> str:
    """Why a rival cannot run a case; empty if it can."""
    if name == "statewise-packed" and "pack" not in inspect.signature(sw.Plan.take).parameters:
        return "not available: plan.take has no pack=True in this version"
    if name == BUFFER and not all(program.trains for program in case.programs.values()):
        return "not available: written for train steps alone"
    if name.startswith("equinox"):
        if importlib.util.find_spec("equinox") is None:
            return "not available: equinox is not installed"
        if case.eqx is None:
            return "no twin of this model"
    return ""
