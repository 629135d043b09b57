"""What stacked layers make: sown values, perturbations, Variables of their own; equal to `nnx.scan`, in every place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import statewise as sw
from hints import parses
from refusals import refused

X = jax.random.normal(jax.random.key(5), (3, 4))
ModelGraph = Callable[[Any, Any, Any], Any]


class Side(nnx.Variable):
    """What one call gives, of a type that is no nnx.Intermediate."""


def ours(fn: Any, layers: Any, x: Any) -> Any:
    return sw.scan_layers(fn, layers, x)


def theirs(fn: Any, layers: Any, x: Any) -> Any:
    return nnx.scan(fn, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(layers, x)


def rematerialised(scan: ModelGraph) -> ModelGraph:
    return lambda fn, layers, x: scan(nnx.remat(fn), layers, x)


def stacked(make: Any, number: int) -> Any:
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(jax.random.key(0), number))


class Cell(nnx.Module):
    """Sows in every way that `sow` has, perturbs, and assigns Variables to every place that can hold one."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.box = nnx.Dict()
        self.held = nnx.data({})
        self.row = nnx.data([])
        self.none = None

    def __call__(self, x: Any) -> Any:
        x = self.norm(self.dense(x))
        self.sow(nnx.Intermediate, "h", x)
        self.sow(nnx.Intermediate, "h", x + 1)
        total: Any = {"reduce_fn": lambda a, b: a + b.sum(), "init_fn": lambda: jnp.zeros(())}
        self.sow(nnx.Intermediate, "total", x, **total)
        joined: Any = {"reduce_fn": lambda a, b: jnp.concatenate([a, b]), "init_fn": lambda: jnp.zeros((0, 4))}
        self.sow(nnx.Intermediate, "joined", x[:1], **joined)
        x = self.perturb("p", x)
        self.kl = Side(x.sum())
        self.box.a = Side({"u": x.sum() + 1, "v": x})
        self.held["z"] = Side(x.sum() + 3)
        self.made = nnx.Dict(q=Side(x.mean()))
        self.none = nnx.data(Side(x.max()))
        if self.row:
            self.row[0] = Side(x.sum() + 2)
        else:
            self.row += [Side(x.sum() + 2), Side(x.sum() + 4)]
        return jnp.tanh(x)


class Outer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.cells = nnx.vmap(lambda key: Cell(nnx.Rngs(key)))(jax.random.split(rngs.params(), 2))

    def __call__(self, x: Any, scan: ModelGraph) -> Any:
        y = scan(Cell.__call__, self.cells, x)
        self.sow(nnx.Intermediate, "y", y)
        return y


class Model(nnx.Module):
    """Scans in scans."""

    def __init__(self, scan: ModelGraph = ours) -> None:
        self.outers = stacked(Outer, 3)
        self.scan = scan

    def __call__(self, x: Any) -> Any:
        return self.scan(lambda outer, x: outer(x, self.scan), self.outers, x)


def same(one: Any, other: Any) -> None:
    """Asserts equal structures, shapes and dtypes, and equal values to rounding."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def leaves(model: Any) -> dict[Any, Any]:
    return {path: (type(leaf), leaf.get_raw_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def same_model(one: Any, other: Any) -> None:
    mine, expected = leaves(one), leaves(other)
    assert mine.keys() == expected.keys()
    for path, (type_, value) in mine.items():
        assert type_ is expected[path][0]
        same(value, expected[path][1])


# --- outside of a step -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda scan: scan, rematerialised], ids=["", "remat"])
def test_a_model_has_afterwards_what_nnx_scan_leaves_in_it(wrap: Any) -> None:
    one, other = Model(wrap(ours)), Model(wrap(theirs))
    for _ in range(2):  # what the first call left is there in the second
        same(one(X), other(X))
        same_model(one, other)
    assert one.outers.cells.kl[...].shape == (3, 2)
    assert one.outers.cells.h.get_value()[0].shape == (3, 2, 3, 4)


@pytest.mark.parametrize("wrap", [lambda scan: scan, rematerialised], ids=["", "remat"])
def test_under_nnx_capture(wrap: Any) -> None:
    one, other = Model(wrap(ours)), Model(wrap(theirs))
    types = (nnx.Intermediate, nnx.Perturbation)
    for _ in range(2):
        same(nnx.capture(one, *types)(X), nnx.capture(other, *types)(X))
        same_model(one, other)


def test_gradients_of_perturbations() -> None:
    _, perturbations = nnx.capture(Model(), nnx.Perturbation)(X)

    def grads(scan: ModelGraph) -> Any:
        def loss(model: Any, perturbations: Any) -> Any:
            out, sown = nnx.capture(model, nnx.Intermediate, init=perturbations)(X)
            return out.sum(), sown

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(Model(scan), perturbations)

    mine = grads(ours)
    same(mine, grads(theirs))
    assert float(jnp.abs(mine[0][1]["outers"]["cells"]["p"].get_value()).max()) > 0


class Named(nnx.Module):
    """Sows under given names, some of them several times, and passes several times."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.w = nnx.Param(rngs.params.normal((4,)))
        self.count = nnx.Cache(jnp.zeros((), int))

    def __call__(self, x: Any, names: Any) -> Any:
        self.count[...] += 1
        for number, name in enumerate(names):
            self.sow(nnx.Intermediate, name, {"x": x * number, "w": self.w[...]})
        return x * self.w[...]


@settings(max_examples=12, deadline=None)
@given(
    names=st.lists(st.sampled_from(["a", "b", "c"]), max_size=4),
    layers=st.integers(1, 3),
    passes=st.integers(1, 2),
    reverse=st.booleans(),
)
def test_any_names_any_number_of_times(names: list[str], layers: int, passes: int, reverse: bool) -> None:
    def through(model: Any, scan: ModelGraph) -> Any:
        x = X[0]
        for _ in range(passes):
            x = scan(lambda layer, x: layer(x, names), model, x)
        return x

    def mine(fn: Any, model: Any, x: Any) -> Any:
        return sw.scan_layers(fn, model, x, reverse=reverse)

    def expected(fn: Any, model: Any, x: Any) -> Any:
        return nnx.scan(fn, in_axes=(0, nnx.Carry), out_axes=nnx.Carry, reverse=reverse)(model, x)

    one, other = stacked(Named, layers), stacked(Named, layers)
    found = nnx.capture(lambda model: through(model, mine), nnx.Intermediate)(one)
    same(found, nnx.capture(lambda model: through(model, expected), nnx.Intermediate)(other))
    same_model(one, other)


# --- in steps --------------------------------------------------------------------------------------------------------

KINDS = sw.Kinds.standard() | sw.Kinds(sides=sw.Kind(Side, saved=False))


@pytest.mark.parametrize("scan", [ours, rematerialised(ours)], ids=["", "remat"])
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_step_captures_them(scan: ModelGraph, called_before: bool) -> None:
    model, plain = Model(scan), Model(theirs)
    types = (nnx.Intermediate, nnx.Perturbation)
    expected, *sown = nnx.capture(plain, *types)(X)
    if called_before:
        model(X)
        for path, leaf in leaves(Model()).items():  # the statistics as they were
            nnx.update(model, nnx.from_flat_state([(path, leaf[0](leaf[1]))]))
    plan = KINDS.plan(model)
    step = sw.step(lambda model, x: model(x), writes="stats", capture=("intermediates", "sides"))
    state, (out, captured) = step(plan.take(model), X)
    same(out, expected)
    cells = captured["intermediates"]["outers"]["cells"]
    both = nnx.to_pure_dict(nnx.merge_state(*sown))["outers"]["cells"]
    assert cells.keys() >= {"h", "total", "joined"} == both.keys() - {"p"}
    for name in ("h", "total", "joined"):
        same(cells[name], both[name])
    sides = captured["sides"]["outers"]["cells"]
    for name, value in (("kl", plain.outers.cells.kl), ("none", plain.outers.cells.none)):
        same(sides[name], value[...])
    same(dict(sides["box"]["a"]), plain.outers.cells.box.a.get_value())
    same(sides["held"]["z"], plain.outers.cells.held["z"][...])
    same(state["stats"]["outers"]["cells"]["norm"]["mean"], plain.outers.cells.norm.mean[...])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_train_step_differentiates_through_them() -> None:
    """The loss is made of what the layers sowed and assigned alone."""

    class Layers(nnx.Module):
        def __init__(self, scan: ModelGraph) -> None:
            self.layers, self.scan = stacked(Layer, 3), scan

        def __call__(self, x: Any) -> Any:
            self.scan(Layer.__call__, self.layers, x)
            return (self.layers.kl.get_value() ** 2).sum()

    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.tanh(self.dense(x))
            self.sow(nnx.Intermediate, "h", x)
            self.kl = Side(x.mean())
            return x

    model, plain = Layers(ours), Layers(theirs)
    grads = nnx.grad(lambda model: model(X))(plain)
    kernel = plain.layers.dense.kernel[...] - 0.1 * grads["layers"]["dense"]["kernel"][...]
    state = KINDS.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model)
    train = sw.train_step(lambda model, x: model(x), capture=("sides", "intermediates"))
    state, (_, captured) = train(state, X)
    same(state["params"]["layers"]["dense"]["kernel"], kernel)
    assert captured["intermediates"]["layers"]["h"][0].shape == (3, 3, 4)
    same(captured["sides"]["layers"]["kl"], plain.layers.kl[...])


def test_a_state_of_layers_and_a_step_that_captures() -> None:
    layers = stacked(Named, 3)
    one = Named(nnx.Rngs(0))
    plan = sw.plan(one)
    step = sw.step(lambda layer, x: layer(x, ["a", "b"]), writes="cache", capture="intermediates")
    states = jax.vmap(lambda w, count: plan.take(one).replace(params={"w": w}, cache={"count": count}))(
        layers.w[...], layers.count[...]
    )
    after, (out, captured) = sw.scan_layers(step, states, X[0])
    expected, sown = nnx.capture(lambda model: theirs(lambda m, x: m(x, ["a", "b"]), model, X[0]), nnx.Intermediate)(
        layers
    )
    same(out, expected)
    for name in ("a", "b"):
        same([dict(value) for value in captured[name]], list(nnx.to_pure_dict(sown)[name]))
    same(after["cache"]["count"], layers.count[...])


def test_uncaptured_the_refusal_names_the_path_in_the_model() -> None:
    class Sower(nnx.Module):
        def __init__(self) -> None:
            self.layers = stacked(Named, 2)

        def __call__(self, x: Any) -> Any:
            return sw.scan_layers(lambda layer, x: layer(x, ["a"]), self.layers, x)

    model = Sower()
    state = sw.plan(model).take(model)
    with (
        pytest.warns(DeprecationWarning, match="outside of 'nnx.capture"),
        refused(
            sw.StructureError,
            "<lambda> changes which Variables the model has; a state cannot take new ones.",
            leaves=["layers/a: Intermediate- -  (made by the function)"],
            hint="capture='intermediates'  # in the step's decorator: "
            "returns what is sown or assigned beside the output",
        ) as caught,
    ):
        sw.step(lambda model, x: model(x), writes="cache")(state, X[0])
    parses(caught.value.hint)


# --- shared by all layers --------------------------------------------------------------------------------------------


class Shares(nnx.Module):
    """Of what is shared, the one is read and the other written; what is sown is each layer's own all the same."""

    def __init__(self, scale: Any) -> None:
        self.aside = nnx.Variable(jnp.ones(2))
        self.bias = nnx.Variable(jnp.ones(4))
        self.scale = nnx.Param(jnp.asarray(scale))
        self.total = nnx.Variable(jnp.zeros(()))

    def __call__(self, x: Any) -> Any:
        self.total[...] += x.sum()
        x = x * self.scale[...] + self.bias[...]
        self.sow(nnx.Intermediate, "x", x)
        return x


def test_what_is_sown_beside_shared_leaves() -> None:
    model = Shares([2.0, 3.0])
    shared = nnx.Any(nnx.Variable) & ~sw.Exactly(nnx.Param)

    def run(model: Any) -> Any:
        x = sw.scan_layers(Shares.__call__, model, X[0], shared=shared)
        return sw.scan_layers(Shares.__call__, model, x, shared=shared)

    with nnx.var_defaults(hijax=False):  # nnx.capture collects plain Variables only
        out, sown = nnx.capture(run, nnx.Intermediate)(model)
    total, x, expected = jnp.zeros(()), X[0], []
    for scale in (2.0, 3.0, 2.0, 3.0):
        total, x = total + x.sum(), x * scale + 1
        expected.append(x)
    same(out, expected[-1])
    same(model.total[...], total)
    same(model.aside[...], jnp.ones(2))
    same(list(sown["x"].get_value()), [jnp.stack(expected[:2]), jnp.stack(expected[2:])])


def test_shared_leaves_that_become_something_else_and_removed_ones_are_refused() -> None:
    class Breaks(Shares):
        def __call__(self, x: Any) -> Any:
            self.total.set_raw_value(jnp.zeros(3))
            self.bias = nnx.Variable(jnp.ones(4))
            del self.scale
            return x

    model = Breaks([2.0, 3.0])
    before = leaves(model)
    with refused(
        sw.StructureError,
        "__call__ removes leaves of its layer, or changes what all layers share.",
        leaves=[
            "bias: Variable(4,) float32  (replaced by another Variable)",
            "scale: Param(2,) float32  (removed)",
            "total: Variable() float32  (becomes (3,) float32)",
        ],
        hint="assign a value of the leaf's own shape and dtype: leaf[...] = value.astype(leaf.dtype)\n"
        "if a layer removes a leaf, remove it from all of them: nnx.pop(layers, filter)  # before the scan",
    ) as caught:
        sw.scan_layers(Breaks.__call__, model, X[0], shared=sw.Exactly(nnx.Variable))
    parses(caught.value.hint)
    assert all(leaves(model)[path][1] is value for path, (_, value) in before.items())


def test_without_compilation_the_function_itself_is_run() -> None:
    calls: list[Any] = []

    def run(layer: Any, x: Any) -> Any:
        calls.append(x)
        return layer(x, ["a"])

    one, other = stacked(Named, 3), stacked(Named, 3)
    with jax.disable_jit():
        found = nnx.capture(lambda model: ours(run, model, X[0]), nnx.Intermediate)(one)
    assert len(calls) == 4  # traced once, then run for each layer
    same(found, nnx.capture(lambda model: ours(run, model, X[0]), nnx.Intermediate)(other))


def test_a_first_value_of_an_assumed_dtype() -> None:
    layers = nnx.Dict(w=nnx.Param(jnp.ones(3, jnp.bfloat16)))
    out = sw.scan_layers(lambda layer, x: x * layer.w[...], layers, 2.0)
    assert out.dtype == jnp.bfloat16
