"""What a workload computes, written down once for all rivals.

A `Case` is a model, an optimizer and some programs over them.  A program is a function of the NNX model and the
arguments; its twin for Equinox is a function of the Equinox model, whatever state goes beside it, and the same
arguments.  `loop` makes the call that is timed out of a rival's programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax
from flax import nnx

__all__ = ["Case", "EqxCase", "Program", "training"]

Call = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """One function to compile.

    Attributes:
      fn: of (model, *args): the loss if it trains, any output otherwise.
      trains: whether the loss is differentiated and the optimizer applied.
      writes: the standard kind that the function itself writes; "" for none.  Training adds what it writes anyway.
      eqx: the twin for Equinox, of (model, state, *args).  It returns (loss, state) if it trains; (output, model)
        if it writes params; (output, state) if it writes another kind; else the output.
    """

    fn: Call
    trains: bool = False
    writes: str = ""
    eqx: Call | None = None


@dataclasses.dataclass(frozen=True)
class EqxCase:
    """How the Equinox model is made: from the NNX model, with the same weights.

    Attributes:
      build: of the NNX model; returns (model, state), the state being any pytree or None.
      comparable: whether its numbers are the same; dropout that draws from other keys is not.
    """

    build: Callable[[nnx.Module], tuple[Any, Any]]
    comparable: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, an optimizer, and programs over them.

    Attributes:
      build: makes the model, the same each time.
      programs: by name.
      loop: of `program(name) -> callable`; returns the call that is timed.  Its output is compared between rivals.
      tx: the optimizer of `nnx.Param`, if a program trains.
      eqx: the Equinox twin, if there is one.
      donate: whether NNX's and Equinox's ways donate the state, as their documentation advises where memory counts.
      tolerance: largest difference of outputs from ours, relative to ours (absolute below 1).
      tiny: the same case with a small model, to warm JAX's own caches.
      quiet: the same case without dropout, with which an incomparable twin is checked.
    """

    build: Callable[[], Any]
    programs: Mapping[str, Program]
    loop: Callable[[Callable[[str], Call]], Call]
    tx: optax.GradientTransformation | None = None
    eqx: EqxCase | None = None
    donate: bool = False
    tolerance: float = 1e-4
    tiny: Callable[[], Case] | None = None
    quiet: Callable[[], Case] | None = None


def training(
    build: Callable[[], Any],
    loss: Call,
    batch: tuple[Any, ...],
    tx: optax.GradientTransformation,
    eqx_loss: Call | None = None,
    **options: Any,
) -> Case:
    """The case of one train step on one batch, again and again."""

    def loop(program: Callable[[str], Call]) -> Call:
        train = program("train")
        return lambda: train(*batch)

    return Case(build, {"train": Program(loss, trains=True, eqx=eqx_loss)}, loop, tx, **options)
