"""The refusals of states and models that have no values to work with: abstract, traced, or donated.

Each says the same fact in the same words wherever it is met, and what the values were wanted for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from statewise._src.common.nnx_graph import is_abstract, is_deleted, is_traced
from statewise._src.common.paths import Leaf
from statewise._src.core.state_data import StateData
from statewise.errors import StructureError

__all__ = [
    "check_concrete",
    "check_concrete_kinds",
    "check_model_arrays",
    "check_untraced",
]


def check_concrete(
    arrays: Iterable[Any],
    purpose: str,
    hint: str,
    *,
    subject: str = "This state",
    leaves: Sequence[Leaf] = (),
    kind: str | None = None,
    cause: BaseException | None = None,
) -> None:
    """Raises where an array is abstract.

    Args:
      arrays: the arrays.
      purpose: what their values are wanted for, `save`.
      hint: what to do instead.
      subject: what the arrays are of.
      leaves: the leaves to list.
      kind: the kind, where it is about one.
      cause: the exception that led here, if one did.

    Raises:
      StructureError: there are shapes, but no values.
    """
    if is_abstract(arrays):
        fact = f"{subject} is abstract: it has shapes but no values to {purpose}."
        raise StructureError(fact, leaves=leaves, kind=kind, hint=hint) from cause


def check_concrete_kinds(
    state: StateData, kinds: Iterable[str], purpose: str, hint: str, *, subject: str = "This state"
) -> None:
    """Raises where a kind of a state is abstract; for the arguments see `check_concrete`.

    Raises:
      StructureError: there are shapes, but no values.
    """
    for kind in kinds:
        check_concrete(state.part(kind).arrays, purpose, hint, kind=kind, subject=subject)


def check_untraced(arrays: Iterable[Any], purpose: str, hint: str, *, subject: str = "This state") -> None:
    """Raises where an array is being traced; for the arguments see `check_concrete`.

    Raises:
      StructureError: inside `jax.jit` there are no values.
    """
    if is_traced(arrays):
        raise StructureError(f"{subject} is being traced: inside jax.jit there are no values to {purpose}.", hint=hint)


def check_model_arrays(
    leaves: Iterable[tuple[Leaf, Sequence[Any]]], purpose: str, *, abstract: str | None, donated: str
) -> None:
    """Raises where leaves of a model have no values.

    Args:
      leaves: the leaves, each with its arrays.
      purpose: what the values are wanted for, `take`.
      abstract: the hint for an abstract model; None where one is welcome.
      donated: the hint for a model whose arrays a step has donated.

    Raises:
      StructureError: abstract or donated leaves, all of them.
    """
    leaves = list(leaves)
    if abstract is not None:
        without = [leaf for leaf, arrays in leaves if is_abstract(arrays)]
        if without:
            check_concrete([jax.ShapeDtypeStruct((), bool)], purpose, abstract, subject="The model", leaves=without)
    gone = [leaf for leaf, arrays in leaves if any(map(is_deleted, arrays))]
    if gone:
        raise StructureError(
            "The model's arrays are gone: they were taken with copy=False, and a step has donated them.",
            leaves=gone,
            hint=donated,
        )
