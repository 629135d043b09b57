"""A model split into parts and put together again: NNX's split, merge and update, checked.

NNX trusts its caller here.  `nnx.merge` matches leaves by their sorted position, so that a part with one key
renamed is merged into other leaves; `nnx.update` takes a 9x9 kernel into a 4x4 layer, and adds keys that it does not
know as attributes.  The functions here go by path and compare each leaf's type, shape and dtype; all mismatches
are listed in one error before anything is made or changed.

The graph definition that `split` returns is NNX's own with one addition, the facts of each leaf, so that `merge` has
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
from statewise._src.common.graphdef import called
from statewise._src.common.nested_state import nested
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
from statewise._src.common.variable_forms import empty_leaves, with_references
from statewise._src.common.write_values import put_values
from statewise._src.core.plan import Kinds
from statewise._src.inspect.select.new_values import fresh_values
from statewise._src.inspect.select.select import check_kinds, graph_of
from statewise._src.plan.match import claim
from statewise.errors import StructureError

__all__ = ["merge", "split", "update"]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True)
class CheckedGraphDef(nnx.GraphDef[Any]):
    """NNX's graph definition, with the path and the facts of each leaf when the model was split."""

    # Declared again: NNX annotates the first two with names that only its own module can resolve.
    nodes: list[Any]
    attributes: list[Any]
    num_leaves: int
    facts: tuple[tuple[Path, LeafFacts], ...] = dataclasses.field(repr=False)

    # A dataclass does not inherit the hash of the one it extends.
    def __hash__(self) -> int:
        return nnx.GraphDef.__hash__(self)


M = TypeVar("M")


def split(model: M, kinds: Kinds) -> tuple[nnx.GraphDef[M], dict[str, compat.NestedState]]:
    """Splits a model into its graph definition and one part for each kind; each leaf is in exactly one part.

    Args:
      model: a module, a tuple or list of objects, or a dict of them by name; concrete, abstract or traced.
      kinds: the declaration.

    Returns:
      the graph definition, and the parts by the kinds' names, in their order: live Variables by path, as
      `nnx.split` returns them; a kind that claims nothing has an empty part.

    Raises:
      OverlapError: leaves that several kinds claim, all of them.
      UnclaimedError: leaves that no kind claims, all of them.
      DeclarationError: `kinds` is not a `Kinds`, or has a path that does not exist.
      StructureError: `model` is not a module or another object with leaves.

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
    graph = graph_of(model)
    flat: dict[str, list[Any]] = {name: [] for name in kinds}
    for path, leaf, name in zip(graph.paths, graph.leaves, claim(kinds, graph), strict=True):
        flat[name].append((path, leaf))
    plain, facts = graph.graphdef, tuple(_facts_by_path(graph).items())
    graphdef = CheckedGraphDef(nodes=plain.nodes, attributes=plain.attributes, num_leaves=plain.num_leaves, facts=facts)
    return graphdef, {name: nested(leaves) for name, leaves in flat.items()}


def _facts_by_path(graph: ModelGraph) -> dict[Path, LeafFacts]:
    leaves = zip(graph.paths, graph.leaves, strict=True)
    return {path: _facts(leaf, compat.variable_type(leaf)) for path, leaf in leaves}


def _facts(leaf: Any, type_: type | None) -> LeafFacts:
    arrays, structure = arrays_of(raw_value(leaf))
    return LeafFacts(type_, tuple([_exact_spec(array) or type(array) for array in arrays]), structure)


def _arrays(leaf: Any) -> list[Any]:
    return arrays_of(raw_value(leaf))[0]


def _exact_spec(array: Any) -> ArraySpec | None:
    """Returns a NumPy array's own dtype, such as float64, where `spec_of` returns the dtype that JAX makes of it."""
    spec = spec_of(array)
    return spec._replace(dtype=array.dtype) if spec and isinstance(array, (np.ndarray, np.generic)) else spec


def merge(
    graphdef: nnx.GraphDef[M],
    parts: Mapping[str, Mapping[Any, Any]] | Sequence[Mapping[Any, Any]] | compat.NestedState,
) -> M:
    """Makes a model from its graph definition and its parts, matched by path.

    Args:
      graphdef: the graph definition that `split` returned.  NNX's own also works, but has no shapes and dtypes to
        compare with.
      parts: the parts by name, a sequence of parts, or one part that has all leaves, as `nnx.state` returns it; each
        an `nnx.State` or a nested dict, of Variables or of raw arrays.

    Returns:
      a new model.  As with `nnx.merge`, it holds the same Variables as the parts: those of `split` are the
      old model's.  Parts of raw arrays make new ones.

    Raises:
      StructureError: leaves that are missing, unexpected, given twice, or of another type, shape or dtype than in the
        model; all of them.

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
            f"{type(graphdef).__name__} is not a graph definition.", hint="graphdef, parts = sw.split(model, kinds)"
        )
    known = dict(graphdef.facts if isinstance(graphdef, CheckedGraphDef) else _types_of_plain(graphdef))
    problems = Problems()
    given: dict[Path, Any] = {}
    where: dict[Path, list[str]] = {}
    for name, part in _named_parts(parts, known):
        for path, leaf in _flat(part, known):
            # The last one wins, but a leaf that is given twice is an error below.
            given[path] = leaf
            where.setdefault(path, []).append(name)
    for path, leaf in given.items():
        if len(where[path]) > 1:
            problems.add(row_of(path, leaf), f"given in {' and '.join(where[path])}")
        _compare(problems, known, path, leaf, "parts")
    for path, expected in known.items():
        if path not in given:
            problems.add(_leaf_of(path, expected), note_of(MISSING, "parts"))
    problems.raise_as(
        StructureError,
        "The parts do not make up the model: {n} leaves differ.",
        "graphdef, parts = sw.split(model, kinds)  # both of one model",
    )
    # In the order of the graph definition: NNX matches leaves by position.
    return nnx.unflatten(graphdef, with_references(graphdef, [given[path] for path in known]))


def _types_of_plain(graphdef: nnx.GraphDef[Any]) -> Iterator[tuple[Path, LeafFacts]]:
    """Yields the paths and types in NNX's own graph definition, read from a model made with placeholders as leaves."""
    for path, leaf in empty_leaves(graphdef):
        yield path, LeafFacts(compat.variable_type(leaf), ())


def _named_parts(parts: Any, known: Mapping[Path, LeafFacts]) -> Iterator[tuple[str, Any]]:
    """Yields each part with a name: its kind, or its position."""
    if isinstance(parts, nnx.FlatState) or (isinstance(parts, Mapping) and _is_one_part(parts, known)):
        yield "the state", parts
    elif isinstance(parts, Mapping):
        yield from ((str(name), part) for name, part in parts.items())
    elif isinstance(parts, (tuple, list)):
        yield from ((f"part {position}", part) for position, part in enumerate(parts))
    else:
        raise _not_a_state(parts, "sw.merge(graphdef, parts)  # the results of sw.split")


def _is_one_part(parts: Mapping[Any, Any], known: Mapping[Path, LeafFacts]) -> bool:
    """Returns whether a mapping is one nested state, and not parts by name."""
    if compat.is_nnx_state(parts):
        return True
    # A dict may be either.  Read in the wrong way, each of its paths has one key too many, or lacks one.
    as_one = sum(path in known for path, _ in _flat(parts, known))
    as_parts = sum(
        path in known for part in parts.values() if isinstance(part, Mapping) for path, _ in _flat(part, known)
    )
    return as_one > as_parts


def _not_a_state(value: object, hint: str) -> ModelError:
    return ModelError(f"{type(value).__name__} is not a state, which holds leaves by path.", hint=hint)


def _flat(part: Any, known: Mapping[Path, LeafFacts]) -> Iterator[tuple[Path, Any]]:
    """Yields the leaves of a part by path: of a state, a nested dict, or a flat dict whose keys are paths."""
    if isinstance(part, nnx.FlatState):
        yield from ((tuple(path), leaf) for path, leaf in part)
    elif not isinstance(part, Mapping):
        code = called("nnx.state", "model")
        raise _not_a_state(part, f"an nnx.State, or a dict of arrays by path; {code} makes one of a model")
    # A key that is a tuple may also be a key of the model, in an nnx.Dict.
    elif part and all(isinstance(key, tuple) for key in part) and not part.keys() & {path[0] for path in known}:
        yield from part.items()
    else:
        yield from _nested(part, (), known)


def _nested(part: Mapping[Any, Any], above: Path, known: Mapping[Path, LeafFacts]) -> Iterator[tuple[Path, Any]]:
    for key, value in part.items():
        path = (*above, key)
        # A Variable may hold a dict of arrays, which in a state of raw values looks like more path.
        if isinstance(value, Mapping) and path not in known:
            yield from _nested(value, path, known)
        else:
            yield path, nnx.to_pure_dict(value) if compat.is_nnx_state(value) else value


def _leaf_of(path: Path, facts: LeafFacts) -> Leaf:
    specs = [spec for spec in facts.arrays if isinstance(spec, ArraySpec)]
    # Equal, not identical: a graph definition may have been pickled.
    return make_leaf(path, facts.type, specs, facts.structure is not None and facts.structure == ONE, None)


def _compare(problems: Problems, known: Mapping[Path, LeafFacts], path: Path, leaf: Any, found_in: str) -> None:
    """Adds what prevents a leaf from being put at its path."""
    expected = known.get(path)
    if expected is None:
        problems.add(row_of(path, leaf), _why_unexpected(path, known))
        return
    if compat.reference(leaf) and not compat.is_variable(leaf):
        problems.add(_leaf_of(path, expected), f"is a reference in the {found_in}")
        return
    # A raw array may become a Variable of any type.
    facts = _facts(leaf, compat.variable_type(leaf) if compat.is_variable(leaf) else None)
    facts = facts._replace(donated=any(map(is_deleted, _arrays(leaf))))
    if expected.structure is None:  # only the type is known
        facts = facts._replace(arrays=(), structure=None)
    else:
        # JAX returns NumPy's float64 as float32, so that is not a difference; the reverse is.
        pairs = zip(expected.arrays, facts.arrays, strict=False)
        # The number of arrays may differ, which the comparison then reports.
        own = tuple(ours._replace(dtype=theirs.dtype) if _is_narrowed(ours, theirs) else ours for ours, theirs in pairs)
        expected = expected._replace(arrays=own + expected.arrays[len(own) :])
    mismatches = compare_leaf(expected, facts)
    if mismatches:
        problems.add(_leaf_of(path, known[path]), note_of(mismatches, found_in))


def _is_narrowed(ours: ArraySpec | type, theirs: ArraySpec | type) -> bool:
    if isinstance(ours, type) or isinstance(theirs, type) or not isinstance(ours.dtype, np.dtype):
        return False
    return bool(jax.dtypes.canonicalize_dtype(ours.dtype) == theirs.dtype)


def _why_unexpected(path: Path, known: Mapping[Path, LeafFacts]) -> str:
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
        arrays.  It may hold only some of the model's leaves.

    Raises:
      StructureError: leaves that the model does not have, or has with another type, shape or dtype; numbers that
        casting to the model's dtype would lose; all of them.  The model is then unchanged.

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
    graph = graph_of(model)
    known = _facts_by_path(graph)
    live = dict(zip(graph.paths, graph.leaves, strict=True))
    given = dict(_flat(state, known))
    problems = Problems()
    for path, leaf in given.items():
        tie = "" if path in known else _tie(model, path, live)
        if tie:
            problems.add(row_of(path, leaf), tie)
            continue
        # Only a leaf that fits otherwise is reported as abstract.
        count = len(problems)
        _compare(problems, known, path, leaf, "state")
        if len(problems) == count and is_abstract(_arrays(leaf)) and not is_abstract(_arrays(live[path])):
            problems.add(row_of(path, leaf), "only a shape and dtype: the model has an array")
    problems.raise_as(
        StructureError,
        "The state does not fit the model: {n} leaves differ.",
        "print(sw.explain(model, ...))  # every path, type, shape and dtype of the model",
    )
    put_values(model, graph.leaves, list(fresh_values(given, live)))


def _tie(model: Any, path: Path, live: Mapping[Path, Any]) -> str:
    """Returns a note if a path reaches a leaf that is listed under another path: weights that are tied in the model."""
    node = model
    for key in path:
        node = getattr(node, key, None) if isinstance(key, str) and hasattr(node, key) else _item(node, key)
    for first, leaf in live.items():
        # An nnx.List has its items as attributes too: "0" for 0 is another key, and not a tie.
        if leaf is node and isinstance(leaf, nnx.Variable) and format_path(first) != format_path(path):
            return f"tied: the same leaf as {format_path(first)}; use that path"
    return ""


def _item(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except (TypeError, KeyError, IndexError):
        return None
