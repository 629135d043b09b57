"""Variables that are references or hijax's own: every verb does with them what it does with plain ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from hints import parses

pytestmark = pytest.mark.usefixtures("plain_variables")  # but for the forms that a test names
FORMS = [{"ref": True}, {"hijax": True}, {"hijax": True, "ref": True}]
PLAIN = {"hijax": False, "ref": False}
X = jnp.full((3, 2), 0.5)


class Model(nnx.Module):
    """Its kernel is tied; its Variables are of the form that is asked for, whatever Flax's default is."""

    def __init__(self, **options: bool) -> None:
        with nnx.var_defaults(**(PLAIN | options)):
            rngs = nnx.Rngs(0)
            self.count = nnx.Variable(jnp.array(0))
            self.layer = nnx.Linear(2, 2, rngs=rngs)
            self.norm = nnx.BatchNorm(2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.tied = self.layer.kernel

    def __call__(self, x: Any) -> Any:
        self.count[...] += 1
        return self.dropout(self.norm(self.layer(x))) @ self.tied[...]


def flat(tree: Any) -> dict[str, np.ndarray]:
    """Every array in a pytree, or in a model, by its path; read with Flax's own `get_value`."""
    if isinstance(tree, nnx.Module):
        tree = nnx.state(tree, graph=True)
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    arrays = {}
    for keys, leaf in leaves:
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        arrays[jax.tree_util.keystr(keys)] = np.asarray(jax.random.key_data(value) if is_key else value)
    return arrays


def assert_same(ours: Any, theirs: Any) -> None:
    mine, other = flat(ours), flat(theirs)
    assert mine.keys() == other.keys()
    for path, array in mine.items():
        np.testing.assert_array_equal(array, other[path], err_msg=path)


def assert_form(variable: Any, options: dict[str, bool]) -> None:
    assert {"hijax": variable.hijax, "ref": variable.ref} == PLAIN | options
    assert isinstance(variable.get_raw_value(), jax.Ref) == variable.ref


@sw.train_step(writes=("variables", "stats", "rng"))
def train(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def trained(model: Any) -> Any:
    state = sw.plan(model, optimizers={"params": optax.adam(0.1)}).take(model)
    for _ in range(2):
        state, _ = train(state, X)
    return state


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_step_gives_the_same_numbers(options: dict[str, bool]) -> None:
    model = Model(**options)
    before = flat(model)
    state = trained(model)
    assert_same(dict(state), dict(trained(Model())))
    for path, array in flat(model).items():  # the model is left alone until `put`
        np.testing.assert_array_equal(array, before[path])


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_is_put_or_built_has_the_form_that_was_planned(options: dict[str, bool]) -> None:
    model, plain = Model(**options), Model()
    state, expected = trained(model), trained(plain)
    held = model.layer.kernel.get_raw_value()
    state.plan.put(state, model)
    expected.plan.put(expected, plain)
    if model.layer.kernel.ref:  # written into the reference, so that whoever shares it sees the new value
        assert model.layer.kernel.get_raw_value() is held
    for each in (model, state.plan.build(state)):
        assert_same(each, plain)
        assert each.tied is each.layer.kernel
        assert_form(each.layer.kernel, options)
        assert_form(each.dropout.rngs.count, options)
        # They are live: the next call writes them, and a plain model agrees.
        np.testing.assert_array_equal(each(X), expected.plan.build(expected)(X))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_plans_and_states_fit_models_of_other_forms(options: dict[str, bool]) -> None:
    model, plain = Model(**options), Model()
    optimizers = {"params": optax.adam(0.1)}
    plan, plain_plan = sw.plan(model, optimizers=optimizers), sw.plan(plain, optimizers=optimizers)
    assert plan.leaves == plain_plan.leaves
    assert str(plan) == str(plain_plan)
    assert_same(dict(plan.take(plain)), dict(plain_plan.take(model)))
    state = trained(plain)
    state.plan.put(state, model)
    assert_form(model.layer.kernel, options)
    assert_same(model, state.plan.build(state))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_verbs_that_only_look_see_the_same(options: dict[str, bool]) -> None:
    model, plain = Model(**options), Model()
    looks: list[Callable[[Any], Any]] = [
        lambda model: sw.count(model, nnx.Param, nnx.BatchStat, sw.Exactly(nnx.Variable), ...),
        lambda model: str(sw.explain(model, nnx.Param & sw.Path("layer/*"))),
        lambda model: str(sw.census(model)),
        lambda model: list(map(str, sw.lint(model))),
        lambda model: str(sw.audit(lambda model, x: model(x), model, X)),
        lambda model: sw.plan(model).leaves,
    ]
    for look in looks:
        assert look(model) == look(plain)
    assert sw.select(model, sw.Path("layer/kernel"))["layer"]["kernel"] is model.layer.kernel
    assert not sw.diff(model, plain)
    with sw.watch(model) as watch:
        model(X)
    assert {kind: len(leaves) for kind, leaves in watch.changed.items()} == {"variables": 1, "stats": 2, "rng": 1}
    plain(X)
    assert not sw.diff(model, plain)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_split_merge_and_update(options: dict[str, bool]) -> None:
    model = Model(**options)
    graphdef, parts = sw.split(model, sw.Kinds.standard())
    again = sw.merge(graphdef, parts)
    assert_same(again, model)
    # Parts of arrays make new Variables of the form that was split.
    arrays = {
        kind: jax.tree.map(lambda leaf: leaf.get_value(), part, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        for kind, part in parts.items()
    }
    new = sw.merge(graphdef, arrays)
    assert_same(new, model)
    assert_form(new.layer.kernel, options)
    assert new.tied is new.layer.kernel
    new(X)
    assert int(model.count[...]) == 0
    sw.update(model, {"count": 7, "layer": {"bias": jnp.ones(2)}})
    sw.update(model, nnx.state(new, nnx.BatchStat, graph=True))
    assert int(model.count[...]) == 7
    np.testing.assert_array_equal(model.norm.mean[...], new.norm.mean[...])
    assert_form(model.norm.mean, options)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_the_merge_of_flax_takes_the_parts(options: dict[str, bool]) -> None:
    model = Model(**options)
    graphdef, parts = sw.split(model, sw.Kinds.standard())
    assert_same(nnx.merge(graphdef, *parts.values()), model)
    assert_same(sw.merge(*nnx.split(model, graph=True)), model)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_gradients_and_what_the_function_writes(options: dict[str, bool]) -> None:
    model, plain = Model(**options), Model()
    loss, grads = sw.value_and_grad(lambda model, x: (model(x) ** 2).mean())(model, X)
    expected, wanted = sw.value_and_grad(lambda model, x: (model(x) ** 2).mean())(plain, X)
    np.testing.assert_array_equal(loss, expected)
    assert_same(grads, wanted)
    assert_same(model, plain)
    assert int(model.count[...]) == 1
    # The same metadata, so that both go through one `jax.tree.map`, and arrays, so that gradients can leave a trace.
    kernel = grads["layer"]["kernel"]
    assert kernel.get_metadata() == model.layer.kernel.get_metadata()
    assert isinstance(kernel.get_raw_value(), jax.Array)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_checkpoints(options: dict[str, bool], tmp_path: Path) -> None:
    state = trained(Model(**options))
    sw.save(tmp_path / "state", state)
    same, _ = sw.restore(tmp_path / "state", sw.plan(Model(), optimizers={"params": optax.adam(0.1)}).abstract())
    assert_same(dict(same), dict(state))
    back, _ = sw.restore(tmp_path / "state", state.plan.abstract())
    assert_form(state.plan.build(back).layer.kernel, options)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_layers_in_a_scan(options: dict[str, bool]) -> None:
    def stacked(**options: bool) -> Any:
        with nnx.var_defaults(**(PLAIN | options)):
            return nnx.Dict(w=nnx.Param(jnp.ones((4, 2)) * 0.5), calls=nnx.Variable(jnp.zeros(4, int)))

    def layer(layer: Any, x: Any) -> Any:
        layer.calls[...] += 1
        return x * layer.w[...]

    layers, plain = stacked(**options), stacked()
    np.testing.assert_array_equal(sw.scan_layers(layer, layers, jnp.ones(2)), jnp.full(2, 0.5**4))
    sw.scan_layers(layer, plain, jnp.ones(2))
    assert flat(nnx.state(layers, graph=True)).keys() == flat(nnx.state(plain, graph=True)).keys()
    np.testing.assert_array_equal(layers["calls"][...], plain["calls"][...])
    assert_form(layers["calls"], options)


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_model_of_them_is_made_on_a_mesh(options: dict[str, bool], devices: list[jax.Device]) -> None:
    mesh = jax.make_mesh((8,), ("d",))
    model = nnx.Dict(w=nnx.Param(jnp.arange(16.0), **options))
    plan = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("d"))).plan(model)
    state = plan.take(model, mesh=mesh)
    with nnx.var_defaults(**(PLAIN | options)):
        made = plan.init(lambda: nnx.Dict(w=nnx.Param(jnp.arange(16.0))), mesh)
    assert_same(dict(made), dict(state))
    if options != {"hijax": True, "ref": True}:  # flax 0.12.8 does not replace the reference of a hijax Variable
        plan.put(state, model)
        assert model["w"][...].sharding.is_equivalent_to(state["params"]["w"].sharding, 1)
        np.testing.assert_array_equal(model["w"][...], np.arange(16.0))


def test_references_are_read_and_written_whatever_mesh_is_set(devices: list[jax.Device]) -> None:
    """JAX refuses `reference[...]` under `jax.set_mesh` if the reference is on other devices."""
    mesh = jax.make_mesh((2,), ("d",), devices=devices[:2])
    model, plain = Model(ref=True), Model()
    plan = sw.plan(model)
    plan.put(jax.device_put(plan.take(plain), devices[0]), plain)  # which JAX does not copy under that mesh either
    with jax.set_mesh(mesh):
        state = plan.take(model)
        for options in ({}, {"mesh": mesh}, {"copy": False}):
            assert_same(dict(plan.take(plain, **options)), dict(state))
        plan.put(jax.tree.map(lambda array: array, state), model)
        built = plan.build(state)
        placed = plan.take(model, mesh=mesh)
    for each in (model, built):
        assert_same(each, plain)
        assert_form(each.layer.kernel, {"ref": True})
    plan.put(placed, model)
    with jax.set_mesh(mesh):
        assert_same(dict(plan.take(model)), dict(plan.take(plain)))
    assert len(model.layer.kernel.get_raw_value().sharding.device_set) == 2


class Refusing(nnx.Variable[Any]):
    """A Variable that takes no value from outside."""

    def set_raw_value(self, value: Any, **options: Any) -> None:
        raise RuntimeError("read-only")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_write_that_is_taken_back_leaves_the_very_references(elsewhere: bool, devices: list[jax.Device]) -> None:
    model = nnx.Dict(a=nnx.Param(jnp.ones(2), ref=True), z=Refusing(jnp.ones(2), ref=False))
    held, plan = model["a"].get_raw_value(), sw.plan(model)
    state = jax.tree.map(lambda array: array + 1, plan.take(model))
    if elsewhere:  # a new reference, which is taken back as well
        state = jax.device_put(state, devices[1])
    with pytest.raises(RuntimeError, match="read-only"):
        plan.put(state, model)
    assert model["a"].get_raw_value() is held
    assert held[...].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_an_earlier_sow_left_is_not_planned(options: dict[str, bool]) -> None:
    # A class of its own: an equal plan that is alive in another test would be this one, without what is excluded here.
    own = type("Own", (Model,), {})
    model = own(**options)
    model.layer.seen = nnx.Intermediate(jnp.ones(2), **options)  # `nnx.pop` does not find hijax Variables
    plan = sw.plan(model)
    assert [leaf.path for leaf in plan.excluded] == [("layer", "seen")]
    built = plan.build(plan.take(model))
    assert not hasattr(built.layer, "seen")
    assert_form(built.layer.kernel, options)
    assert plan == sw.plan(own(**options))


# --- what is refused ---------------------------------------------------------------------------------------------


def test_a_reference_outside_of_variables() -> None:
    model = nnx.Dict(r=nnx.data(jax.new_ref(jnp.ones(2))), w=nnx.Param(jnp.ones(2)))
    with pytest.raises(sw.StructureError, match="A reference outside of a Variable") as caught:
        sw.plan(model)
    assert [str(leaf) for leaf in caught.value.leaves] == ["r: Array(2,) float32  (a reference outside of a Variable)"]
    parses(caught.value.hint)


def test_two_variables_with_one_reference() -> None:
    model = nnx.Dict(a=nnx.Param(jnp.ones(2), ref=True), b=nnx.Param(jnp.ones(2), ref=True))
    model["b"].set_raw_value(model["a"].get_raw_value())
    with pytest.raises(sw.StructureError, match="Two Variables of the model share one reference") as caught:
        sw.plan(model)
    parses(caught.value.hint)


def test_an_array_of_a_reference_is_never_shared_with_a_model_or_a_state() -> None:
    model, given = Model(), Model(ref=True)
    sw.update(model, nnx.state(given, graph=True))
    graphdef, _ = sw.split(model, sw.Kinds.standard())
    state = sw.plan(model).take(model)
    state = state.replace(params=nnx.state(given, nnx.Param, graph=True))
    kernel = np.asarray(given.layer.kernel[...])
    given.layer.kernel[...] += 1
    np.testing.assert_array_equal(model.layer.kernel[...], kernel)
    np.testing.assert_array_equal(state["params"]["layer"]["kernel"], kernel)
    with pytest.raises(sw.StructureError, match="a reference"):
        sw.update(model, {"count": jax.new_ref(jnp.array(1))})
    with pytest.raises(sw.StructureError, match="a reference"):
        sw.merge(graphdef, [{"count": jax.new_ref(jnp.array(1))}])
    with pytest.raises(sw.StructureError, match="does not fit the plan"):
        state.replace(variables={"count": jax.new_ref(jnp.array(1))})


@pytest.mark.parametrize("options", [{"ref": True}, {"hijax": True}], ids=str)
def test_made_in_a_step_they_are_refused(options: dict[str, bool]) -> None:
    def make(model: Any) -> None:
        model.other = nnx.Intermediate(jnp.ones(2), **options)

    with pytest.raises(
        sw.StructureError, match="make makes Variables that are references, or hijax Variables"
    ) as caught:
        sw.step(make, capture="intermediates")(sw.plan(Model()).take(Model()))
    assert [leaf.path for leaf in caught.value.leaves] == [("other",)]
    parses(caught.value.hint)

    def loss(model: Any) -> Any:
        make(model)
        return model.tied[...].sum()

    with pytest.raises(sw.StructureError, match="loss makes Variables"):
        sw.grad(loss)(Model())


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_is_made_or_sown_in_a_step_is_plain_whatever_the_default(options: dict[str, bool]) -> None:
    """`nnx.capture` does not know its own hijax Variables again, and would hand out nothing."""

    class Sower(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

        def __call__(self, x: Any) -> Any:
            self.sow(nnx.Intermediate, "h", x * self.w[...])
            return x

    with nnx.var_defaults(**(PLAIN | options)):
        model = Sower()
        state = sw.plan(model).take(model)
        _, captured = sw.step(lambda model, x: model(x), capture="intermediates")(state, jnp.ones(2))
    assert captured["h"][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{"hijax": True}, {"hijax": True, "ref": True}], ids=str)
@pytest.mark.parametrize("deep", [False, True])
def test_a_hijax_variable_among_the_arguments_is_read(options: dict[str, bool], deep: bool) -> None:
    model = Model()
    state = sw.plan(model).take(model)
    v: Any = nnx.Variable(jnp.ones(()), **options)
    v = {"one": [v]} if deep else v

    def read(model: Any, v: Any) -> Any:
        return jax.tree.leaves(v)[0] + 1

    step = sw.step(read)
    assert float(step(state, v)) == float(step(state, v)) == 2.0
    assert float(step.lower(state, v).compile()(state, nnx.with_vars(v, hijax=False, ref=False))) == 2.0
    assert not sw.audit(step, state, v).error

    def write(model: Any, v: Any) -> Any:
        jax.tree.leaves(v, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0][...] += 1
        return model.tied[...]

    with pytest.raises(sw.StructureError, match="write writes to"):
        sw.step(write)(state, v)


def test_a_reference_among_the_arguments_is_written_as_under_nnx_jit() -> None:
    model = Model()
    v = nnx.Variable(jnp.ones(()), ref=True)

    def count(model: Any, v: Any) -> Any:
        v[...] += 1
        return v[...] * 10

    step = sw.step(count)
    state = sw.plan(model).take(model)
    assert [float(step(state, v)) for _ in range(2)] == [20.0, 30.0]
    assert float(v[...]) == 3.0
