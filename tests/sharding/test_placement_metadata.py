"""Placement by the metadata that NNX layers carry."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

import statewise as sw
from refusals import refused

MESH = AbstractMesh((4, 2), ("data", "model"))
LECUN = nnx.initializers.lecun_normal()


def linear() -> nnx.Linear:
    """A layer whose kernel carries logical names; without a mesh at hand, so that they are not applied at once."""
    with nnx.use_eager_sharding(False):
        return nnx.Linear(8, 16, kernel_init=nnx.with_partitioning(LECUN, ("embed", "mlp")), rngs=nnx.Rngs(0))


def weights(**metadata: Any) -> nnx.Dict:
    return nnx.Dict(w=nnx.Param(jnp.zeros((8, 16)), eager_sharding=False, **metadata))


def specs(model: Any, placement: Any, *others: Any, **options: Any) -> dict[str, Any]:
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=placement), **options.pop("kinds", {}))
    places = kinds.plan(model, *others, **options).shardings(MESH)
    return {keys[0].key: place.spec for keys, place in jax.tree_util.tree_flatten_with_path(places)[0]}


@pytest.mark.parametrize(
    "rules, spec",
    [
        ([("embed", "data"), ("mlp", "model")], jax.P("data", "model")),
        ([("embed", None), ("mlp", ("data", "model"))], jax.P(None, ("data", "model"))),
        ([("embed", None), ("mlp", ["model"])], jax.P(None, "model")),
        ([("embed", None), ("mlp", None), ("heads", "model")], jax.P()),
    ],
)
@pytest.mark.parametrize("make", [linear, lambda: nnx.eval_shape(linear)])
def test_logical_names_go_by_the_rules(make: Any, rules: Any, spec: Any) -> None:
    assert specs(make(), sw.FromMetadata(rules)) == {"params/kernel": spec, "params/bias": jax.P()}


def test_without_rules_the_names_are_mesh_axes() -> None:
    assert specs(weights(out_sharding=("model", None)), sw.FromMetadata()) == {"params/w": jax.P("model")}
    assert specs(weights(out_sharding=jax.P(None, "data")), sw.FromMetadata()) == {"params/w": jax.P(None, "data")}
    assert specs(weights(), sw.FromMetadata()) == {"params/w": jax.P()}


def test_a_layer_that_flax_has_sharded_already_lies_as_before() -> None:
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 16, kernel_init=nnx.with_partitioning(LECUN, ("data", "model")), rngs=nnx.Rngs(0))
    kinds = sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=sw.FromMetadata()))
    state = kinds.plan(model).take(model, mesh=mesh)
    assert state["params"]["kernel"].sharding == model.kernel.get_raw_value().sharding


def test_a_variables_own_rules_count_too() -> None:
    model = weights(out_sharding=("embed", "mlp"), sharding_rules=(("embed", "model"), ("mlp", None)))
    assert specs(model, sw.FromMetadata()) == {"params/w": jax.P("model")}
    assert specs(model, sw.FromMetadata([("mlp", None)])) == {"params/w": jax.P("model")}


def test_a_function_may_leave_some_leaves_to_their_metadata() -> None:
    def place(path: Any, shape: Any) -> Any:
        return sw.FromMetadata() if path == ("w",) else sw.Sharded("data")

    model = nnx.Dict(w=weights(out_sharding=("model", None)).w, v=nnx.Param(jnp.zeros(8)))
    assert specs(model, place) == {"params/v": jax.P("data"), "params/w": jax.P("model")}


def test_moments_follow_what_metadata_says() -> None:
    rules = sw.FromMetadata([("embed", "data"), ("mlp", "model")])
    found = specs(linear(), rules, optimizers={"params": optax.sgd(1.0, 0.9)})
    assert found["optimizer/params/0/trace/kernel"] == jax.P("data", "model")


def test_an_optimizer_may_have_rules_of_its_own() -> None:
    own = sw.Kind(nnx.OptState, placement=sw.FromMetadata([("embed", "data"), ("mlp", "model")]))
    plain = sw.FromMetadata([("embed", None), ("mlp", None)])
    found = specs(linear(), plain, optimizers={"params": optax.sgd(1.0, 0.9)}, kinds={"optimizer": own})
    assert found["params/kernel"] == jax.P()
    assert found["optimizer/params/0/trace/kernel"] == jax.P("data", "model")


def test_rules_are_data() -> None:
    one, other = sw.FromMetadata([("a", "x"), ("a", "x"), ("b", ["y"])]), sw.FromMetadata((("a", "x"), ("b", ("y",))))
    assert one == other
    assert hash(one) == hash(other)
    assert one != sw.FromMetadata()
    assert sw.Kind(nnx.Param, placement=one).handling() == "placement=FromMetadata([('a', 'x'), ('b', ('y',))])"


@pytest.mark.parametrize(
    "rules, message, hint",
    [
        ([("a", "x"), ("a", None)], "Two rules for 'a' contradict each other: 'x' and None.", "one rule for 'a'"),
        ("ab", "A str is not a list of rules.", "sw.FromMetadata([('embed', 'data'), ('heads', None)])"),
        ({"a": "x"}, "A dict is not a list of rules.", "sw.FromMetadata([('embed', 'data'), ('heads', None)])"),
        (
            [("a",)],
            "('a',) is not a rule: a logical name and a mesh axis.",
            "sw.FromMetadata([('embed', 'data'), ('heads', None)])",
        ),
        (
            [("a", 1)],
            "('a', 1) is not a rule: a logical name and a mesh axis.",
            "sw.FromMetadata([('embed', 'data'), ('heads', None)])",
        ),
    ],
)
def test_rules_that_cannot_stand(rules: Any, message: str, hint: str) -> None:
    with refused(sw.PlacementError, message, hint=hint):
        sw.FromMetadata(rules)


@pytest.mark.parametrize(
    "metadata, rules, note, hint",
    [
        (
            {"out_sharding": ("embed", "mlp")},
            [("embed", "data")],
            "no rule for 'mlp'",
            "add a rule for each: [('mlp', None)]",
        ),
        (
            {"out_sharding": ("embed", None)},
            None,
            "the mesh has no axis 'embed'",
            "use an axis of the mesh: data, model",
        ),
        (
            {"out_sharding": ("embed", "mlp")},
            [("embed", "data"), ("mlp", "data")],
            "Sharded('data', 'data') shards an array twice over 'data'",
            "name 'data' once, None elsewhere",
        ),
        (
            {"out_sharding": ("embed", None), "sharding_rules": (("embed", "model"),)},
            [("embed", "data")],
            "Two rules for 'embed' contradict each other: 'data' and 'model'",
            "one rule for 'embed'",
        ),
        (
            {"out_sharding": "embed"},
            None,
            "out_sharding is 'embed'",
            "out_sharding=('embed', None)  # a name for each axis, or None",
        ),
    ],
)
def test_metadata_that_does_not_fit(metadata: Any, rules: Any, note: str, hint: str) -> None:
    with refused(
        sw.PlacementError,
        "1 leaf cannot be placed on the mesh (data=4, model=2).",
        leaves=[f"w: Param(8, 16) float32  kind=params  ({note})"],
        kind="params",
        hint=hint,
    ):
        specs(weights(**metadata), sw.FromMetadata(rules))


def _all(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("tx", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.masked(optax.adam(0.1), _all)])
def test_a_moment_follows_its_own_parameter_where_another_s_path_ends_like_its_own(tx: Any, several: bool) -> None:
    """The first moment of `kernel` stands at `mu/kernel`, which is the path of another parameter."""

    class Inner(nnx.Module):
        def __init__(self) -> None:
            self.kernel = nnx.Param(jnp.ones((8, 8)), out_sharding=("x", None), eager_sharding=False)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.mu = self.trace = Inner()
            self.nu = Inner()
            self.kernel = nnx.Param(jnp.ones((8, 8)), out_sharding=(None, "x"), eager_sharding=False)

    objects = (Model(), nnx.Dict(kernel=nnx.Variable(jnp.ones(1)))) if several else (Model(),)
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.FromMetadata()), rest=sw.Kind(...))
    plan = kinds.plan(*objects, optimizers={"params": tx})
    found = plan.shardings(jax.sharding.AbstractMesh((4,), ("x",)))["optimizer"]
    specs = {}
    for keys, sharding in jax.tree_util.tree_flatten_with_path(found)[0]:
        names = jax.tree_util.keystr(keys)
        if "kernel" in names:
            own = any(f"['{name}']['kernel']" in names for name in ("mu", "nu", "trace"))
            specs[names] = sharding.spec == (jax.P("x") if own else jax.P(None, "x"))
    assert len(specs) >= 3
    assert all(specs.values()), specs
