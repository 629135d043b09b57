"""Optimizers of kinds: which leaves each of them updates, and the layout of its state.

Optax receives the parameters of a group as NNX would pass them: plain arrays, nested by path as `nnx.state` nests them.
Masks and `optax.multi_transform` labels written for `nnx.state(model, nnx.Param)` therefore work unchanged, and so do
plain dicts of the same nesting: where a transformation rejects the one container, it gets the other.  The layout of an
optimizer's state is known only from the transformation itself, at the cost of a trace; it is computed when a plan first
needs it.
"""

# No `from __future__ import annotations`: the fields of the base class are read at run time.
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

from statewise._src.common import compat
from statewise._src.common.nested_state import nested
from statewise._src.common.nnx_graph import spec_of
from statewise._src.common.paths import Path, plain_key
from statewise._src.plan.derived import Companions, Derived, DerivedLayout, check_no_loss, sources_of
from statewise._src.plan.elementwise import PARAM, Elementwise, prove_elementwise
from statewise._src.plan.kind import Kind
from statewise._src.plan.leaf_specs import LeafSpec
from statewise._src.plan.overwrite import overwrites
from statewise.errors import DeclarationError

__all__ = ["OPTIMIZER", "OptimizerGroup", "resolve_optimizers"]

OPTIMIZER = "optimizer"


@dataclasses.dataclass(frozen=True, eq=False)
class OptimizerGroup(Derived):
    """One optimizer and the leaves that it updates together: those of one kind, or of several for a joint update.

    Attributes:
      tx: the transformation, with support for extra arguments.
      given: the transformation as the user passed it: groups with the same one are equal.
    """

    tx: Any
    given: Any

    trains: ClassVar[bool] = True

    @property
    def rule(self) -> int:
        """Returns the identity of the transformation that the user passed."""
        return id(self.given)

    @property
    def overwrites(self) -> bool:
        """Returns whether gradients replace the leaves that it updates."""
        return overwrites(self.given)

    def proof(self) -> Elementwise | None:
        """Tries to prove that the optimizer is elementwise on the leaves that it updates; returns None if it is not."""
        return None if self.overwrites else prove_elementwise(self, self.tx)

    def companions(self) -> Companions | None:
        """Returns which moments belong to each parameter; None if the optimizer is not elementwise."""
        proof = self.proof()
        if proof is None:
            return None
        by_role = {role: index for index, role in enumerate(proof.roles) if role is not None}
        own = tuple(
            tuple(by_role[role, leaf] for role, _ in signature if role != PARAM)
            for leaf, signature in enumerate(proof.signatures)
        )
        return Companions(proof.signatures, own)

    @property
    def into(self) -> str:
        """Returns the kind that the optimizer's state belongs to."""
        return OPTIMIZER

    @property
    def leaf_paths(self) -> tuple[Path, ...]:
        """Returns the path of each array of the optimizer's state: `optimizer/params/0/mu/kernel`."""
        return tuple((OPTIMIZER, self.label, *path) for path in self.layout.paths)

    @property
    def label(self) -> str:
        """Returns the group's key in paths and in `state["optimizer"]`: `params`, or `params+lora` for several."""
        return "+".join(self.kinds)

    @functools.cached_property
    def layout(self) -> DerivedLayout:
        """Returns the layout of the optimizer's state."""
        _, state = self._set_up
        keyed, structure = jax.tree_util.tree_flatten_with_path(state)
        paths = tuple(tuple(map(plain_key, keys)) for keys, _ in keyed)
        specs = tuple(spec for spec in (spec_of(leaf) for _, leaf in keyed) if spec is not None)
        return DerivedLayout(structure, paths, self.overridden or specs, _roots(state, self.paths))

    @property
    def container(self) -> type:
        """Returns the container in which Optax receives the parameters: NNX's, unless a mask is nested in the other."""
        return self._set_up[0]

    @functools.cached_property
    def _set_up(self) -> tuple[type, Any]:
        """Returns the container that the transformation takes, and its state as `jax.eval_shape` of `init` gives it."""
        shapes = [jax.ShapeDtypeStruct(*spec) for spec in self.source_specs]
        errors: list[Exception] = []
        for container in compat.state_types():
            try:
                return container, jax.eval_shape(functools.partial(self._init, container), shapes)
            except (ValueError, TypeError, KeyError) as error:
                errors.append(error)
        # Where a dict met an nnx.State, the error names both types, and the other error has the reason.
        names = list(map(str, compat.state_types()))
        reason_of = min(errors, key=lambda error: len(names) > 1 and all(name in str(error) for name in names))
        reason = " ".join(str(reason_of).split())[:300]
        raise DeclarationError(
            f"The optimizer of {self.label} cannot be set up for these leaves: {reason}",
            kind=self.kinds[0],
            hint="masks and labels are nested as the parameters are: {'layer': {'kernel': True}}; "
            "or functions of them: lambda params: jax.tree.map_with_path(label_of, params)",
        ) from reason_of

    def _init(self, container: type, arrays: Sequence[Any]) -> Any:
        return self.tx.init(nested(zip(self.paths, arrays, strict=True), container))

    def init(self, arrays: Sequence[Any]) -> list[Any]:
        """Returns new optimizer state for these parameters, as its arrays in order.

        All of them are copies: a transformation may return arrays that it was made with (a PRNG key, a learning rate),
        and steps donate a state's arrays.
        """
        leaves = self.layout.structure.flatten_up_to(self._init(self.container, arrays))
        check_no_loss(self.leaf_paths, self.into, leaves, self.layout.specs)
        leaves.reverse()
        # Popping releases each original before the next copy is made, so large moments are never in memory twice.
        return [jnp.array(leaves.pop(), dtype=spec.dtype) for spec in self.layout.specs]


def _roots(state: Any, params: Sequence[Path]) -> tuple[int | None, ...]:
    """Returns how many keys of each array's path lead to a subtree that is nested as the parameters are.

    Such a subtree is a mapping in which each array is at, or below, the path of a parameter.  The dict of a
    `multi_transform` is not: its keys are labels, and what is below them has the names of fields in its paths.
    """
    known = frozenset(params)

    def is_nested(node: Any) -> bool:
        if not isinstance(node, Mapping):
            return False
        paths = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(node)[0]]
        return bool(paths) and all(_starts_within(keys, known) for keys in paths)

    roots: list[int | None] = []
    for keys, node in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_nested)[0]:
        count = len(jax.tree.leaves(node))
        roots += [len(keys) if is_nested(node) else None] * count
    return tuple(roots)


def _starts_within(keys: Sequence[Any], known: Collection[Path]) -> bool:
    """Returns whether a path of keys starts with a known path, all of it keys of mappings."""
    path: Path = ()
    for key in keys:
        if not isinstance(key, jax.tree_util.DictKey):
            return False
        path = (*path, key.key)
        if path in known:
            return True
    return False


def resolve_optimizers(
    kinds: Mapping[str, Kind], rows: Sequence[LeafSpec], optimizers: Mapping[Any, Any]
) -> tuple[OptimizerGroup, ...]:
    """Resolves declared optimizers to groups, in their order.

    Raises:
      DeclarationError: a kind that does not exist, is frozen, has no leaves, or has two optimizers; leaves that no
        gradient can update; something that is not an optimizer.
    """
    groups: list[OptimizerGroup] = []
    key_of: dict[str, Any] = {}  # by the name of a kind, the key that declares its optimizer
    for key, tx in optimizers.items():
        names = (key,) if isinstance(key, str) else tuple(key)
        for name in names:
            if name in key_of:
                raise DeclarationError(
                    f"The kind {name!r} has two optimizers: under {key_of[name]!r} and under {key!r}.",
                    kind=name,
                    hint=f"one optimizer for {name!r}; optax.chain joins transformations",
                )
            key_of[name] = key
        if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
            raise DeclarationError(
                f"The optimizer of {key!r} is {type(tx).__name__}, not an optax.GradientTransformation.",
                kind=names[0] if names else None,
                hint=f"optimizers={{{key!r}: optax.adamw(3e-4)}}",
            )
        sources = sources_of("optimizer", names, kinds, rows, "no gradient updates it")
        plain = tx.gradient_transformation() if isinstance(tx, optax.MultiSteps) else tx
        leaves = tuple((row.path, row.specs, row.structure) for row in sources)
        groups.append(OptimizerGroup(names, leaves, optax.with_extra_args_support(plain), tx))
    if groups and OPTIMIZER in kinds and kinds[OPTIMIZER].frozen:
        raise DeclarationError(
            "The kind 'optimizer' is frozen, but its leaves change in every update.",
            kind=OPTIMIZER,
            hint="kinds.replace(optimizer=sw.Kind(nnx.OptState))",
        )
    return tuple(groups)
