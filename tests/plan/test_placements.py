"""Placements as data, and every way in which one does not fit its leaf or its mesh."""

from __future__ import annotations

import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused

MESH = jax.sharding.AbstractMesh((4, 2), ("data", "model"))


def plan_of(placement: Any, model: Any, optimizers: Any = None) -> sw.Plan:
    return (
        sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement)).plan(model, optimizers=optimizers)
    )


def vector(size: int = 6) -> Any:
    return nnx.Dict(w=nnx.Param(jnp.zeros(size)))


@pytest.mark.parametrize(
    "one, other",
    [
        (sw.Replicated(), sw.Replicated(memory=None)),
        (sw.Sharded("data", None), sw.Sharded("data", None)),
        (sw.Sharded(("data", "model"), memory="pinned_host"), sw.Sharded(("data", "model"), memory="pinned_host")),
        (sw.PerDevice("data"), sw.PerDevice("data", resize="error")),
        (
            sw.PerDevice("a", "b", memory="pinned_host", resize="mean"),
            sw.PerDevice("a", "b", memory="pinned_host", resize="mean"),
        ),
    ],
)
def test_equal_placements_are_equal_everywhere(one: Any, other: Any) -> None:
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert (
        eval(repr(one), vars(sw) | {name: getattr(sw, name) for name in ("Sharded", "Replicated", "PerDevice")}) == one
    )
    assert sw.Kind(nnx.Param, placement=one) == sw.Kind(nnx.Param, placement=other)


def test_different_placements_make_different_kinds() -> None:
    kinds = {
        sw.Kind(nnx.Param, placement=placement)
        for placement in (
            None,
            sw.Replicated(),
            sw.Replicated(memory="pinned_host"),
            sw.Sharded("data"),
            sw.Sharded("data", None),
            sw.Sharded("model"),
            sw.PerDevice("data"),
            sw.PerDevice("data", resize="first"),
        )
    }
    assert len(kinds) == 8


def by_rank(path: Any, shape: Any) -> Any:
    return sw.Replicated()


@pytest.mark.parametrize(
    "placement, words",
    [
        (None, "-"),
        (sw.Replicated(), "placement=Replicated()"),
        (sw.Sharded("data", None, memory="pinned_host"), "placement=Sharded('data', None, memory='pinned_host')"),
        (sw.PerDevice("data", resize="mean"), "placement=PerDevice('data', resize='mean')"),
        (by_rank, "placement=by_rank"),
    ],
)
def test_the_treatment_names_the_placement(placement: Any, words: str) -> None:
    assert sw.Kind(nnx.Param, placement=placement).handling() == words


@pytest.mark.parametrize(
    "make, message, hint",
    [
        (lambda: sw.Sharded(0), "0 is not the name of a mesh axis.", "sw.Sharded('data', None)"),
        (lambda: sw.Sharded(("a", 1)), "1 is not the name of a mesh axis.", "sw.Sharded('data', None)"),
        (
            lambda: sw.Sharded("a", ("b", "a")),
            "Sharded('a', ('b', 'a')) shards an array twice over 'a'.",
            "name 'a' once, None elsewhere",
        ),
        (lambda: sw.Sharded("a", memory=1), "memory=1 is not a memory kind.", "memory='pinned_host'"),
        (lambda: sw.PerDevice("a", memory=1), "memory=1 is not a memory kind.", "memory='pinned_host'"),
        (sw.PerDevice, "PerDevice() does not name the axes of a mesh, each once.", "sw.PerDevice('data')"),
        (
            lambda: sw.PerDevice("a", 1),
            "PerDevice('a', 1) does not name the axes of a mesh, each once.",
            "sw.PerDevice('data')",
        ),
        (
            lambda: sw.PerDevice("a", "a"),
            "PerDevice('a', 'a') does not name the axes of a mesh, each once.",
            "sw.PerDevice('data')",
        ),
        (
            lambda: sw.PerDevice("a", resize="sum"),
            "resize='sum' is not one of 'error', 'mean', 'first'.",
            "resize='mean'  # or 'first', or 'error'",
        ),
    ],
)
def test_a_placement_that_cannot_stand(make: Any, message: str, hint: str) -> None:
    with refused(sw.PlacementError, message, hint=hint):
        make()


def fault(placement: Any, note: str, hint: str, *, model: Any = None, leaf: str = "w: Param(6,) float32") -> None:
    with refused(
        sw.PlacementError,
        "1 leaf cannot be placed on the mesh (data=4, model=2).",
        leaves=[f"{leaf}  kind=params  ({note})"],
        kind="params",
        hint=hint,
    ):
        plan_of(placement, vector() if model is None else model).shardings(MESH)


def test_more_axes_than_the_array_has() -> None:
    fault(
        sw.Sharded("model", None),
        "Sharded('model', None) has 2 axes, the array 1",
        "place by the number of axes: placement=lambda path, shape: "
        "sw.Sharded('model', None) if len(shape) >= 2 else sw.Replicated()",
    )


@pytest.mark.parametrize("axis, size, by", [("data", 4, "(data=4)"), (("model", "data"), 8, "(model=2, data=4)")])
def test_a_dimension_that_does_not_divide(axis: Any, size: int, by: str) -> None:
    fault(
        sw.Sharded(axis),
        f"axis 0 of 6 does not divide by {by}",
        f"place by shape: placement=lambda path, shape: sw.Sharded({axis!r}) "
        f"if len(shape) > 0 and shape[0] % {size} == 0 else sw.Replicated()",
    )


def test_the_hint_for_a_dimension_that_does_not_divide_is_one() -> None:
    placement = eval(
        "lambda path, shape: sw.Sharded('data') if len(shape) > 0 and shape[0] % 4 == 0 else sw.Replicated()",
        {"sw": sw},
    )
    model = nnx.Dict(a=nnx.Param(jnp.zeros(6)), b=nnx.Param(jnp.zeros(8)), c=nnx.Param(jnp.zeros(())))
    placed = plan_of(placement, model).shardings(MESH)["params"]
    assert [placed[name].spec for name in "abc"] == [jax.P(), jax.P("data"), jax.P()]


def test_an_axis_that_the_mesh_has_not() -> None:
    fault(sw.Sharded("modell"), "the mesh has no axis 'modell'", "use an axis of the mesh: data, model")


def test_a_function_that_returns_no_placement() -> None:
    def forgets(path: Any, shape: Any) -> None:
        return None

    hint = "forgets(path, shape) returns a placement for every leaf: sw.Replicated() or sw.Sharded('data', None)"
    fault(forgets, "forgets returned NoneType", hint)


def test_a_function_that_raises() -> None:
    def picky(path: Any, shape: Any) -> Any:
        return {}[path[0]]

    fault(picky, "picky raised KeyError: 'w'", "picky(path, shape) must handle every leaf")


def test_a_tied_leaf_that_is_placed_differently_by_its_paths() -> None:
    def by_name(path: Any, shape: Any) -> Any:
        return sw.Sharded("model") if path == ("u",) else sw.Replicated()

    shared = nnx.Param(jnp.zeros(6))
    fault(
        by_name,
        "tied: Sharded('model') by this path, Replicated() as w",
        "by_name must return the same placement for all paths of a tied leaf",
        model=nnx.Dict(u=shared, w=shared),
        leaf="u: Param(6,) float32",
    )


def test_memory_that_the_devices_have_not() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    known = ", ".join(sorted(memory.kind for memory in jax.devices()[0].addressable_memories()))
    with refused(
        sw.PlacementError,
        "1 leaf cannot be placed on the mesh (data=8).",
        leaves=["w: Param(6,) float32  kind=params  (the devices have no memory 'drum')"],
        kind="params",
        hint=f"use one of their memories: {known}",
    ):
        plan_of(sw.Replicated(memory="drum"), vector()).shardings(mesh)


def test_all_faults_are_listed_at_once() -> None:
    kinds = sw.Kinds(
        params=sw.Kind(nnx.Param, placement=sw.Sharded("data")), stats=sw.Kind(nnx.BatchStat, placement=sw.Sharded("x"))
    )
    with refused(
        sw.PlacementError,
        "3 leaves cannot be placed on the mesh (data=4, model=2).",
        leaves=[
            "bias: Param(3,) float32  kind=params  (axis 0 of 3 does not divide by (data=4))",
            "mean: BatchStat(3,) float32  kind=stats  (the mesh has no axis 'x')",
            "var: BatchStat(3,) float32  kind=stats  (the mesh has no axis 'x')",
        ],
        hint="place by shape: placement=lambda path, shape: sw.Sharded('data') "
        "if len(shape) > 0 and shape[0] % 4 == 0 else sw.Replicated()\nuse an axis of the mesh: data, model",
    ):
        kinds.plan(nnx.BatchNorm(3, use_scale=False, rngs=nnx.Rngs(0))).shardings(MESH)


def test_a_moment_that_cannot_be_split_as_its_kind_declares() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param), optimizer=sw.Kind(nnx.OptState, placement=sw.Sharded("data")))
    plan = kinds.plan(vector(8), optimizers={"params": optax.adam(1.0)})
    with refused(
        sw.PlacementError,
        "1 leaf cannot be placed on the mesh (data=4, model=2).",
        leaves=["optimizer/params/0/count: Array() int32  kind=optimizer  (Sharded('data') has 1 axes, the array 0)"],
        kind="optimizer",
        hint="place by the number of axes: placement=lambda path, shape: "
        "sw.Sharded('data') if len(shape) >= 1 else sw.Replicated()",
    ):
        plan.shardings(MESH)


@pytest.mark.parametrize("mesh, name", [({"data": 8}, "dict"), (None, "NoneType"), (8, "int")])
def test_what_is_no_mesh(mesh: Any, name: str) -> None:
    with refused(sw.PlacementError, f"A {name} is not a mesh.", hint="mesh = jax.make_mesh((8,), ('data',))"):
        plan_of(None, vector()).shardings(mesh)


def test_an_abstract_mesh_holds_no_arrays() -> None:
    hint = "mesh = jax.make_mesh((8,), ('data',))  # plan.abstract(mesh) takes an abstract one"
    for put in (lambda plan: plan.take(vector(), mesh=MESH), lambda plan: plan.init(vector, MESH)):
        with refused(sw.PlacementError, "An abstract mesh has no devices to put arrays on.", hint=hint):
            put(plan_of(None, vector()))


def test_init_wants_a_function() -> None:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with refused(
        sw.StructureError,
        "plan.init takes a function that makes the model, not Linear.",
        hint="plan.init(lambda: Model(rngs=nnx.Rngs(0)), mesh)  # or plan.take(model, mesh=mesh)",
    ):
        sw.plan(model).init(model, jax.make_mesh((8,), ("data",)))


class Raw(nnx.Module):
    """A module with an array outside of any Variable."""

    def __init__(self, wrap: Any = lambda array: array) -> None:
        self.table = wrap(jnp.ones(3))
        self.w = nnx.Param(jnp.ones(2))


def test_init_cannot_see_arrays_outside_of_variables() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    with refused(
        sw.StructureError,
        "Arrays outside of Variables are static to NNX if a model is made inside jax.jit.",
        leaves=["table: Array(3,) float32  kind=variables  (missing from the model)"],
        hint="self.table = nnx.data(jnp.ones(3))  # or an nnx.Variable; or plan.take(make_model(), mesh=mesh)",
    ):
        sw.plan(Raw()).init(Raw, mesh)
    state = sw.plan(Raw(nnx.data)).init(lambda: Raw(nnx.data), mesh)
    assert state["variables"]["table"].shape == (3,)


def test_init_makes_as_many_objects_as_were_planned() -> None:
    plan = sw.plan(Raw(), nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    hint = "plan.take(raw, linear)"
    with refused(sw.StructureError, "The plan is of 2 objects, but 1 are given.", hint=hint):
        plan.init(Raw, jax.make_mesh((8,), ("data",)))


def test_init_wants_the_model_that_was_planned() -> None:
    plan = sw.plan(nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0)))
    with refused(
        sw.StructureError,
        "The model is not what was planned: 1 leaf differs.",
        leaves=["kernel: Param(2, 3) float32  kind=params  (is (2, 4) in the model)"],
        kind="params",
        hint="plan = kinds.plan(model)  # plan the model as it is now",
    ):
        plan.init(lambda: nnx.Linear(2, 4, use_bias=False, rngs=nnx.Rngs(0)), jax.make_mesh((8,), ("data",)))


def test_packed_leaves_are_not_split() -> None:
    model = nnx.Dict({name: nnx.Param(jnp.zeros(8)) for name in "abcd"})
    plan = plan_of(sw.Sharded("data"), model)
    with refused(
        sw.PlacementError,
        "Kind 'params' is packed into buffers, which cannot be split: pack and placement cannot be combined.",
        leaves=[f"{name}: Param(8,) float32  kind=params  (packed, and split over the mesh)" for name in "abcd"],
        kind="params",
        hint="leave params out of pack: plan.take(model, mesh=mesh, pack=())",
    ):
        plan.take(model, mesh=jax.make_mesh((4, 2), ("data", "model")), pack=True)
