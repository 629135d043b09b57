"""A plain `jax.jit` or `jax.checkpoint` of the model loses what it writes: refused, or warned of once a trace."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused
from statewise._src.step.lost_writes import dropped_inputs

X = jnp.ones((2, 3))


class Cached(nnx.Module):
    """What a decoder does: it reads what it has just written, and counts."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones(3))
        self.cache = nnx.Cache(jnp.zeros((4, 3)))
        self.index = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.cache[...] = jax.lax.dynamic_update_slice(self.cache[...], x[:1], (self.index[...], 0))
        self.index[...] += 1
        return (self.cache[...] * self.kernel[...][None]).sum(0)

    @jax.jit
    def forward(self, x: jax.Array) -> jax.Array:
        return self(x)

    @functools.partial(jax.jit, static_argnames="flag")
    def forward_static(self, x: jax.Array, flag: bool = True) -> jax.Array:
        return self(x)

    @nnx.jit
    def right(self, x: jax.Array) -> jax.Array:
        return self(x)


class Onlyreads(nnx.Module):
    """Its whole new value is read at once, so that the program does not show what was lost."""

    def __init__(self) -> None:
        self.cache = nnx.Cache(jnp.zeros(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.cache[...] = self.cache[...] + x[0]
        return self.cache[...] * 2


def state_of(*objects: Any, **options: Any) -> sw.State:
    return sw.plan(*objects, **options).take(*objects)


def run(model: Any, x: Any) -> Any:
    return model(x)


# --- refused where it is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sw.step, sw.train_step, sw.step(writes="cache")], ids=["step", "train", "curried"])
@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, functools.partial, lambda f: functools.partial(functools.partial(f))],
    ids=["as it is", "partial", "2"],
)
@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (jax.jit, "jax.jit"),
        (functools.partial(jax.jit, static_argnames="x"), "jax.jit"),
        (functools.partial(jax.jit, donate_argnums=0), "jax.jit"),
        (jax.checkpoint, "jax.checkpoint"),
        (jax.remat, "jax.checkpoint"),
        (jax.vmap, "jax.vmap"),
        (jax.grad, "jax.grad"),
        (jax.value_and_grad, "jax.value_and_grad"),
        (jax.jacfwd, "jax.jacfwd"),
        (jax.jacrev, "jax.jacrev"),
        (jax.hessian, "jax.jacfwd"),
    ],
)
def test_a_function_under_a_transform_of_jax_is_refused(transform: Any, name: str, wrap: Any, make: Any) -> None:
    with pytest.raises(sw.StructureError, match=f"received run under {name}, which would lose its writes") as caught:
        make(wrap(transform(run)))
    assert caught.value.hint


def test_what_the_refusal_of_a_jit_says() -> None:
    with refused(
        sw.StructureError,
        "sw.step received run under jax.jit, which would lose its writes to the model.",
        hint="sw.step(run), where run is the function itself: a step compiles it\n"
        "pass its options to the step: static_argnames=, donate_argnames=, out_shardings= ...",
    ):
        sw.step(jax.jit(run))


def test_a_callable_whose_call_is_a_jit_is_one() -> None:
    class Loss:
        @jax.jit
        def __call__(self, model: Any, x: Any) -> Any:
            return model(x).mean()

    with pytest.raises(sw.StructureError, match=r"under jax\.jit"):
        sw.train_step(Loss())


def test_scan_layers_refuses_one_too() -> None:
    layers = nnx.vmap(lambda key: nnx.Linear(3, 3, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 2))
    with pytest.raises(sw.StructureError, match=r"sw\.scan_layers received run under jax\.jit"):
        sw.scan_layers(jax.jit(run), layers, X)
    layer = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(sw.StructureError, match=r"sw\.scan_layers received a model"):
        sw.scan_layers(layer, layers, X)


HINTED: dict[str, Callable[..., Any]] = {
    "nnx.jit": nnx.jit(run),
    "nnx.remat": nnx.remat(run),
    "nnx.jit of nnx.remat": nnx.jit(nnx.remat(run)),
    "partial of nnx.jit": functools.partial(nnx.jit(run)),
    "jax.named_call": jax.named_call(run),
    "jax.named_scope": jax.named_scope("run")(run),
    "annotate_function": jax.profiler.annotate_function(run),
    "vmap in the body": lambda model, x: jax.vmap(lambda y: y * 2)(model(x)),
}


@pytest.mark.parametrize("name", HINTED)
def test_what_brings_the_writes_back_is_accepted(name: str) -> None:
    state = state_of(Cached())
    step = sw.step(HINTED[name], writes="cache")
    for turn in (1, 2):
        state, _ = step(state, X)
        assert int(state["cache"]["index"]) == turn
    assert sw.audit(step, state, X).warnings == ()


# --- a kind that is declared, and not written ------------------------------------------------------------------------

LOSING: dict[str, Callable[..., Any]] = {
    "jax.jit of a function": lambda model, x: jax.jit(run)(model, x),
    "jax.jit of a method": lambda model, x: model.forward(x),
    "jax.jit with static arguments": lambda model, x: model.forward_static(x, flag=False),
    "jax.jit of the type's call": lambda model, x: jax.jit(type(model).__call__)(model, x),
    "jax.checkpoint": lambda model, x: jax.checkpoint(run)(model, x),
    "jit in a jit": lambda model, x: jax.jit(lambda m, x: jax.jit(run)(m, x))(model, x),
    "nnx.jit in a jit": lambda model, x: jax.jit(lambda m, x: m.right(x))(model, x),
    "jit in a nnx.jit": lambda model, x: nnx.jit(lambda m, x: m.forward(x))(model, x),
    "jit in a scan": lambda model, x: jax.lax.scan(lambda c, _: (c + jax.jit(run)(model, x), None), x[0], length=2)[0],
    "jit in a branch": lambda model, x: jax.lax.cond(x.sum() > 0, lambda: model.forward(x), lambda: x[0]),
}


@pytest.mark.parametrize("name", LOSING)
def test_a_kind_that_is_named_and_not_written_is_warned_of_once_a_trace(name: str) -> None:
    def decode(model: Any, x: Any) -> Any:
        return LOSING[name](model, x)

    step, state = sw.step(decode, writes="cache"), state_of(Cached())
    with pytest.warns(sw.StatewiseWarning) as caught:
        state, _ = step(state, X)
    assert len(caught) == 1
    warning = caught[0].message
    assert isinstance(warning, sw.StatewiseWarning)
    assert warning.message == "decode declares that it writes cache, but never writes it."
    # The cache is read at once as well; but where an inner transform hands it out, it is seen that nobody takes it.
    assert [str(leaf) for leaf in warning.leaves][-1:] == [
        "index: Cache() int32  kind=cache  (written under a plain jax.jit or jax.checkpoint)"
    ]
    assert {sw.format_path(leaf.path) for leaf in warning.leaves} <= {"cache", "index"}
    assert str(warning.hint).startswith("if it writes under a plain jax.jit or jax.checkpoint")
    assert int(state["cache"]["index"]) == 0  # it is so
    state, _ = step(state, X)  # and no word more, for nothing is traced
    with pytest.warns(sw.StatewiseWarning):
        step(state, jnp.ones((3, 3)))


@pytest.mark.parametrize("name", LOSING)
def test_without_a_declaration_it_is_warned_of_as_well(name: str) -> None:
    def decode(model: Any, x: Any) -> Any:
        return LOSING[name](model, x)

    with pytest.warns(sw.StatewiseWarning) as caught:
        sw.step(decode)(state_of(Cached()), X)
    assert len(caught) == 1
    lines = str(caught[0].message).splitlines()
    assert lines[0] == "decode writes cache under a plain jax.jit or jax.checkpoint, and the write is lost."
    assert lines[-2:] == [
        "  index: Cache() int32  kind=cache  (written under a plain jax.jit or jax.checkpoint)",
        "  hint: nnx.jit instead of jax.jit, nnx.remat instead of jax.checkpoint",
    ]


def test_what_is_lost_and_used_as_well_is_seen_where_it_is_declared() -> None:
    step = sw.step(lambda model, x: jax.jit(run)(model, x), writes="cache")
    with pytest.warns(sw.StatewiseWarning, match="declares that it writes cache") as caught:
        step(state_of(Onlyreads()), X)
    warning = caught[0].message
    assert isinstance(warning, sw.StatewiseWarning)
    assert warning.leaves == ()


def test_in_training_statistics_and_dropout_under_jax_checkpoint() -> None:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.dropout(self.norm(self.linear(x)))

    state = state_of(Net(), optimizers={"params": optax.sgd(0.1)})
    with pytest.warns(sw.StatewiseWarning, match=r"writes stats, rng under a plain jax\.jit") as caught:
        sw.train_step(lambda model, x: (jax.checkpoint(run)(model, x) ** 2).mean())(state, X)
    warning = caught[0].message
    assert isinstance(warning, sw.StatewiseWarning)
    assert [sw.format_path(leaf.path) for leaf in warning.leaves] == ["norm/mean", "norm/var", "dropout/rngs/count"]

    state = state_of(Net(), optimizers={"params": optax.sgd(0.1)})
    train = sw.train_step(lambda model, x: (nnx.remat(run)(model, x) ** 2).mean())
    state, _ = train(state, X)  # as the hint has it: no warning, and both are written
    model = Net()
    nnx.jit(lambda model: model(X))(model)
    np.testing.assert_allclose(state["stats"]["norm"]["mean"], model.norm.mean[...], rtol=1e-6)
    assert int(state["rng"]["dropout"]["rngs"]["count"]) == int(model.dropout.rngs.count[...]) == 1


def test_the_audit_says_the_same_printed_and_as_data() -> None:
    def decode(model: Any, x: Any) -> Any:
        return model.forward(x)

    state = state_of(Cached())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is told, not warned of
        audit = sw.audit(sw.step(decode, writes="cache"), state, X)
    (warning,) = audit.warnings
    assert isinstance(warning, sw.StatewiseWarning)
    assert warning.kind == "cache"
    assert "index  cache  written under a plain jax.jit or jax.checkpoint" in str(audit)
    (told,) = json.loads(audit.to_json())["warnings"]
    assert told["message"] == warning.message
    assert told["kind"] == "cache"
    assert [leaf["path"] for leaf in told["leaves"]] == ["index"]
    assert sw.audit(decode, (Cached(),), X).warnings[0].kind == "cache"  # a plain function, which declares nothing


def test_a_kind_without_leaves_is_nothing_to_write() -> None:
    step = sw.step(run, writes=("cache", "stats"))
    state, _ = step(state_of(Cached()), X)
    assert sw.audit(step, state, X).warnings == ()


def test_a_function_that_does_not_write_under_a_jit_is_not_warned_of() -> None:
    def forward(model: Any, x: Any) -> Any:
        _ = model.kernel[...] * 2  # computed for nothing, but nothing that functions write
        return jax.jit(lambda m, x: m.cache[...] * m.kernel[...][None] + x.sum())(model, x)

    step, state = sw.step(forward), state_of(Cached())
    assert sw.audit(step, state, X).warnings == ()
    assert step(state, X).shape == (4, 3)

    def functional(model: Any, x: Any) -> Any:
        def inner(m: Any, x: Any) -> Any:
            return m(x), m.index[...], m.cache[...]

        out, model.index[...], model.cache[...] = jax.jit(inner)(model, x)
        return out

    step = sw.step(functional, writes="cache")
    state, _ = step(state, X)
    assert int(state["cache"]["index"]) == 1
    assert sw.audit(step, state, X).warnings == ()


def test_a_stream_that_is_forked_for_nobody_is_not_written() -> None:
    """`nnx.RNN` makes a carry of zeros with a stream of its own, whose keys nobody uses; its count is written."""
    model = nnx.RNN(nnx.LSTMCell(3, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(carry=1))
    step = sw.step(lambda model, x: nnx.remat(run)(model, x), writes="rng")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(state_of(model), jnp.ones((2, 4, 3)))


@pytest.mark.parametrize("transform", ["vmap", "scan"])
def test_what_is_lost_under_other_transforms_is_named_in_the_hint(transform: str) -> None:
    def decode(model: Any, x: Any) -> Any:
        if transform == "vmap":
            return jax.vmap(run, in_axes=(None, 0))(model, x[None])
        return jax.lax.scan(lambda model, x: (model, model(x)), model, x[None])[1]

    with pytest.warns(sw.StatewiseWarning, match="declares that it writes cache") as caught:
        sw.step(decode, writes="cache")(state_of(Cached()), X)
    assert f"nnx.{transform}" in str(caught[0].message)


def test_dropped_values_are_told_from_those_that_come_back() -> None:
    @jax.jit
    def body(count: Any, mean: Any, other: Any, x: Any) -> Any:
        _ = count + 1
        mean = 0.9 * mean + 0.1 * x.mean(0)
        _ = other.sum() * 2  # of another shape: not a new value of it
        return x * 2, mean

    closed = jax.make_jaxpr(body)(jnp.zeros(()), jnp.zeros(3), jnp.zeros(3), X)
    assert dropped_inputs(closed, [0, 1, 2]) == {0}
    assert dropped_inputs(closed, [1, 2]) == frozenset()


# --- what the decorators are given -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shown", "hint"),
    [
        (
            lambda: sw.train_step(run, wrt=nnx.Param),
            "wrt=...) takes names of kinds, not the type nnx.Param",
            "wrt='params'",
        ),
        (lambda: sw.train_step(wrt=nnx.Param), "wrt=...) takes names of kinds, not the type nnx.Param", "wrt='params'"),
        (
            lambda: sw.train_step(run, wrt=(nnx.Param, nnx.LoRAParam)),
            "not the type nnx.Param",
            "wrt=('params', 'lora')",
        ),
        (lambda: sw.step(run, writes=nnx.BatchStat), "writes=...) takes names", "writes='stats'"),
        (lambda: sw.step(run, writes=["stats", nnx.Cache]), "not the type nnx.Cache", "writes=('stats', 'cache')"),
        (lambda: sw.step(run, capture=nnx.Intermediate), "capture=...) takes names", "capture='intermediates'"),
        (lambda: sw.train_step(run, wrt=sw.Path("head/**")), "not a Path", "print(plan)"),
        (lambda: sw.train_step(run, wrt=...), "not Ellipsis", "or leave wrt out"),
        (lambda: sw.step(run, writes=True), "not True", "writes='params'"),
    ],
)
def test_names_of_kinds_are_asked_for_where_something_else_is_given(make: Any, shown: str, hint: str) -> None:
    with pytest.raises(sw.DeclarationError) as caught:
        make()
    assert shown in caught.value.message
    assert hint in str(caught.value.hint)


def test_the_hint_for_nnx_param_trains() -> None:
    state = state_of(nnx.Linear(3, 1, rngs=nnx.Rngs(0)), optimizers={"params": optax.sgd(0.1)})
    state, _ = sw.train_step(lambda model, x: model(x).mean(), wrt="params")(state, X)
    assert state["params"]["bias"][0] != 0


def test_a_function_of_fewer_objects_than_were_planned() -> None:
    linear, rngs = nnx.Linear(3, 1, rngs=nnx.Rngs(0)), nnx.Rngs(0)
    state = state_of(linear, rngs)
    with refused(
        sw.StructureError,
        "f takes 2 positional arguments; it must take the plan's 2 objects first, and 1 more.",
        hint="def f(model, rngs, x): ...",
    ):

        def f(model: Any, x: Any) -> Any:
            return model(x)

        sw.step(f)(state, X)
    with refused(
        sw.StructureError,
        "<lambda> takes 0 positional arguments; it must take the plan's 1 object first.",
        hint="def f(model): ...",
    ):
        sw.step(lambda: 0)(state_of(linear))
    assert sw.step(lambda model, rngs, x: model(x))(state, X).shape == (2, 1)
    assert sw.step(lambda model, *rest: model(rest[-1]))(state, X).shape == (2, 1)
    with pytest.raises(TypeError, match="required"):  # an argument that is missing is Python's own to tell
        sw.step(lambda model, x: model(x))(state_of(linear))
