"""Equinox: `eqx.filter_jit` on a model that is a pytree, and the same with the flattening done once by hand."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from benchmarks.case import Call, Case, Program

__all__ = ["Equinox"]


class Equinox:
    """A model, the state beside it, and the optimizer's state, each replaced by a step.

    Args:
      case: the case.
      model: a fresh NNX model of it; the Equinox model gets its weights.
      sharding: where the arrays lie, if not on the default device.
      flat: the three as flat lists between the calls, as in Equinox's "Low-overhead training loops".
    """

    def __init__(self, case: Case, model: Any, sharding: Any = None, flat: bool = False) -> None:
        self.case = case
        assert case.eqx is not None
        mine, state = case.eqx.build(model)
        moments = case.tx.init(eqx.filter(mine, eqx.is_inexact_array)) if case.tx else None
        held = (mine, state, moments)
        if sharding is not None:
            held = eqx.filter_shard(held, sharding)
        self.flat = flat
        self.trees = [jax.tree.structure(part) for part in held]
        self.held = [jax.tree.leaves(part) if flat else part for part in held]

    def train_fn(self, program: Program) -> Call:
        tx, loss_fn = self.case.tx, program.eqx
        assert tx is not None
        assert loss_fn is not None

        def make_step(model: Any, state: Any, moments: Any, *args: Any) -> Any:
            (loss, state), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, state, *args)
            updates, moments = tx.update(grads, moments, eqx.filter(model, eqx.is_inexact_array))
            return (eqx.apply_updates(model, updates), state, moments), loss

        return make_step

    def call_fn(self, program: Program) -> Call:
        fn = program.eqx
        assert fn is not None

        def call(model: Any, state: Any, *args: Any) -> Any:
            if program.writes == "params":
                out, model = fn(model, state, *args)
            elif program.writes:
                out, state = fn(model, state, *args)
            else:
                return (), fn(model, state, *args)
            return (model, state), out

        return call

    def jitted(self, name: str) -> Call:
        """Of (args, held); the arguments first, since `donate="all-except-first"` spares those."""
        program = self.case.programs[name]
        body = self.train_fn(program) if program.trains else self.call_fn(program)
        donate = "all-except-first" if self.case.donate and (program.trains or program.writes) else "none"

        def step(args: Any, held: Any) -> Any:
            if self.flat:
                held = [jax.tree.unflatten(tree, leaves) for tree, leaves in zip(self.trees, held, strict=False)]
            written, out = body(*held, *args)
            return [jax.tree.leaves(part) if self.flat else part for part in written], out

        return eqx.filter_jit(step, donate=donate)

    def program(self, name: str) -> Call:
        fn, program = self.jitted(name), self.case.programs[name]
        takes = 3 if program.trains else 2  # only training needs the optimizer's state

        def call(*args: Any) -> Any:
            written, out = fn(args, self.held[:takes])
            self.held[: len(written)] = written
            return out

        return call

    def lower(self, name: str, *args: Any) -> Any:
        return self.jitted(name).lower(args, self.held)
