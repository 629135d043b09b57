"""Optimizers of kinds: which leaves each updates, and the layout of its state.

Optax sees the parameters of a group as NNX shows them to it: an `nnx.State`, nested by path, of plain arrays,
so that masks and `optax.multi_transform` labels written against `nnx.state(model, nnx.Param)` work as they
are.  The layout of an optimizer's state is only known by asking the transformation, which costs a trace; it is
asked when a plan first needs it.
"""

# No `from __future__ import annotations`: the base's fields are read at run time.
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from statewise._src.common.nnx_graph import spec_of
from statewise._src.common.paths import Path
from statewise._src.plan.derived import (
    WITHOUT_INTEGERS,
    Companions,
    Derived,
    DerivedLayout,
    check_no_loss,
    plain_key,
    unfit,
)
from statewise._src.plan.elementwise import PARAM, Elementwise, prove_elementwise
from statewise._src.plan.kind import Kind, unknown_kind
from statewise.errors import DeclarationError

__all__ = ["OPTIMIZER", "OptimizerGroup", "check_optimizers"]

OPTIMIZER = "optimizer"


@dataclasses.dataclass(frozen=True, eq=False)
class OptimizerGroup(Derived):
    """One optimizer and the leaves that it updates together: one kind's, or several for a joint update.

    Attributes:
      tx: the transformation, with support for extra arguments.
      given: the transformation as the user gave it: two plans with the same one are equal.
    """

    tx: Any
    given: Any

    trains: ClassVar[bool] = True

    @property
    def rule(self) -> int:
        """The transformation as the user gave it, by identity."""
        return id(self.given)

    def proof(self) -> Elementwise | None:
        """Tries to prove that the optimizer is elementwise on the leaves that it updates; None where it is not."""
        return prove_elementwise(self, self.tx)

    def companions(self) -> Companions | None:
        """Returns which moments go with each parameter, where the optimizer is elementwise."""
        proof = self.proof()
        if proof is None:
            return None
        by_role = {role: at for at, role in enumerate(proof.roles) if role is not None}
        own = tuple(
            tuple(by_role[role, leaf] for role, _ in signature if role != PARAM)
            for leaf, signature in enumerate(proof.signatures)
        )
        return Companions(proof.signatures, own)

    @property
    def into(self) -> str:
        """The kind that the optimizer's state stands in."""
        return OPTIMIZER

    @property
    def leaf_paths(self) -> tuple[Path, ...]:
        """The path of each array of the optimizer's state: `optimizer/params/0/mu/kernel`."""
        return tuple((OPTIMIZER, self.label, *path) for path in self.layout.paths)

    @property
    def label(self) -> str:
        """The group's name in paths and in `state["optimizer"]`: `params`, or `params+lora` for a joint update."""
        return "+".join(self.kinds)

    @functools.cached_property
    def layout(self) -> DerivedLayout:
        """What the optimizer's state is made of, found by `jax.eval_shape` of its `init`."""
        shapes = [jax.ShapeDtypeStruct(spec.shape, spec.dtype) for _, specs, _ in self.rows for spec in specs]
        try:
            state = jax.eval_shape(lambda arrays: self.tx.init(self.params(arrays)), shapes)
        except (ValueError, TypeError, KeyError) as error:
            said = " ".join(str(error).split())[:300]
            raise DeclarationError(
                f"The optimizer of {self.label} cannot be set up for these leaves: {said}",
                kind=self.kinds[0],
                hint="masks and labels are nested as the parameters are: nnx.State({'layer': {'kernel': True}}); "
                "or functions of them: lambda params: jax.tree.map_with_path(label_of, params)",
            ) from error
        keyed, structure = jax.tree_util.tree_flatten_with_path(state)
        paths = tuple(tuple(map(plain_key, keys)) for keys, _ in keyed)
        specs = tuple(spec for spec in (spec_of(leaf) for _, leaf in keyed) if spec is not None)
        return DerivedLayout(structure, paths, self.overridden or specs, _roots(state))

    def init(self, arrays: Sequence[Any]) -> list[Any]:
        """Fresh optimizer state for these parameters, as its arrays in order.

        All of them are copies: a transformation may hand out arrays that it was made with (a PRNG key, a learning
        rate), and steps donate what a state holds.
        """
        leaves = self.layout.structure.flatten_up_to(self.tx.init(self.params(arrays)))
        check_no_loss(self.leaf_paths, self.into, leaves, self.layout.specs)
        leaves.reverse()
        # Each original is let go before the next copy is made: large moments are not held twice.
        return [jnp.array(leaves.pop(), dtype=spec.dtype) for spec in self.layout.specs]


def _roots(state: Any) -> tuple[int | None, ...]:
    """How many keys of each array's path lead to what is nested as the parameters are.

    Optax is given the parameters as an `nnx.State`, and what it makes of each of them comes back in one.
    """
    roots: list[int | None] = []
    for keys, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, nnx.State))[0]:
        is_nested = isinstance(node, nnx.State)
        roots += [len(keys) if is_nested else None] * (len(jax.tree.leaves(node)) if is_nested else 1)
    return tuple(roots)


def check_optimizers(
    kinds: Mapping[str, Kind], rows: Sequence[Any], optimizers: Mapping[Any, Any]
) -> tuple[OptimizerGroup, ...]:
    """Turns the optimizers as given into groups, in the order given.

    Raises:
      DeclarationError: a kind that is not there, frozen, without leaves, in two optimizers, with leaves that no
        gradient can update; something that is no optimizer.
    """
    groups: list[OptimizerGroup] = []
    taken: dict[str, Any] = {}
    for key, tx in optimizers.items():
        names = (key,) if isinstance(key, str) else tuple(key)
        for name in names:
            _check_kind(name, kinds, taken)
            taken[name] = key
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise DeclarationError(
                f"The optimizer of {key!r} is {type(tx).__name__}, not an optax.GradientTransformation.",
                kind=names[0] if names else None,
                hint=f"optimizers={{{key!r}: optax.adamw(3e-4)}}",
            )
        mine = [row for row in rows if row.kind in names]
        _check_rows(names, mine, kinds)
        plain = tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
        groups.append(
            OptimizerGroup(
                names,
                tuple((row.path, row.specs, row.structure) for row in mine),
                optax.with_extra_args_support(plain),
                tx,
            )
        )
    if groups and OPTIMIZER in kinds and kinds[OPTIMIZER].frozen:
        raise DeclarationError(
            "The kind 'optimizer' is frozen, but its leaves change in every update.",
            kind=OPTIMIZER,
            hint="kinds.replace(optimizer=sw.Kind(nnx.OptState))",
        )
    return tuple(groups)


def _check_kind(name: Any, kinds: Mapping[str, Kind], taken: Mapping[str, Any]) -> None:
    if name not in kinds:
        raise unknown_kind(name, kinds)
    if name in taken:
        raise DeclarationError(
            f"The kind {name!r} has two optimizers: under {taken[name]!r} and once more.",
            kind=name,
            hint=f"one optimizer for {name!r}; optax.chain joins transformations",
        )
    if kinds[name].frozen:
        raise DeclarationError(
            f"The kind {name!r} is frozen, and so no optimizer may touch it.",
            kind=name,
            hint=f"declare it trainable, or leave it out: optimizers without {name!r}",
        )


def _check_rows(names: tuple[str, ...], rows: Sequence[Any], kinds: Mapping[str, Kind]) -> None:
    empty = [name for name in names if not any(row.kind == name for row in rows)]
    if empty or not names:
        raise DeclarationError(
            f"An optimizer is given for {', '.join(map(repr, empty)) or 'no kind'}, "
            "which claims no leaf of this model.",
            kind=empty[0] if empty else None,
            hint="leave that optimizer out, or correct the kind's filter",
        )
    odd = unfit(rows, "no gradient updates it")
    if odd:
        raise DeclarationError(
            f"The optimizer of {', '.join(names)} would update leaves that are not made of floating-point numbers.",
            leaves=odd,
            kind=names[0],
            hint=WITHOUT_INTEGERS,
        )
