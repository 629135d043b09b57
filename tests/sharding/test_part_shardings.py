"""A state stays where it lies: what a step writes leaves with the shardings that it came in with, and compiles once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

import statewise as sw
from meshes import ResNet, Transformer, assert_close, by_key, compilations, images, loss_of, mesh_of, number, tokens
from statewise._src.sharding.part_shardings import part_shardings_of

pytestmark = pytest.mark.heavy

MESH = mesh_of(data=4, model=2)
MOMENTUM = optax.sgd(0.1, momentum=0.9)

MODELS: dict[str, tuple[Callable[[nnx.Rngs], Any], Callable[[], tuple[Any, Any]]]] = {
    "transformer": (Transformer, tokens),
    "resnet": (ResNet, images),
}

# Which axis of which array lies split over "model", as tensor parallelism has it: columns first, then rows.
COLUMNS_AND_ROWS = {
    **{(name, "kernel"): 1 for name in ("query", "key", "value", "up")},
    **{(name, "bias"): 0 for name in ("query", "key", "value", "up", "stem", "norm")},
    ("out", "kernel"): 0,
    ("down", "kernel"): 0,
    ("stem", "kernel"): 3,
    ("norm", "scale"): 0,
    ("conv", "kernel"): 2,
}


def fsdp(path: Any, shape: Any) -> Any:
    axes = [axis for axis, size in enumerate(shape) if size % 4 == 0]
    return sw.Sharded(*[None] * axes[0], "data") if axes else sw.Replicated()


def tensor_parallel(path: Any, shape: Any) -> Any:
    axis = COLUMNS_AND_ROWS.get(path[-2:])
    return sw.Replicated() if axis is None else sw.Sharded(*[None] * axis, "model")


def mixed(path: Any, shape: Any) -> Any:
    return tensor_parallel(path, shape) if path[-2:] in COLUMNS_AND_ROWS else fsdp(path, shape)


ALL = pytest.mark.parametrize("model", MODELS)
WAYS = pytest.mark.parametrize("placement", [sw.Replicated(), fsdp, tensor_parallel, mixed])


def kinds_of(placement: Any, **others: sw.Kind) -> sw.Kinds:
    return sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement), **others)


def plan_of(model: str, placement: Any) -> sw.Plan:
    return kinds_of(placement).plan(MODELS[model][0](nnx.Rngs(0)), optimizers={"params": MOMENTUM})


def state_of(model: str, placement: Any, **options: Any) -> sw.State:
    return plan_of(model, placement).take(MODELS[model][0](nnx.Rngs(0)), **options)


def split_batch(model: str) -> tuple[Any, ...]:
    return tuple(jax.device_put(array, jax.NamedSharding(MESH, jax.P("data"))) for array in MODELS[model][1]())


train = sw.train_step(loss_of)


@functools.cache
def on_one_device(model: str) -> tuple[Any, list[float]]:
    return trained(state_of(model, None), *MODELS[model][1]())


def trained(state: Any, *batch: Any, step: Any = train, steps: int = 3) -> tuple[Any, list[float]]:
    losses = []
    for _ in range(steps):
        state, loss = step(state, *batch)
        losses.append(float(loss))
    return state, losses


def assert_lies_as(state: Any, places: Any) -> None:
    wanted = by_key(places)
    for key, array in by_key(state).items():
        assert array.sharding == wanted[key], key


# --- training --------------------------------------------------------------------------------------------------------


@ALL
@WAYS
def test_training_on_a_mesh_is_training_on_one_device_and_stays_in_place(model: str, placement: Any) -> None:
    state = state_of(model, placement, mesh=MESH)
    state, losses = trained(state, *split_batch(model))
    expected, losses_of_one = on_one_device(model)
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-5)
    assert_close(state, expected)
    assert_lies_as(state, plan_of(model, placement).shardings(MESH))


@ALL
def test_what_may_be_packed_is_packed_and_trains_alike(model: str) -> None:
    kinds = tuple(kind for kind in sw.Kinds.standard() if kind not in ("params", "optimizer"))
    for placement, pack in ((sw.Replicated(), True), (fsdp, kinds)):
        state = state_of(model, placement, mesh=MESH, pack=pack)
        places = state.plan.shardings(MESH)
        packed = state.plan is not plan_of(model, placement)
        assert packed or placement is fsdp
        state, losses = trained(state, *split_batch(model))
        np.testing.assert_allclose(losses, on_one_device(model)[1], rtol=1e-5)
        assert_lies_as(state, places)


@WAYS
def test_the_numbers_are_those_of_a_hand_written_program_with_out_shardings(placement: Any) -> None:
    model = Transformer(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def by_hand(params: Any, moments: Any, rest: Any, x: Any, labels: Any) -> Any:
        def of(params: Any) -> Any:
            model = nnx.merge(graphdef, params, rest, copy=True)
            return loss_of(model, x, labels), nnx.split(model, nnx.Param, ...)[2]

        (loss, after), grads = jax.value_and_grad(of, has_aux=True)(params)
        updates, moments = MOMENTUM.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, after, loss

    def place(path: Any, leaf: Any) -> Any:
        placement_of = placement if callable(placement) else lambda path, shape: placement
        placed = placement_of(tuple(getattr(key, "key", getattr(key, "name", None)) for key in path[:-1]), leaf.shape)
        return jax.NamedSharding(MESH, jax.P(*getattr(placed, "axes", ())))

    there = jax.tree_util.tree_map_with_path(place, params)
    whole = jax.NamedSharding(MESH, jax.P())
    moments = MOMENTUM.init(params)
    step = jax.jit(by_hand, out_shardings=(there, None, whole, None))
    params, rest = jax.device_put(params, there), jax.device_put(rest, whole)
    state, batch = state_of("transformer", placement, mesh=MESH), split_batch("transformer")
    for _ in range(3):
        params, moments, rest, expected = step(params, moments, rest, *batch)
        state, loss = train(state, *batch)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for path, leaf in nnx.to_flat_state(params):
        mine = by_key(state)["params/" + sw.format_path(path)]
        np.testing.assert_allclose(mine, leaf[...], rtol=1e-4, atol=1e-6)
        assert mine.sharding.is_equivalent_to(leaf[...].sharding, mine.ndim)


# --- one trace, one compilation --------------------------------------------------------------------------------------


def counted() -> tuple[sw.results.Step, list[None]]:
    traces: list[None] = []

    def body(model: Any, x: Any, labels: Any) -> Any:
        traces.append(None)
        return loss_of(model, x, labels)

    return sw.train_step(body), traces


@WAYS
@pytest.mark.parametrize("pack", [(), ("stats", "optimizer", "variables")])
def test_the_second_step_traces_and_compiles_nothing(placement: Any, pack: Any) -> None:
    pack = () if placement is not None and callable(placement) else pack
    step, traces = counted()
    state, batch = state_of("resnet", placement, mesh=MESH, pack=pack), split_batch("resnet")
    state, _ = step(state, *batch)
    with compilations() as compiled:
        trained(state, *batch, step=step)
    assert (len(traces), compiled) == (1, [])


def test_a_state_placed_otherwise_is_compiled_once_more_and_not_traced_again() -> None:
    step, traces = counted()
    batch = split_batch("resnet")
    plan = plan_of("resnet", fsdp)
    first, other = plan.take(ResNet(nnx.Rngs(0)), mesh=MESH), plan.take(ResNet(nnx.Rngs(0)))
    whole = jax.NamedSharding(MESH, jax.P())
    second = jax.device_put(other, jax.tree.map(lambda _: whole, other))
    first, _ = step(first, *batch)
    with compilations() as compiled:
        second, _ = step(second, *batch)
    assert len(compiled) == 1
    with compilations() as compiled:
        for _ in range(2):
            first, one = step(first, *batch)
            second, two = step(second, *batch)
    assert (len(traces), compiled) == (1, [])
    np.testing.assert_allclose(one, two, rtol=1e-5)
    assert_lies_as(first, plan.shardings(MESH))
    assert {array.sharding for array in jax.tree.leaves(second)} == {whole}


def test_a_state_that_is_moved_between_two_steps_stays_where_it_was_moved_to() -> None:
    plan, batch = plan_of("resnet", fsdp), split_batch("resnet")
    state, _ = train(plan.take(ResNet(nnx.Rngs(0)), mesh=MESH), *batch)
    whole = jax.NamedSharding(MESH, jax.P())
    state = state.replace(params=jax.device_put(state["params"], whole))
    state, _ = train(state, *batch)
    assert {array.sharding for array in jax.tree.leaves(state["params"])} == {whole}
    others = {key: place for key, place in by_key(plan.shardings(MESH)).items() if not key.startswith("params")}
    assert all(by_key(state)[key].sharding == place for key, place in others.items())


def test_a_call_looks_at_no_array_of_a_part_that_a_step_has_made(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counting(arrays: Any) -> Any:
        looked.append(len(arrays))
        return part_shardings_of(arrays)

    monkeypatch.setattr("statewise._src.core.part.part_shardings_of", counting)
    for mesh in (None, MESH):
        state = state_of("resnet", fsdp, mesh=mesh)
        batch = MODELS["resnet"][1]() if mesh is None else split_batch("resnet")
        state, _ = train(state, *batch)
        assert sum(looked) == sum(len(jax.tree.leaves(state[kind])) for kind in ("params", "stats", "optimizer"))
        looked.clear()
        trained(state, *batch)
        assert looked == []


# --- what else runs on a state ---------------------------------------------------------------------------------------


def test_a_step_that_is_compiled_ahead_of_time_holds_the_places_too() -> None:
    plan, batch = plan_of("resnet", fsdp), split_batch("resnet")
    compiled = train.lower(plan.abstract(MESH), *batch).compile()
    state = plan.take(ResNet(nnx.Rngs(0)), mesh=MESH)
    for _ in range(2):
        state, loss = compiled(state, *batch)
    assert_lies_as(state, plan.shardings(MESH))
    state, _ = train(state, *batch)
    assert_lies_as(state, plan.shardings(MESH))
    np.testing.assert_allclose(loss, on_one_device("resnet")[1][1], rtol=1e-5)


def test_places_on_an_abstract_mesh_are_no_places() -> None:
    plan = plan_of("resnet", fsdp)
    assert part_shardings_of(jax.tree.leaves(plan.abstract(AbstractMesh((4, 2), ("data", "model"))))) is None
    assert part_shardings_of(jax.tree.leaves(plan.abstract(MESH))) is part_shardings_of(
        jax.tree.leaves(state_of("resnet", fsdp, mesh=MESH))
    )


def test_a_restart_leaves_a_kind_where_it_lies() -> None:
    model = nnx.Dict(hits=nnx.Cache(jnp.arange(8.0)), seen=nnx.Cache(jnp.arange(8)))
    kind = sw.Kind(nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0, placement=sw.Sharded("data"))
    plan = sw.Kinds(cache=kind).plan(model)
    state = plan.take(model, mesh=MESH).restart("cache", where=[1])
    assert_lies_as(state, plan.shardings(MESH))
    np.testing.assert_array_equal(state["cache"]["hits"], [0, 0, 2, 3, 4, 5, 6, 7])
    state = state.restart("cache")
    assert_lies_as(state, plan.shardings(MESH))
    np.testing.assert_array_equal(state["cache"]["seen"], jnp.zeros(8, int))


def test_out_shardings_of_a_step_go_for_its_output() -> None:
    over = jax.NamedSharding(MESH, jax.P("model"))
    step = sw.train_step(lambda model, x, labels: (loss_of(model, x, labels), model(x)), has_aux=True)
    plain = sw.train_step(step.fn, has_aux=True, out_shardings=(None, over))
    plan, batch = plan_of("resnet", fsdp), split_batch("resnet")
    state, (_, logits) = plain(plan.take(ResNet(nnx.Rngs(0)), mesh=MESH), *batch)
    assert logits.sharding == over
    assert_lies_as(state, plan.shardings(MESH))


def test_a_scan_over_steps_goes_as_it_goes_on_one_device() -> None:
    batch = split_batch("resnet")
    stacked = jax.tree.map(lambda array: jnp.stack([array] * 3), batch)
    state = state_of("resnet", fsdp, mesh=MESH)
    state, losses = jax.lax.scan(lambda state, batch: train(state, *batch), state, stacked)
    np.testing.assert_allclose(losses, on_one_device("resnet")[1], rtol=1e-5)
    assert_close(state, on_one_device("resnet")[0])


def test_a_state_on_no_mesh_takes_a_batch_that_lies_on_one() -> None:
    state, losses = trained(state_of("resnet", None), *split_batch("resnet"))
    np.testing.assert_allclose(losses, on_one_device("resnet")[1], rtol=1e-5)
    with compilations() as compiled:
        trained(state, *split_batch("resnet"))
    assert compiled == []


def test_under_debug_nans_a_step_keeps_what_it_was_given() -> None:
    state, batch = state_of("resnet", fsdp, mesh=MESH), split_batch("resnet")
    with jax.debug_nans(True):
        after, _ = train(state, *batch)
    assert not any(array.is_deleted() for array in jax.tree.leaves(state))
    assert_lies_as(after, state.plan.shardings(MESH))


# --- places themselves -----------------------------------------------------------------------------------------------


def test_equal_places_are_one_object() -> None:
    places = [part_shardings_of(jax.tree.leaves(state_of("resnet", fsdp, mesh=MESH))) for _ in range(2)]
    assert places[0] is places[1]
    assert places[0] is not None
    assert places[0].whole


def test_there_are_no_places_off_a_mesh() -> None:
    assert part_shardings_of(jax.tree.leaves(state_of("resnet", None))) is None
    assert part_shardings_of([np.ones(3), 1]) is None
    lies = jax.device_put(jnp.ones(4), jax.NamedSharding(MESH, jax.P("data")))
    jax.jit(lambda array: [part_shardings_of([array])] == [None] or pytest.fail("a tracer lies nowhere"))(lies)
    half = part_shardings_of([lies, jnp.ones(3)])
    assert half is not None
    assert half.shardings == (lies.sharding, None)
    assert not half.whole
    assert number(lies).sum() == 4
