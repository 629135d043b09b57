"""Taking a model apart and putting it together again: NNX's split, merge and update, checked.

NNX trusts its caller here.  `nnx.merge` matches leaves by their sorted position, so that a part with one key
renamed lands on other leaves; `nnx.update` takes a 9x9 kernel into a 4x4 layer, and adds keys that it does not
know as attributes.  The functions here go by path and compare each leaf's type, shape and dtype; what disagrees
is listed in one error before anything is made or changed.

The graph definition that `split` gives is NNX's own with one thing added, what each leaf was, so that `merge` has
something to compare with.  It works wherever NNX's does: in `nnx.merge`, as a static argument, inside a pytree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.compare import MISSING, UNEXPECTED, LeafFacts, compare_leaf, note_of
from statewise._src.common.nnx_graph import (
    ONE,
    ArraySpec,
    ModelError,
    ModelGraph,
    arrays_of,
    is_abstract,
    is_deleted,
    make_leaf,
    raw_value,
    row_of,
    spec_of,
)
from statewise._src.common.paths import Leaf, Path, format_path
from statewise._src.common.problems import Problems
from statewise._src.common.write_values import put_values
from statewise._src.core.plan import Kinds
from statewise._src.inspect.select.new_values import fresh_values
from statewise._src.inspect.select.select import check_kinds, look
from statewise._src.plan.match import claim
from statewise.errors import StructureError

__all__ = ["merge", "split", "update"]


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """What belongs at a path of a model.

    Attributes:
      path: the leaf's first path.
      cls: the Variable's type; `jax.Array` for a raw array.
      specs: shape and dtype of each array in its value, the type of what is none; None where only the type of the leaf
        is known.
      structure: the structure of its value; None where only the type is known.
    """

    path: Path
    cls: type
    specs: tuple[Any, ...] | None
    structure: Any

    @property
    def leaf(self) -> Leaf:
        """The slot as a row of an error."""
        specs = [spec for spec in self.specs or () if isinstance(spec, ArraySpec)]
        return make_leaf(self.path, self.cls, specs, self.structure is not None and self.structure == ONE, None)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True)
class CheckedGraphDef(nnx.GraphDef[Any]):
    """NNX's graph definition, with what each leaf was when the model was split."""

    # Declared anew: NNX names the types of the first two by names that only its own module knows.
    nodes: list[Any]
    attributes: list[Any]
    num_leaves: int
    slots: tuple[Slot, ...] = dataclasses.field(repr=False)

    # A dataclass does not inherit the hash of the one it extends.
    def __hash__(self) -> int:
        return nnx.GraphDef.__hash__(self)


M = TypeVar("M")


def split(model: M, kinds: Kinds) -> tuple[nnx.GraphDef[M], dict[str, nnx.State[Any, Any]]]:
    """Splits a model into its graph definition and one part for each kind; each leaf is in exactly one part.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      kinds: the declaration.

    Returns:
      the graph definition, and the parts by the kinds' names, in their order: live Variables by path, as
      `nnx.split` gives them; a kind that claims nothing has an empty part.

    Raises:
      OverlapError: leaves that several kinds claim, all of them.
      UnclaimedError: leaves that no kind claims, all of them.
      DeclarationError: the kinds are none, or spell a path that is not there.
      StructureError: the model is none.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))
      >>> graphdef, parts = sw.split(model, kinds)
      >>> {kind: sorted(part) for kind, part in parts.items()}
      {'params': ['bias', 'scale'], 'rest': ['mean', 'var']}
      >>> sw.merge(graphdef, parts).mean.shape
      (3,)
    """
    check_kinds(kinds)
    found = look(model)
    flat: dict[str, list[Any]] = {name: [] for name in kinds}
    for path, leaf, name in zip(found.paths, found.leaves, claim(kinds, found), strict=True):
        flat[name].append((path, leaf))
    graphdef = CheckedGraphDef(
        nodes=found.graphdef.nodes,
        attributes=found.graphdef.attributes,
        num_leaves=found.graphdef.num_leaves,
        slots=_slots(found),
    )
    return graphdef, {name: nnx.from_flat_state(leaves) for name, leaves in flat.items()}


def _slots(found: ModelGraph) -> tuple[Slot, ...]:
    slots = []
    for path, leaf in zip(found.paths, found.leaves, strict=True):
        arrays, structure = arrays_of(raw_value(leaf))
        specs = tuple([_exact_spec(array) or type(array) for array in arrays])
        slots.append(Slot(path, compat.variable_type(leaf), specs, structure))
    return tuple(slots)


def _exact_spec(array: Any) -> ArraySpec | None:
    """A NumPy array's own dtype, float64 say, where `spec_of` tells what JAX would make of it."""
    spec = spec_of(array)
    return spec._replace(dtype=array.dtype) if spec and isinstance(array, (np.ndarray, np.generic)) else spec


def merge(
    graphdef: nnx.GraphDef[M],
    parts: Mapping[str, Mapping[Any, Any]] | Sequence[Mapping[Any, Any]] | nnx.State[Any, Any],
) -> M:
    """Makes a model from its graph definition and its parts, matched by path.

    Args:
      graphdef: what `split` gave.  NNX's own is taken too, but knows no shapes and dtypes to compare with.
      parts: the parts by name, a sequence of parts, or one `nnx.State`; of Variables or of raw arrays.

    Returns:
      a new model.  As with `nnx.merge`, it holds the very Variables that the parts hold: those of `split` are the
      old model's.  Parts of raw arrays make new ones.

    Raises:
      StructureError: leaves that are missing, unexpected, given twice, or of another type, shape or dtype than the
        model had; all of them.

    Example:
      >>> from flax import nnx
      >>> import statewise as sw
      >>> graphdef, parts = sw.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), sw.Kinds.standard())
      >>> del parts["params"]["bias"]
      >>> sw.merge(graphdef, parts)
      Traceback (most recent call last):
      statewise.errors.StructureError: The parts do not make up the model: 1 leaf differs.
        bias: Param(3,) float32  (missing from the parts)
        hint: graphdef, parts = sw.split(model, kinds)  # both of one model
    """
    if not isinstance(graphdef, nnx.GraphDef):
        raise ModelError(
            f"{type(graphdef).__name__} is no graph definition.", hint="graphdef, parts = sw.split(model, kinds)"
        )
    slots = graphdef.slots if isinstance(graphdef, CheckedGraphDef) else _slots_of_plain(graphdef)
    known = {slot.path: slot for slot in slots}
    problems = Problems()
    given: dict[Path, Any] = {}
    where: dict[Path, list[str]] = {}
    for name, part in _named_parts(parts):
        for path, leaf in _flat(part, known):
            given[path] = leaf
            where.setdefault(path, []).append(name)
    for path, leaf in given.items():
        if len(where[path]) > 1:
            problems.add(row_of(path, leaf), f"given in {' and '.join(where[path])}")
        _compare(problems, known, path, leaf, "parts")
    for slot in slots:
        if slot.path not in given:
            problems.add(slot.leaf, note_of(MISSING, "parts"))
    problems.raise_as(
        StructureError,
        "The parts do not make up the model: {n} leaves differ.",
        "graphdef, parts = sw.split(model, kinds)  # both of one model",
    )
    return nnx.unflatten(graphdef, [given[slot.path] for slot in slots])


def _slots_of_plain(graphdef: nnx.GraphDef[Any]) -> tuple[Slot, ...]:
    """The paths and types in NNX's own graph definition: of a model made from it, with nothing in its leaves."""
    # An array, since a raw leaf of None would be no leaf.
    _, flat = nnx.flatten(nnx.unflatten(graphdef, [np.zeros(())] * graphdef.num_leaves))
    return tuple(
        Slot(tuple(path), compat.variable_type(leaf), None, None)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
    )


def _named_parts(parts: Any) -> Iterator[tuple[str, Any]]:
    """Each part under a name: its kind, or its position."""
    if isinstance(parts, (nnx.State, nnx.FlatState)):
        yield "the state", parts
    elif isinstance(parts, Mapping):
        yield from ((str(name), part) for name, part in parts.items())
    elif isinstance(parts, (tuple, list)):
        yield from ((f"part {position}", part) for position, part in enumerate(parts))
    else:
        raise _no_state(parts, "sw.merge(graphdef, parts)  # as sw.split gave them")


def _no_state(thing: Any, hint: str) -> ModelError:
    return ModelError(f"{type(thing).__name__} is no state: leaves by path are.", hint=hint)


def _flat(part: Any, known: Mapping[Path, Any]) -> Iterator[tuple[Path, Any]]:
    """The leaves of a part by path: of a state, a nested dict, or a flat dict whose keys are paths."""
    if isinstance(part, nnx.FlatState):
        yield from ((tuple(path), leaf) for path, leaf in part)
    elif not isinstance(part, Mapping):
        raise _no_state(part, "an nnx.State, or a dict of arrays by path; nnx.state(model) makes one of a model")
    elif part and all(isinstance(key, tuple) for key in part) and not part.keys() & {path[0] for path in known}:
        yield from part.items()
    else:
        yield from _nested(part, (), known)


def _nested(part: Mapping[Any, Any], at: Path, known: Mapping[Path, Any]) -> Iterator[tuple[Path, Any]]:
    for key, value in part.items():
        path = (*at, key)
        # A Variable may hold a dict of arrays, which in a state of raw values looks like more path.
        if isinstance(value, Mapping) and path not in known:
            yield from _nested(value, path, known)
        else:
            yield path, nnx.to_pure_dict(value) if isinstance(value, nnx.State) else value


def _compare(problems: Problems, known: Mapping[Path, Slot], path: Path, leaf: Any, found_in: str) -> None:
    """Adds what keeps a leaf from going where its path says."""
    slot = known.get(path)
    if slot is None:
        problems.add(row_of(path, leaf), _why_unexpected(path, known))
        return
    if compat.reference(leaf):
        problems.add(slot.leaf, f"is a reference in the {found_in}")
        return
    facts = _facts(leaf)
    expected = LeafFacts(slot.cls, slot.specs or (), slot.structure)
    if slot.specs is None:
        facts = facts._replace(arrays=(), structure=None)
    else:
        # NumPy's float64 comes back from JAX as float32: that is not a change, the reverse is one.
        pairs = zip(expected.arrays, facts.arrays, strict=False)
        own = tuple(ours._replace(dtype=theirs.dtype) if _is_narrowed(ours, theirs) else ours for ours, theirs in pairs)
        expected = expected._replace(arrays=own + expected.arrays[len(own) :])
    mismatches = compare_leaf(expected, facts)
    if mismatches:
        problems.add(slot.leaf, note_of(mismatches, found_in))


def _facts(leaf: Any) -> LeafFacts:
    arrays, structure = arrays_of(raw_value(leaf))
    specs = tuple([_exact_spec(array) or type(array) for array in arrays])
    # A raw array may become a Variable of any type.
    type_ = compat.variable_type(leaf) if compat.is_variable(leaf) else None
    return LeafFacts(type_, specs, structure, donated=any(map(is_deleted, arrays)))


def _is_narrowed(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, type) or isinstance(theirs, type) or not isinstance(ours.dtype, np.dtype):
        return False
    return bool(jax.dtypes.canonicalize_dtype(ours.dtype) == theirs.dtype)


def _why_unexpected(path: Path, known: Mapping[Path, Any]) -> str:
    text = format_path(path)
    same = next((other for other in known if format_path(other) == text), None)
    note = note_of(UNEXPECTED, "", expected_in="model")
    return f"{note}, whose path is {same!r}: this one is {path!r}" if same else note


def update(model: object, state: Mapping[Any, Any]) -> None:
    """Puts arrays into a model, by path; all of them, or none if one does not fit.

    Only values are put: a Variable's type and metadata stay as they are in the model.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      state: an `nnx.State`, a nested dict, or a flat dict from paths (tuples) to leaves; of Variables or of raw
        arrays.  It may hold some of the model's leaves only.

    Raises:
      StructureError: leaves that the model does not have, or has with another type, shape or dtype; numbers that its
        dtype would lose; all of them.  Nothing of the model is changed then.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import statewise as sw
      >>> model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      >>> sw.update(model, {"bias": jnp.ones(4)})
      >>> sw.update(model, {"kernel": jnp.ones((9, 9))})
      Traceback (most recent call last):
      statewise.errors.StructureError: The state does not fit the model: 1 leaf differs.
        kernel: Param(4, 4) float32  (is (9, 9) in the state)
        hint: print(sw.explain(model, ...))  # every path, type, shape and dtype of the model
    """
    found = look(model)
    known = {slot.path: slot for slot in _slots(found)}
    live = dict(zip(found.paths, found.leaves, strict=True))
    given = dict(_flat(state, known))
    problems = Problems()
    for path, leaf in given.items():
        tie = "" if path in known else _tie(model, path, live)
        if tie:
            problems.add(row_of(path, leaf), tie)
            continue
        count = len(problems)
        _compare(problems, known, path, leaf, "state")
        if len(problems) == count and _is_abstract(leaf) and not _is_abstract(live[path]):
            problems.add(row_of(path, leaf), "a shape and dtype only: the model has an array")
    problems.raise_as(
        StructureError,
        "The state does not fit the model: {n} leaves differ.",
        "print(sw.explain(model, ...))  # every path, type, shape and dtype of the model",
    )
    put_values(model, found.leaves, list(fresh_values(given, live)))


def _is_abstract(leaf: Any) -> bool:
    return is_abstract(arrays_of(raw_value(leaf))[0])


def _tie(model: Any, path: Path, live: Mapping[Path, Any]) -> str:
    """Returns a note where a path reaches a leaf that goes by another path: weights that are tied in the model."""
    at = model
    for key in path:
        at = getattr(at, key, None) if isinstance(key, str) and hasattr(at, key) else _item(at, key)
    for first, leaf in live.items():
        # An nnx.List has its items as attributes too: "0" for 0 is another key, and no tie.
        if leaf is at and isinstance(leaf, nnx.Variable) and format_path(first) != format_path(path):
            return f"tied: the same leaf as {format_path(first)}, which names it"
    return ""


def _item(thing: Any, key: Any) -> Any:
    try:
        return thing[key]
    except (TypeError, KeyError, IndexError):
        return None
