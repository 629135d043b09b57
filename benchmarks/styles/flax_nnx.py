"""Flax NNX's own ways: `nnx.jit` and its faster relatives, and the functional loop of its performance guide."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from benchmarks.case import Call, Case, Program

__all__ = ["GraphdefState", "Nnx"]


def train_body(program: Program) -> Call:
    """The train step of the performance guide: gradients by `nnx.value_and_grad`, the update in place."""

    def train_step(model: Any, optimizer: Any, *args: Any) -> Any:
        loss, grads = nnx.value_and_grad(program.fn)(model, *args)
        optimizer.update(model, grads)
        return loss

    return train_step


def tree_train_body(program: Program) -> Call:
    """The train step of the guide to transforms in tree mode: what is differentiated is split off first."""

    def train_step(model: Any, optimizer: Any, *args: Any) -> Any:
        graphdef, params, nondiff = nnx.split(model, nnx.Param, ..., graph=False)

        def loss_fn(params: Any, nondiff: Any) -> Any:
            return program.fn(nnx.merge(graphdef, params, nondiff), *args)

        loss, grads = nnx.value_and_grad(loss_fn, graph=False)(params, nondiff)
        optimizer.update(model, grads)
        return loss

    return train_step


def call_body(program: Program) -> Call:
    # A function of its own: JAX keeps what it has compiled by function, and the first call is timed afresh.
    def call(model: Any, *args: Any) -> Any:
        return program.fn(model, *args)

    return call


class Nnx:
    """A model and an `nnx.Optimizer`, updated in place.

    Args:
      case: the case.
      model: a fresh model of it.
      sharding: where the arrays lie, if not on the default device.
      variant: `jit`; `tree`, which is `nnx.jit(graph=False)`; `cached`, for `nnx.cached_partial`; `partial`, for
        `nnx.jit_partial(graph=False)`.
    """

    def __init__(self, case: Case, model: Any, sharding: Any = None, variant: str = "jit") -> None:
        self.case = case
        self.variant = variant
        self.model = model
        self.objects: tuple[Any, ...] = (model,)
        if case.tx is not None:
            self.objects = (model, nnx.Optimizer(model, case.tx, wrt=nnx.Param))
        if sharding is not None:
            for thing in self.objects:
                nnx.update(thing, jax.device_put(nnx.state(thing), sharding))

    def jitted(self, name: str) -> tuple[Call, tuple[Any, ...]]:
        """The compiled function and the objects that it takes first."""
        program = self.case.programs[name]
        objects = self.objects if program.trains else self.objects[:1]
        trains = tree_train_body if self.variant in ("tree", "partial") else train_body
        body = trains(program) if program.trains else call_body(program)
        options: dict[str, Any] = {}
        if self.case.donate and (program.trains or program.writes):
            # The bound objects are one argument of what `jit_partial` compiles.
            options["donate_argnums"] = 0 if self.variant == "partial" else tuple(range(len(objects)))
        if self.variant == "partial":
            return nnx.jit_partial(body, *objects, graph=False, **options), ()
        if self.variant == "tree":
            return nnx.jit(body, graph=False, **options), objects
        if self.variant == "cached":
            return nnx.cached_partial(nnx.jit(body, **options), *objects), ()
        return nnx.jit(body, **options), objects

    def program(self, name: str) -> Call:
        fn, objects = self.jitted(name)
        if not objects:
            return fn
        return lambda *args: fn(*objects, *args)

    def lower(self, name: str, *args: Any) -> Any:
        fn, objects = self.jitted(name)
        return fn.lower(*objects, *args)


class GraphdefState:
    """The guide's functional loop: `nnx.split` before it, `nnx.merge` inside `jax.jit`, `nnx.state` at its end."""

    def __init__(self, case: Case, model: Any, sharding: Any = None) -> None:
        self.case = case
        self.objects: tuple[Any, ...] = (model,)
        if case.tx is not None:
            self.objects = (model, nnx.Optimizer(model, case.tx, wrt=nnx.Param))
        self.graphdef, self.state = nnx.split(self.objects)
        if sharding is not None:
            self.state = jax.device_put(self.state, sharding)

    def jitted(self, name: str) -> Call:
        program = self.case.programs[name]
        body = train_body(program) if program.trains else call_body(program)
        writes = program.trains or bool(program.writes)

        def step(graphdef: Any, state: Any, *args: Any) -> Any:
            objects = nnx.merge(graphdef, state)
            out = body(*(objects if program.trains else objects[:1]), *args)
            return (out, nnx.state(objects)) if writes else out

        return jax.jit(step, donate_argnums=1) if self.case.donate and writes else jax.jit(step)

    def program(self, name: str) -> Call:
        fn, program = self.jitted(name), self.case.programs[name]

        def reads(*args: Any) -> Any:
            return fn(self.graphdef, self.state, *args)

        def writes(*args: Any) -> Any:
            out, self.state = fn(self.graphdef, self.state, *args)
            return out

        return writes if program.trains or program.writes else reads

    def lower(self, name: str, *args: Any) -> Any:
        return self.jitted(name).lower(self.graphdef, self.state, *args)
