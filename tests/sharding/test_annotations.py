"""Placement by metadata where layers are stacked: an axis without an entry is refused, and what to do then works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

import statewise as sw
from comparing import same
from meshes import mesh_of

MESH = AbstractMesh((4, 2), ("data", "model"))
RULES = [("embed", "data"), ("mlp", "model")]
LAYERS = 4


class Block(nnx.Module):
    """A layer with metadata on some of its leaves: full, shorter than its array by none, empty, and without a name."""

    def __init__(self, key: Any) -> None:
        rngs = nnx.Rngs(key)
        named = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
        bias = nnx.with_partitioning(nnx.initializers.zeros_init(), ("mlp",))
        self.up = nnx.Linear(8, 16, kernel_init=named, bias_init=bias, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(()), out_sharding=())
        self.shift = nnx.Param(jnp.ones(8), out_sharding=(None,))

    def __call__(self, x: Any) -> Any:
        return x + self.norm(self.up(x))[:, :8] * self.gain[...] + self.shift[...][None]


def keys(count: int = LAYERS) -> Any:
    return jax.random.split(jax.random.key(0), count)


def stacked(**options: Any) -> Any:
    with nnx.use_eager_sharding(False):
        return nnx.vmap(Block, **options)(keys())


def as_asked() -> Any:
    return stacked(transform_metadata={nnx.PARTITION_NAME: None})


def kinds_of(placement: Any = None, **others: Any) -> sw.Kinds:
    placement = sw.FromMetadata(RULES) if placement is None else placement
    return sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement)) | sw.Kinds(**others)


def specs(plan: sw.Plan, mesh: Any = MESH) -> dict[str, Any]:
    return {keys[0].key: at.spec for keys, at in jax.tree_util.tree_flatten_with_path(plan.shardings(mesh))[0]}


LISTED = [
    "up/bias: Param(4, 16) float32  kind=params  (out_sharding=('mlp',) has 1 entry, the array 2 axes)",
    "up/kernel: Param(4, 8, 16) float32  kind=params  (out_sharding=('embed', 'mlp') has 2 entries, the array 3 axes)",
]
HINT = "transform_metadata={nnx.PARTITION_NAME: None}"


def check_refused(attempt: Callable[[], Any], listed: list[str] = LISTED) -> sw.PlacementError:
    with pytest.raises(sw.PlacementError, match=r"cannot be placed on the mesh") as caught:
        attempt()
    assert [str(leaf) for leaf in caught.value.leaves] == listed
    assert (caught.value.hint or "").startswith(HINT)
    assert caught.value.kind == "params"
    return caught.value


# --- every way in ------------------------------------------------------------------------------------------------

DOORS: dict[str, Callable[[sw.Plan, Any, Any], Any]] = {
    "shardings": lambda plan, model, mesh: plan.shardings(mesh),
    "abstract": lambda plan, model, mesh: plan.abstract(mesh),
    "take": lambda plan, model, mesh: plan.take(model, mesh=mesh),
    "take packed": lambda plan, model, mesh: plan.take(model, mesh=mesh, pack="variables"),
    "take without copies": lambda plan, model, mesh: plan.take(model, mesh=mesh, copy=False),
    "init": lambda plan, model, mesh: plan.init(stacked, mesh),
    "memory": lambda plan, model, mesh: sw.memory(plan, mesh),
    "memory of a mesh in words": lambda plan, model, mesh: sw.memory(plan, {"data": 4, "model": 2}),
    "report": lambda plan, model, mesh: sw.report(plan, mesh=mesh),
    "a state's plan": lambda plan, model, mesh: plan.take(model).plan.shardings(mesh),
}


@pytest.mark.parametrize("door", DOORS)
def test_layers_stacked_without_an_entry_for_their_axis(door: str) -> None:
    model = stacked()
    check_refused(lambda: DOORS[door](kinds_of().plan(model), model, mesh_of(data=4, model=2)))


MAKERS: dict[str, Callable[[], Any]] = {
    "nnx.vmap": stacked,
    "nnx.vmap, graph=False": lambda: stacked(graph=False),
    "a stack that is not there": lambda: nnx.eval_shape(stacked),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_however_they_are_stacked(maker: str) -> None:
    check_refused(lambda: kinds_of().plan(MAKERS[maker]()).shardings(MESH))


def test_layers_that_are_stacked_by_jax_or_twice() -> None:
    with nnx.use_eager_sharding(False):
        by_jax = jax.vmap(Block)(keys())
        twice = nnx.vmap(nnx.vmap(Block))(keys(8).reshape(2, 4))
    check_refused(lambda: kinds_of().plan(by_jax).shardings(MESH))
    with pytest.raises(sw.PlacementError) as caught:
        kinds_of().plan(twice).shardings(MESH)
    assert [leaf.note for leaf in caught.value.leaves] == [
        "out_sharding=('mlp',) has 1 entry, the array 3 axes",
        "out_sharding=('embed', 'mlp') has 2 entries, the array 4 axes",
    ]


def test_whatever_follows_the_metadata_is_refused_with_it_and_each_leaf_is_listed_once() -> None:
    model = stacked()
    ours = {"optimizers": {"params": optax.adam(1e-3)}, "averages": {"params": sw.EMA(0.9)}}
    check_refused(lambda: kinds_of().plan(model, **ours).shardings(MESH))
    by_names = sw.FromMetadata(RULES)
    others = {"ema": sw.Kind(sw.EMA, placement=by_names), "optimizer": sw.Kind(nnx.OptState, placement=by_names)}
    check_refused(lambda: kinds_of(**others).plan(model, **ours).shardings(MESH))
    # Of the optimizer alone too, where the parameters are on every device.
    whole = kinds_of(sw.Replicated(), **others)
    check_refused(lambda: whole.plan(model, **ours).shardings(MESH))
    check_refused(lambda: kinds_of(lambda path, shape: sw.FromMetadata(RULES)).plan(model).shardings(MESH))


def test_the_rules_do_not_matter_nor_does_the_mesh() -> None:
    """A model is refused or taken by what it says itself, not by a rule that happens to split nothing."""
    nothing = kinds_of(sw.FromMetadata([("embed", None), ("mlp", None)]))
    check_refused(lambda: nothing.plan(stacked()).shardings(AbstractMesh((1,), ("data",))))


# --- what helps --------------------------------------------------------------------------------------------------


def test_with_the_hint_applied_each_leaf_lies_as_one_layer_does() -> None:
    with nnx.use_eager_sharding(False):
        one = Block(jax.random.key(1))
    layer, stack = specs(kinds_of().plan(one)), specs(kinds_of().plan(as_asked()))
    assert layer["params/up/kernel"] == jax.P("data", "model")
    assert layer.keys() == stack.keys()
    for path, spec in layer.items():
        # What NNX says of the same Variables, with no word of ours.
        assert (*stack[path],) == ((None, *spec) if any(spec) else ()), path
    names = nnx.get_partition_spec(nnx.state(as_asked(), nnx.Param))
    assert names["up"]["kernel"].get_raw_value() == jax.P(None, "embed", "mlp")


def test_a_stack_that_is_placed_so_trains_as_an_unplaced_one() -> None:
    optimizers = {"params": optax.adam(1e-2)}
    mesh, model = mesh_of(data=4, model=2), as_asked()
    plan = kinds_of().plan(model, optimizers=optimizers)

    @sw.train_step
    def train(model: Any, x: Any) -> Any:
        return (sw.scan_layers(lambda layer, x: layer(x), model, x) ** 2).mean()

    x = jnp.arange(32.0).reshape(4, 8) / 32
    here, loss = train(plan.take(model), x)
    there, same_loss = train(plan.take(model, mesh=mesh), x)
    np.testing.assert_allclose(loss, same_loss, rtol=1e-5)
    np.testing.assert_allclose(here["params"]["up"]["kernel"], there["params"]["up"]["kernel"], atol=1e-5)
    assert there["params"]["up"]["kernel"].sharding.spec == jax.P(None, "data", "model")
    assert not any(lies[:1] == ("data",) for lies in specs(plan).values())


def test_the_other_hints_help_too() -> None:
    error = check_refused(lambda: kinds_of().plan(stacked()).shardings(MESH))
    assert error.hint == (
        f"{HINT}  # in the nnx.vmap that stacks the layers: the layers' axis is the first, and has no entry\n"
        "or, if nothing is stacked, an entry for each axis: out_sharding=('mlp', None)\n"
        "or, if the metadata cannot be set elsewhere (as under jax.vmap): "
        "leaf.set_metadata(out_sharding=(None, 'mlp'))\n"
        "or, if nothing is stacked, an entry for each axis: out_sharding=('embed', 'mlp', None)\n"
        "or, if the metadata cannot be set elsewhere (as under jax.vmap): "
        "leaf.set_metadata(out_sharding=(None, 'embed', 'mlp'))"
    )
    model = stacked(graph=False)
    model.up.bias.set_metadata(out_sharding=(None, "mlp"))
    model.up.kernel.set_metadata(out_sharding=(None, "embed", "mlp"))
    assert specs(kinds_of().plan(model)) == specs(kinds_of().plan(as_asked()))


def test_the_stack_may_be_named_and_placed_too() -> None:
    model = stacked(transform_metadata={nnx.PARTITION_NAME: "layers"})
    rules = sw.FromMetadata([("embed", None), ("mlp", "model"), ("layers", "data")])
    assert specs(kinds_of(rules).plan(model))["params/up/kernel"] == jax.P("data", None, "model")


# --- a declared spec, and metadata that is longer ------------------------------------------------------------------


def test_what_a_kind_declares_is_of_the_array_as_it_stands() -> None:
    """`Sharded` is said of the very arrays that are there: shorter than they are, as `jax.P` may be."""
    plan = kinds_of(lambda path, shape: sw.Sharded("data") if shape == (4, 8, 16) else sw.Replicated()).plan(stacked())
    assert specs(plan)["params/up/kernel"] == jax.P("data")


def test_a_layer_out_of_a_stack_has_an_entry_too_many() -> None:
    model = as_asked()
    one = jax.tree.map(lambda array: array[0], model)
    with pytest.raises(sw.PlacementError) as caught:
        kinds_of().plan(one).shardings(MESH)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "shift: Param(8,) float32  kind=params  (out_sharding=(None, None) has 2 entries, the array 1 axis)",
        "up/bias: Param(16,) float32  kind=params  (out_sharding=(None, 'mlp') has 2 entries, the array 1 axis)",
        "up/kernel: Param(8, 16) float32  kind=params  "
        "(out_sharding=(None, 'embed', 'mlp') has 3 entries, the array 2 axes)",
    ]
    assert "leaf.set_metadata(out_sharding=('mlp',))" in (caught.value.hint or "")
    one.shift.set_metadata(out_sharding=(None,))
    one.up.bias.set_metadata(out_sharding=("mlp",))
    one.up.kernel.set_metadata(out_sharding=("embed", "mlp"))
    assert specs(kinds_of().plan(one))["params/up/kernel"] == jax.P("data", "model")


def test_every_array_of_a_value_must_have_the_axes() -> None:
    value = {"w": jnp.ones((8, 4)), "b": jnp.ones(8)}
    model = nnx.Dict(both=nnx.Param(value, out_sharding=("data", None), eager_sharding=False))
    with pytest.raises(sw.PlacementError) as caught:
        kinds_of(sw.FromMetadata()).plan(model).shardings(MESH)
    assert [str(leaf) for leaf in caught.value.leaves] == [
        "both: Param(8,) -  kind=params  (out_sharding=('data', None) has 2 entries, the array 1 axis)"
    ]


NAMES = st.sampled_from((None, None, "data", "model"))


@given(st.lists(NAMES, max_size=3), st.integers(0, 3), st.sampled_from((tuple, list, lambda axes: jax.P(*axes))))
def test_metadata_is_used_as_it_is_or_not_at_all(entries: list[Any], rank: int, made: Any) -> None:
    """The law: each entry speaks of the axis at its own place, and where it cannot, nothing is placed."""
    if len([name for name in entries if name]) > len({name for name in entries if name}):
        return  # one axis twice, which is another error
    leaf = nnx.Param(jnp.zeros((8,) * rank), out_sharding=made(entries), eager_sharding=False)
    plan = kinds_of(sw.FromMetadata()).plan(nnx.Dict(w=leaf))
    fits = len(entries) == rank or (len(entries) < rank and not any(entries))
    if not fits:
        with pytest.raises(sw.PlacementError):
            plan.shardings(MESH)
        return
    spec = specs(plan)["params/w"]
    assert (*spec, *[None] * (rank - len(spec))) == (*entries, *[None] * (rank - len(entries)))


# --- the state of NNX's own optimizer -----------------------------------------------------------------------------


def test_factored_moments_follow_the_axes_that_are_left_of_their_parameter() -> None:
    """NNX gives every moment its parameter's metadata, a row of it too."""
    with nnx.use_eager_sharding(False):
        model = as_asked()
        optimizer = nnx.Optimizer(model, optax.adafactor(1e-3, min_dim_size_to_factor=4), wrt=nnx.Param)
    theirs = kinds_of().replace(optimizer=sw.Kind(nnx.OptState, placement=sw.FromMetadata(RULES)))
    followed, by_metadata = kinds_of().plan(model, optimizer), theirs.plan(model, optimizer)
    assert specs(by_metadata) == specs(followed)
    assert specs(by_metadata)["optimizer/1/opt_state/0/v_row/up/kernel"] == jax.P(None, "data")
    alone = sw.Kinds(moments=sw.Kind(nnx.OptState, placement=sw.FromMetadata(RULES)))
    adam = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    assert specs(alone.plan(adam))["moments/opt_state/0/mu/up/kernel"] == jax.P(None, "data", "model")


def test_a_restore_onto_a_mesh_and_a_transfer_go_where_the_metadata_says(tmp_path: Any) -> None:
    mesh, model = mesh_of(data=4, model=2), as_asked()
    plan = kinds_of().plan(model)
    sw.save(tmp_path / "kept", plan.take(model))
    restored, _ = sw.restore(tmp_path / "kept", plan.abstract(mesh))
    assert restored["params"]["up"]["kernel"].sharding.spec == jax.P(None, "data", "model")
    assert same(restored, plan.take(model))
    moved = sw.transfer(plan.take(model), plan.take(model, mesh=mesh), kinds="params")
    assert moved["params"]["up"]["kernel"].sharding.spec == jax.P(None, "data", "model")
    wrong = kinds_of().plan(stacked())
    check_refused(lambda: sw.restore(tmp_path / "kept", wrong.abstract(mesh)))
