"""`jax.jit` over flat lists of arrays, donated: the limit of what is written by hand for one program.

The model is flattened once.  The compiled function takes flat lists of arrays, and closes over the graph definition
and the treedefs by which it makes the model of them again: nothing is wrapped, nothing static is passed or compared.
What a call costs is what arrays cost at `jax.jit`'s boundary.

The arrays stand in four lists, not in one: parameters, the optimizer's, caches, and all others.  A call passes the
lists that the model needs, and returns, donated, those that it writes.  One list would have to come back as a whole.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.case import Call, Case, Program

__all__ = ["ByHand"]


class ByHand:
    """Flat lists of arrays, and what is needed to make a model of them inside the compiled function."""

    def __init__(self, case: Case, model: Any, sharding: Any = None, copy: bool = True) -> None:
        self.case = case
        self.graphdef, *states = nnx.split(model, nnx.Param, nnx.Cache, ...)
        flat = [jax.tree.flatten(nnx.as_pure(state)) for state in states]
        self.trees = [tree for _, tree in flat]
        self.params, self.cache, self.rest = (
            [jnp.copy(array) if copy else array for array in arrays] for arrays, _ in flat
        )
        self.moments: list[Any] = []
        if case.tx is not None:
            self.moments, self.moments_tree = jax.tree.flatten(case.tx.init(self.params))
        if sharding is not None:
            for name in ("params", "cache", "rest", "moments"):
                setattr(self, name, jax.device_put(getattr(self, name), sharding))

    def merged(self, params: Any, cache: Any, rest: Any) -> Any:
        parts = zip(self.trees, (params, cache, rest), strict=True)
        return nnx.merge(self.graphdef, *(jax.tree.unflatten(tree, arrays) for tree, arrays in parts))

    def others(self, model: Any) -> list[Any]:
        """What is neither parameter nor cache, as it is after a call."""
        return jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.Cache)))))

    def cut(self, params: list[Any]) -> list[Any]:
        """The parameters one by one, of the list that a call passes."""
        return params

    def joined(self, arrays: list[Any]) -> list[Any]:
        """The inverse of `cut`, of parameters or of their gradients."""
        return arrays

    def differentiable(self, fn: Call, *operands: Any) -> Call:
        """What is differentiated in place of a function of these operands."""
        return fn

    def train_fn(self, program: Program) -> Call:
        """Of (params, moments, rest, *args), all lists donated."""
        tx = self.case.tx
        assert tx is not None

        def train(params: Any, moments: Any, rest: Any, *args: Any) -> Any:
            def loss_of(params: Any, rest: Any, args: Any) -> Any:
                model = self.merged(params, [], rest)
                return program.fn(model, *args), self.others(model)

            operands = self.cut(params), rest, args
            fn = self.differentiable(loss_of, *operands)
            (loss, rest), grads = jax.value_and_grad(fn, has_aux=True)(*operands)
            updates, state = tx.update(self.joined(grads), jax.tree.unflatten(self.moments_tree, moments), params)
            return optax.apply_updates(params, updates), jax.tree.leaves(state), rest, loss

        return train

    def call_fn(self, program: Program) -> Call:
        """Of (params, cache, rest, *args); returns (written list, output), or the output alone."""

        def call(params: Any, cache: Any, rest: Any, *args: Any) -> Any:
            model = self.merged(params, cache, rest)
            out = program.fn(model, *args)
            if program.writes == "params":
                return jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Param))), out
            if program.writes == "cache":
                return jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.Cache))), out
            return (self.others(model), out) if program.writes else out

        return call

    def program(self, name: str) -> Call:
        program = self.case.programs[name]
        if program.trains:
            train = jax.jit(self.train_fn(program), donate_argnums=(0, 1, 2))

            def trains(*args: Any) -> Any:
                self.params, self.moments, self.rest, loss = train(self.params, self.moments, self.rest, *args)
                return loss

            return trains
        if not program.writes:
            fn = jax.jit(self.call_fn(program))
            return lambda *args: fn(self.params, self.cache, self.rest, *args)
        lists = ("params", "cache", "rest")
        written = program.writes if program.writes in lists else "rest"
        fn = jax.jit(self.call_fn(program), donate_argnums=lists.index(written))

        def writes(*args: Any) -> Any:
            arrays, out = fn(self.params, self.cache, self.rest, *args)
            setattr(self, written, arrays)
            return out

        return writes

    def lower(self, name: str, *args: Any) -> Any:
        train = jax.jit(self.train_fn(self.case.programs[name]), donate_argnums=(0, 1, 2))
        return train.lower(self.params, self.moments, self.rest, *args)
