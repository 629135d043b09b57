"""A scan over a stacked module: one layer's program, run over the arrays of many.

One layer is traced, on a copy that is rebuilt from one slice of each leaf.  What the trace returns unchanged is neither
stacked nor carried.  What the layer wrote is returned by the scan, one slice for each layer, or carried if all layers
share it.  What the layer made (above all, what it sows) has no slices before, and one for each layer afterwards: it is
stacked, and put into the module at the layer's path, as `nnx.scan` does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from statewise._src.common import compat
from statewise._src.common.compat import jaxprs
from statewise._src.common.graphdef import called
from statewise._src.common.narrowing import check_given
from statewise._src.common.nnx_graph import (
    ONE,
    ArraySpec,
    ModelGraph,
    arrays_of,
    check_plain,
    raw_value,
    read_graph,
    rebuild,
    row_of,
    spec_of,
    value_of,
)
from statewise._src.common.paths import Leaf, Path, format_dtype, format_shape
from statewise._src.common.problems import Problems
from statewise._src.common.variable_forms import store
from statewise._src.core.plan import Kinds
from statewise._src.plan.kind import Kind
from statewise._src.plan.leaf_specs import is_sown
from statewise._src.plan.match import claim
from statewise._src.step.arguments import parameters_of
from statewise._src.step.effects import Effects, effects_of
from statewise._src.step.function import check_function
from statewise._src.step.graft import graft
from statewise._src.step.outside_writes import check_written_arguments, plain_variables
from statewise._src.step.passed_objects import Passed
from statewise._src.step.trace import check_not_model, check_output
from statewise.errors import StructureError

__all__ = ["count_layers", "replaced", "scan_module"]


def scan_module(fn: Callable[..., Any], module: Any, x: Any, shared: Any, scan: Callable[..., Any]) -> Any:
    """Runs the layers of a module; see `scan_layers`.  `scan` is `jax.lax.scan` with its options."""
    check_function(fn, "scan_layers")
    stack = _Stack.of(module, shared)
    layers = stack.count()
    layer, x = _traced(fn, stack, x)
    layer.check(stack)
    carried = layer.carried(stack)
    # Arrays by number: stacked ones that are read are scanned, shared ones that are written are carried; the rest are
    # constants of the loop.
    arrays = [array for _, array, _ in stack.flat]
    read = zip(stack.flat, layer.effects.read, strict=False)
    sliced = [number for number, ((_, _, many), is_read) in enumerate(read) if many and is_read]
    outputs = [slot for slot in layer.slots if slot.after is not None]

    def run_layer(carry: Any, slices: Any) -> Any:
        values, x = carry
        # The outputs come first, then the written and new arrays in the order of `outputs`.
        results = iter(layer.run(replaced(arrays, (sliced, slices), (carried, values)), x))
        x = jax.tree.unflatten(layer.out_tree, itertools.islice(results, layer.out_tree.num_leaves))
        written = list(zip(outputs, results, strict=True))
        new = {slot.before: array for slot, array in written if slot.before in carried}
        stacked = [array for slot, array in written if slot.before not in carried]
        return ([new[number] for number in carried], x), stacked

    start = [arrays[number] for number in carried], x
    (values, x), returned = scan(run_layer, start, [arrays[number] for number in sliced], length=layers)
    # An array is unchanged, was carried, or comes stacked from the scan.
    new, last = iter(returned), dict(zip(carried, values, strict=True))
    after = []
    for slot in layer.slots:
        if slot.after is None and slot.before is not None:
            after.append(arrays[slot.before])
        else:
            after.append(last[slot.before] if slot.before in last else next(new))
    _write(stack, layer, after)
    return x


def replaced(arrays: Sequence[Any], *changes: tuple[Sequence[int], Iterable[Any]]) -> list[Any]:
    """Returns the arrays with some of them replaced: by number, and the new values in the same order."""
    after = list(arrays)
    for numbers, values in changes:
        for number, value in zip(numbers, values, strict=True):
            after[number] = value
    return after


@dataclasses.dataclass(frozen=True)
class _Stack:
    """The stacked module: its leaves, their arrays, and which of them have a slice for each layer."""

    module: Any
    graph: ModelGraph
    arrays: list[list[Any]]
    structures: list[Any]
    stacked: list[bool]

    @classmethod
    def of(cls, module: Any, shared: Any) -> _Stack:
        kinds = Kinds(layers=Kind(...)) if shared is None else Kinds(layers=Kind(...), shared=Kind(shared))
        graph = read_graph((module,))
        held = [arrays_of(raw_value(leaf)) for leaf in graph.leaves]
        check_given(
            (row_of(path, leaf), array, spec.dtype)
            for path, leaf, (arrays, _) in zip(graph.paths, graph.leaves, held, strict=True)
            for array in arrays
            if not isinstance(array, jax.Array) and (spec := spec_of(array)) is not None
        )
        arrays = [[jnp.asarray(array) if spec_of(array) else array for array in arrays] for arrays, _ in held]
        # What an earlier layer, or an earlier scan, has sown belongs to each layer, whatever the filter matches.
        stacked = [
            kind == "layers" or is_sown(compat.variable_type(leaf))
            for kind, leaf in zip(claim(kinds, graph), graph.leaves, strict=True)
        ]
        return cls(module, graph, arrays, [structure for _, structure in held], stacked)

    def row(self, number: int) -> Leaf:
        """Returns a leaf as data."""
        return row_of(self.graph.paths[number], self.graph.leaves[number])

    @functools.cached_property
    def flat(self) -> list[tuple[int, Any, bool]]:
        """Returns all arrays, each with the number of its leaf, and whether it has a slice for each layer."""
        leaves = enumerate(zip(self.arrays, self.stacked, strict=True))
        return [(number, array, many) for number, (arrays, many) in leaves for array in arrays]

    def count(self) -> int:
        """Returns the number of layers."""
        return count_layers([(self.row(number), array, many) for number, array, many in self.flat], None)

    def layer_arrays(self) -> list[Any]:
        """Returns the shapes and dtypes of one layer's arrays."""
        return [jax.ShapeDtypeStruct(array.shape[many:], array.dtype) for _, array, many in self.flat]

    def values(self, flat: Sequence[Any]) -> list[Any]:
        """Returns the leaves' values that consist of these arrays."""
        left = iter(flat)
        return [
            value_of(list(itertools.islice(left, len(arrays))), structure)
            for arrays, structure in zip(self.arrays, self.structures, strict=True)
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """One array of a layer after the call.

    Attributes:
      leaf: the number of the leaf that holds it, among the leaves after the call.
      before: its number among the arrays before the call; None if it is new.
      after: its shape and dtype; None if it is unchanged.
    """

    leaf: int
    before: int | None
    after: ArraySpec | None


@dataclasses.dataclass(frozen=True)
class _After:
    """The leaves of a layer after the call; static.

    Attributes:
      graphdef: of the layer.
      paths: of the leaves.
      origins: the number that each leaf had before; None for one that the layer made.
      structures: of their values.
    """

    graphdef: Any
    paths: tuple[Path, ...]
    origins: tuple[int | None, ...]
    structures: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Layer:
    """One layer's program, traced."""

    name: str
    call: Callable[[Sequence[Any], Any], list[Any]]
    effects: Effects
    out_tree: Any
    after: _After
    slots: list[_Slot]

    def run(self, values: Sequence[Any], x: Any) -> list[Any]:
        """Returns the outputs and the arrays that are written or new."""
        if compat.jit_is_disabled():  # the user wants to step through the function itself
            return list(itertools.compress(self.call(values, x), self.effects.used))
        return self.effects.run([*values, *jax.tree.leaves(x)])

    def check(self, stack: _Stack) -> None:
        """Checks that the layer does not remove leaves or change the shape or dtype of shared ones."""
        problems = Problems()
        # Leaves that no leaf of the layer afterwards comes from: gone, or another Variable is at the same path.
        for number in set(range(len(stack.arrays))) - set(self.after.origins):
            if stack.graph.paths[number] not in self.after.paths:
                if stack.arrays[number]:  # otherwise nothing is lost: nothing was sown yet, for example
                    problems.add(stack.row(number), "removed")
            elif not stack.stacked[number]:
                problems.add(stack.row(number), "replaced by another Variable")
        for number, (origin, structure) in enumerate(zip(self.after.origins, self.after.structures, strict=True)):
            if origin is None or stack.stacked[origin] or not stack.arrays[origin]:
                continue
            specs = [slot.after for slot in self.slots if slot.leaf == number and slot.after]
            if structure != stack.structures[origin]:
                problems.add(stack.row(origin), "becomes a value of another structure")
            elif any(spec not in map(spec_of, stack.arrays[origin]) for spec in specs):
                shown = ", ".join(f"{format_shape(spec.shape)} {format_dtype(spec.dtype)}" for spec in specs)
                problems.add(stack.row(origin), f"becomes {shown}")
        problems.raise_as(
            StructureError,
            f"{self.name} removes leaves of its layer, or changes what all layers share.",
            "assign a value of the leaf's own shape and dtype: leaf[...] = value.astype(leaf.dtype)\n"
            "if a layer removes a leaf, remove it from all of them: nnx.pop(layers, filter)  # before the scan",
        )

    def carried(self, stack: _Stack) -> list[int]:
        """Returns the numbers of the arrays that are carried from layer to layer: shared ones that are written."""
        written = [slot.before for slot in self.slots if slot.after is not None and slot.before is not None]
        return [number for number in written if not stack.flat[number][2]]


def _traced(fn: Callable[..., Any], stack: _Stack, x: Any) -> tuple[_Layer, Any]:
    """Traces one layer; also returns x, cast to the dtype that the layer returns if x has a weak type."""
    name = getattr(fn, "__name__", type(fn).__name__)
    _check_written_x(fn, stack, x, name)
    box: dict[str, Any] = {}

    def call(values: Sequence[Any], x: Any) -> list[Any]:
        (layer,) = rebuild(stack.graph.graphdef, stack.values(values), several=False)
        before = read_graph((layer,))
        with plain_variables(fn, (layer,), name):
            out = fn(layer, x)
        check_not_model(out, before.leaves, name)
        leaves, box["out_tree"] = jax.tree.flatten(out)
        check_output(leaves, name)
        after = read_graph((layer,))
        check_plain(after, name)
        held = [arrays_of(raw_value(leaf)) for leaf in after.leaves]
        box["after"] = _after(before, after, [structure for _, structure in held])
        return [*leaves, *(jnp.asarray(array) for arrays, _ in held for array in arrays)]

    # Without compilation a loop unrolls, and every leaf that went through one would look written.
    with jax.disable_jit(False):
        closed = jax.make_jaxpr(call)(stack.layer_arrays(), x)
        given, treedef = jax.tree.flatten(x)
        outputs = box["out_tree"].num_leaves
        # `lax.scan` needs a carry of fixed type: a weakly typed x takes the dtype of the first layer's output.
        settled = [
            jnp.asarray(array, new.dtype) if getattr(jax.typeof(array), "weak_type", False) else array
            for array, new in zip(given, jaxprs.output_types(closed)[:outputs], strict=False)
        ]
        if len(given) == outputs and any(
            jax.typeof(new).dtype != jax.typeof(old).dtype for new, old in zip(settled, given, strict=True)
        ):
            x = jax.tree.unflatten(treedef, settled)
            closed = jax.make_jaxpr(call)(stack.layer_arrays(), x)
    after: _After = box["after"]
    slots = _slots(stack, after, jaxprs.output_types(closed)[outputs:])
    tracked = [(outputs + index, slot.before) for index, slot in enumerate(slots) if slot.before is not None]
    effects = effects_of(closed, tracked)
    slots = [
        slot if used else dataclasses.replace(slot, after=None)
        for slot, used in zip(slots, effects.used[outputs:], strict=True)
    ]
    return _Layer(name, call, effects, box["out_tree"], after, slots), x


def _check_written_x(fn: Callable[..., Any], stack: _Stack, x: Any, name: str) -> None:
    """Checks that a layer returns the NNX objects in `x` that it writes: otherwise the writes would be lost."""
    if not Passed((x,), {}).objects:
        return
    box: dict[str, Passed] = {}

    def call(values: Sequence[Any], x: Any) -> list[Any]:
        (layer,) = rebuild(stack.graph.graphdef, stack.values(values), several=False)
        passed = box["passed"] = Passed((x,), {})
        with plain_variables(fn, (layer,), name):
            return passed.after(fn(layer, x))

    with jax.disable_jit(False):
        closed = jax.make_jaxpr(call)(stack.layer_arrays(), x)
    # The arrays of `x` follow those of the layer among the inputs.
    passed, before = box["passed"], len(stack.flat)
    tracked = [(index, before + number) for index, (_, number) in enumerate(passed.unclear)]
    effects = effects_of(closed, tracked)
    names = [parameter.name for parameter in parameters_of(fn) or ()]
    shown = names[1] if len(names) > 1 else "x"
    check_written_arguments(passed.lost(effects.written), fn, 1, lambda place: shown, name, False)


def _after(before: ModelGraph, after: ModelGraph, structures: Sequence[Any]) -> _After:
    # A Variable keeps its identity; a raw array is recognized by its path.
    def key(path: Path, leaf: Any) -> Any:
        return id(leaf) if isinstance(leaf, nnx.Variable) else path

    number_of = {key(*pair): number for number, pair in enumerate(zip(before.paths, before.leaves, strict=True))}
    origins = tuple(number_of.get(key(*pair)) for pair in zip(after.paths, after.leaves, strict=True))
    return _After(after.graphdef, after.paths, origins, tuple(structures))


def _slots(stack: _Stack, after: _After, avals: Sequence[Any]) -> list[_Slot]:
    # The number of a leaf's first array among all arrays of the layer.
    starts = list(itertools.accumulate(map(len, stack.arrays), initial=0))
    left, slots = iter(avals), []
    for leaf, (origin, structure) in enumerate(zip(after.origins, after.structures, strict=True)):
        same = origin is not None and structure == stack.structures[origin]  # otherwise all arrays of the leaf are new
        for position in range(1 if structure is ONE else structure.num_leaves):
            aval = next(left)
            before = starts[origin] + position if origin is not None and same else None
            slots.append(_Slot(leaf, before, ArraySpec(aval.shape, aval.dtype)))
    return slots


def _write(stack: _Stack, layer: _Layer, arrays: Sequence[Any]) -> None:
    """Writes the new values, and what the layers made, to the module."""
    after, left = layer.after, iter(zip(layer.slots, arrays, strict=True))
    values, grafted = [], []
    for path, origin, structure in zip(after.paths, after.origins, after.structures, strict=True):
        own = [next(left) for _ in range(1 if structure is ONE else structure.num_leaves)]
        value = value_of([array for _, array in own], structure)
        # New, or moved to another path: the module needs its container too, not only its value.
        if origin is None or path != stack.graph.paths[origin]:
            grafted.append(path)
        if origin is None:
            values.append(value)
            continue
        leaf = stack.graph.leaves[origin]
        changed = structure != stack.structures[origin] or any(slot.after is not None for slot, _ in own)
        if changed and isinstance(leaf, nnx.Variable):
            store(leaf, value)
        elif changed:
            grafted.append(path)
        values.append(leaf if isinstance(leaf, nnx.Variable) else value)
    if grafted:
        (copy,) = rebuild(after.graphdef, values, several=False)
        graft(stack.module, copy, grafted)


def count_layers(rows: Sequence[tuple[Leaf, Any, bool]], shapes: Sequence[tuple[int, ...]] | None) -> int:
    """Returns the number of layers; lists every leaf that has another number, or no axis for them.

    Args:
      rows: each array with its leaf, and whether it is stacked.
      shapes: the shape of each in one layer; None if unknown.
    """
    counts: list[int] = []
    problems = Problems()
    for number, (leaf, array, many) in enumerate(rows):
        spec = spec_of(array)
        shape = spec.shape if spec else ()
        own = None if shapes is None else shapes[number]
        if many and (not shape or (own is not None and shape[1:] != own)):
            problems.add(leaf, f"is {format_shape(shape)}, without an axis for the layers")
        elif not many and own is not None and shape != own:
            problems.add(leaf, f"is {format_shape(shape)}, but shared by the layers")
        elif many:
            counts.append(shape[0])
            if shape[0] != counts[0]:
                problems.add(leaf, f"{shape[0]} layers, others have {counts[0]}")
    stacked = called("nnx.vmap", "make_layer", "transform_metadata={nnx.PARTITION_NAME: None}")
    problems.raise_as(
        StructureError,
        "Not every leaf has one slice for each layer.",
        f"stack them: layers = {stacked}(keys)\n"
        "or jax.vmap(lambda key: plan.take(...))(keys)\n"
        "or declare what is shared: sw.scan_layers(fn, layers, x, shared=...)",
    )
    if not counts:
        raise StructureError(
            "The number of layers is unknown: every leaf is shared.",
            hint="x = jax.lax.fori_loop(0, layers, lambda _, x: fn(layer, x), x)",
        )
    return counts[0]
