"""Checks that states and models have values to work with: that they are not abstract, traced, or donated.

Each error states the same fact in the same words wherever it is raised, and what the values are needed for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from statewise._src.common.nnx_graph import is_abstract, is_deleted, is_traced
from statewise._src.common.paths import Leaf
from statewise._src.core.state_data import StateData, check_fits, check_not_donated
from statewise.errors import StructureError

__all__ = ["check_concrete", "check_model_arrays", "check_untraced", "check_usable"]

_ABSTRACT = "{} is abstract: it has shapes but no values to {}."


def check_concrete(
    arrays: Iterable[object],
    purpose: str,
    hint: str,
    *,
    subject: str = "This state",
    leaves: Sequence[Leaf] = (),
    kind: str | None = None,
    cause: BaseException | None = None,
) -> None:
    """Checks that no array is abstract.

    Args:
      arrays: the arrays.
      purpose: what their values are needed for: `save`.
      hint: what to do instead.
      subject: what the arrays belong to.
      leaves: the leaves to list.
      kind: the kind, if all arrays are of one kind.
      cause: the exception that led here, if one did.

    Raises:
      StructureError: there are shapes, but no values.
    """
    if is_abstract(arrays):
        raise StructureError(_ABSTRACT.format(subject, purpose), leaves=leaves, kind=kind, hint=hint) from cause


def check_usable(
    state: StateData,
    kinds: Sequence[str],
    purpose: str,
    hint: str,
    *,
    written: Sequence[str] = (),
    fits: bool = True,
    subject: str = "This state",
) -> None:
    """Checks that kinds of a state can be read; for the other arguments see `check_concrete`.

    Args:
      state: the state.
      kinds: the kinds.
      purpose: what their values are needed for.
      hint: what to do instead if they are abstract.
      written: further kinds, which must not have been donated.
      fits: whether their shapes and dtypes must be those of the plan.
      subject: what the state is called.

    Raises:
      StructureError: arrays were donated, do not fit the plan, or are shapes without values.
    """
    check_not_donated(state, (*kinds, *written))
    if fits:
        check_fits(state, kinds)
    for kind in kinds:
        check_concrete(state.part(kind).arrays, purpose, hint, kind=kind, subject=subject)


def check_untraced(arrays: Iterable[object], purpose: str, hint: str, *, subject: str = "This state") -> None:
    """Checks that no array is being traced; for the arguments see `check_concrete`.

    Raises:
      StructureError: inside `jax.jit` there are no values.
    """
    if is_traced(arrays):
        raise StructureError(f"{subject} is being traced: inside jax.jit there are no values to {purpose}.", hint=hint)


def check_model_arrays(
    leaves: Iterable[tuple[Leaf, Sequence[object]]], purpose: str, *, abstract: str | None, donated: str
) -> None:
    """Checks that the leaves of a model have values.

    Args:
      leaves: the leaves, each with its arrays.
      purpose: what the values are needed for: `take`.
      abstract: the hint for an abstract model; None if the model may be abstract.
      donated: the hint for a model whose arrays a step has donated.

    Raises:
      StructureError: abstract or donated leaves, all of them.
    """
    leaves = list(leaves)  # may be an iterator, and is read twice
    without = [leaf for leaf, arrays in leaves if abstract is not None and is_abstract(arrays)]
    if without:
        raise StructureError(_ABSTRACT.format("The model", purpose), leaves=without, hint=abstract)
    deleted = [leaf for leaf, arrays in leaves if any(map(is_deleted, arrays))]
    if deleted:
        fact = "The model's arrays no longer exist: they were taken with copy=False, and a step has donated them."
        raise StructureError(fact, leaves=deleted, hint=donated)
