"""`sow` where flax records nothing outside a capture: what relies on it is found; who captures hears nothing."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from hints import parses
from linted import clean, codes, finds

has_setting = pytest.mark.skipif(
    not hasattr(flax.config, "nnx_sow_capture_noop"), reason="flax 0.12.8 does not have nnx_sow_capture_noop"
)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """The setting as it was before flax had it, whatever the environment says; it may change within a test."""
    setting = getattr(flax.config, "nnx_sow_capture_noop", None)
    if setting is not None:
        flax.config.update("nnx_sow_capture_noop", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # flax would rather be asked by nnx.capture
        yield
    if setting is not None:
        flax.config.update("nnx_sow_capture_noop", setting)


@pytest.fixture
def noop(as_before: None) -> None:
    """The setting under which `sow` does nothing outside `nnx.capture`."""
    flax.config.update("nnx_sow_capture_noop", True)


class Loss(nnx.Variable):
    pass


class Sows(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "seen", x)
        return x


class Perturbs(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Any) -> Any:
        return 3 * self.perturb("grad_of_x", x)


class Router(nnx.Module):
    """Adds to its output what it pops, as models with an auxiliary loss do."""

    def __init__(self) -> None:
        self.inner = Sows()

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.inner(x)
        sown = nnx.pop(self.inner, nnx.Intermediate)
        return y + sum(map(jnp.sum, jax.tree.leaves(sown)))


class Capturing(nnx.Module):
    def __init__(self) -> None:
        self.inner = Sows()

    def __call__(self, x: jax.Array) -> jax.Array:
        y, sown = nnx.capture(self.inner, nnx.Intermediate)(x)
        return y + sum(map(jnp.sum, jax.tree.leaves(sown)))


BEFORE = "or, as in earlier versions: flax.config.update('nnx_sow_capture_noop', False)"


def capture_hint(model: str, type_: str) -> str:
    call = f"output, sown = nnx.capture({model}, nnx.{type_})(x)"
    return f"with nnx.var_defaults(hijax=False): {call}" if nnx.var_defaults().hijax else call


def held_hint(type_: str, name: str) -> str:
    pop = f"nnx.pop(model, nnx.{type_})  # once: take it out of the model\n"
    if nnx.var_defaults().hijax:
        pop = f"del self.{name}  # once: take it out of the model; nnx.pop does not find hijax Variables\n"
    return f"{pop}{capture_hint('model', type_)}  # or @sw.step(capture='intermediates')\n{BEFORE}"


def pop_hint() -> str:
    return f"{capture_hint('module', 'Intermediate')}  # instead of nnx.pop\n{BEFORE}"


def test_as_long_as_sow_writes_there_is_nothing_to_find() -> None:
    model = Perturbs()
    model(1.0)
    clean(model)
    clean(Router())
    clean(Sows())


@has_setting
@pytest.mark.usefixtures("noop")
def test_who_captures_hears_nothing() -> None:
    for model in (Sows(), Perturbs(), Capturing(), nnx.Dict(a=Sows(), b=nnx.List([Sows(), Perturbs()]))):
        clean(model)
        clean(sw.plan(model))
    # They do capture: by flax alone, and in our steps.
    model = Sows()
    with nnx.var_defaults(hijax=False):  # nnx.capture collects plain Variables only
        _, sown = nnx.capture(model, nnx.Intermediate)(jnp.ones(2))
    assert jax.tree.leaves(sown)[0].shape == (2,)
    clean(model)
    plan = sw.plan(model)
    step = sw.step(lambda model, x: model(x), capture="intermediates")
    _, captured = step(plan.take(model), jnp.ones(2))
    assert jnp.array_equal(jax.tree.leaves(captured)[0], jnp.ones(2))
    with nnx.var_defaults(hijax=False):
        assert Capturing()(jnp.ones(2)).tolist() == [3.0, 3.0]


@has_setting
@pytest.mark.usefixtures("hijax")
def test_a_value_that_no_call_writes_any_more() -> None:
    model = Sows()
    model(jnp.ones(2))
    flax.config.update("nnx_sow_capture_noop", True)
    before = model.seen.get_value()
    model(jnp.zeros(2))
    assert model.seen.get_value() == before  # which is the fault: flax records nothing and says nothing
    finds(
        "sow-without-capture",
        "1 leaf is held for sow or perturb, which do not write to the model.",
        ["seen: Intermediate- -  kind=intermediates"],
        held_hint("Intermediate", "seen"),
        model,
    )
    first, second, _ = held_hint("Intermediate", "seen").splitlines()
    scope: dict[str, Any] = {"nnx": nnx, "model": model, "x": jnp.zeros(2)}
    exec(first.replace("self.", "model."), scope)
    exec(second, scope)
    clean(model)
    assert jnp.array_equal(jax.tree.leaves(scope["sown"])[0], jnp.zeros(2))
    parses(held_hint("Intermediate", "seen"))


@has_setting
@pytest.mark.usefixtures("noop")
def test_a_gradient_that_is_always_zero() -> None:
    model = Perturbs()
    model.grad_of_x = nnx.Perturbation(jnp.zeros(()))
    grads = nnx.grad(lambda model: model(1.0), argnums=nnx.DiffState(0, nnx.Perturbation))(model)
    assert float(grads["grad_of_x"][...]) == 0.0  # it is 3
    finds(
        "sow-without-capture",
        "1 leaf is held for sow or perturb, which do not write to the model.",
        ["grad_of_x: Perturbation() float32  kind=intermediates"],
        held_hint("Perturbation", "grad_of_x"),
        model,
    )
    flax.config.update("nnx_sow_capture_noop", False)  # the other hint
    grads = nnx.grad(lambda model: model(1.0), argnums=nnx.DiffState(0, nnx.Perturbation))(model)
    assert float(grads["grad_of_x"][...]) == 3.0
    clean(model)


@has_setting
@pytest.mark.usefixtures("noop")
def test_a_loss_that_is_popped_and_not_there() -> None:
    model = Router()
    assert model(jnp.ones(2)).tolist() == [1.0, 1.0]  # without the setting it is 3: flax records nothing
    finds(
        "sow-without-capture",
        "Router.__call__ pops Intermediate, but nothing records it outside of nnx.capture.",
        [],
        pop_hint(),
        model,
    )
    finds(
        "sow-without-capture",
        "Router.__call__, in the module at layers/0, pops Intermediate, but nothing records it outside of nnx.capture.",
        [],
        pop_hint(),
        nnx.Dict(layers=nnx.List([Router(), Router()])),
    )
    clean(Capturing())  # the hint, followed
    assert codes(sw.plan(model)) == ["sow-without-capture"]
    assert codes(nnx.eval_shape(Router)) == ["sow-without-capture"]


class OwnLoss(nnx.Module):
    def __init__(self) -> None:
        self.aux = Loss(jnp.zeros(()))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(Loss, "aux", x.sum(), init_fn=lambda: 0.0, reduce_fn=lambda total, new: total + new)
        return x


@has_setting
@pytest.mark.usefixtures("noop")
def test_a_type_of_the_users() -> None:
    (found,) = sw.lint(OwnLoss())
    assert found.code == "sow-without-capture"
    assert [leaf.path for leaf in found.leaves] == [("aux",)]
    assert found.hint.splitlines()[1].endswith("output, sown = nnx.capture(model, Loss)(x)")
    assert codes(sw.plan(OwnLoss()).take(OwnLoss())) == ["sow-without-capture"]


class Decides(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "seen", x, **{"capture_noop": False})
        return x


class DecidesByName(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "seen", x, capture_noop=False)  # type: ignore[call-arg, unused-ignore]
        return x


class Assigns(nnx.Module):
    """Has an Intermediate that it assigns itself, a Param under a name that it sows, and pops other things."""

    def __init__(self) -> None:
        self.h = nnx.Param(jnp.ones(2))
        self.last = nnx.Intermediate(jnp.zeros(2))
        self.old = nnx.Cache(jnp.zeros(2))

    def __call__(self, x: jax.Array, **options: Any) -> jax.Array:
        options.pop("seen", None)
        self.sow(nnx.Intermediate, "h", x)
        self.last = nnx.Intermediate(x)
        nnx.pop(self, nnx.Cache)
        return x * self.h[...]


@has_setting
@pytest.mark.usefixtures("noop")
def test_what_is_not_meant_for_sow_is_not_found() -> None:
    for model in (Decides(), DecidesByName()):
        model(jnp.ones(2))
        assert codes(model) == ["sown-values-left"]  # it does write: the other rule is right
    assert codes(Assigns()) == ["sown-values-left"]


def by_name(function: Any) -> Any:
    @functools.wraps(function)
    def wrapped(*args: Any) -> Any:
        return function(*args)

    return wrapped


def classes() -> list[type[nnx.Module]]:
    """The same, in other spellings: a nested function, a decorator, a property, a type by its name, a base class."""
    inside = nnx.Intermediate

    class Nested(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            def record(value: jax.Array) -> None:
                self.sow(inside, "seen", value)

            record(x)
            return x

    class Decorated(nnx.Module):
        @by_name
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(variable_type=nnx.Intermediate, name="seen", value=x)
            return x

    class Jitted(nnx.Module):
        @nnx.jit
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "seen", x)
            return x

    class Property(nnx.Module):
        @property
        def out(self) -> int:
            self.sow(nnx.Intermediate, "seen", 1)
            return 1

    class ByName(nnx.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow("intermediate", "seen", x)
            return x

    class Derived(Sows):
        pass

    return [Nested, Decorated, Jitted, Property, ByName, Derived]


@has_setting
@pytest.mark.usefixtures("noop")
@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_other_spellings(cls: type[nnx.Module]) -> None:
    model = cls()
    clean(model)
    model.seen = nnx.Intermediate(())  # type: ignore[attr-defined]
    assert codes(model) == ["sow-without-capture"]


@has_setting
@pytest.mark.usefixtures("noop")
def test_layers_of_flax_that_sow_are_fine() -> None:
    model = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    model(jnp.ones((1, 3, 4)), sow_weights=True)
    clean(model)


class PopsOfFlax(nnx.Module):
    """Asks a layer of Flax to sow, and pops what it should have recorded."""

    def __init__(self) -> None:
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> Any:
        return self.attention(x, sow_weights=True), nnx.pop(self.attention, nnx.Intermediate)


class CleansUp(PopsOfFlax):
    def __call__(self, x: jax.Array) -> Any:
        nnx.pop(self.attention, nnx.Intermediate)
        return self.attention(x)


@has_setting
@pytest.mark.usefixtures("noop")
def test_what_a_layer_of_flax_was_asked_to_sow_is_lost() -> None:
    model = PopsOfFlax()
    assert not jax.tree.leaves(model(jnp.ones((1, 3, 4)))[1])
    assert codes(model) == ["sow-without-capture"]
    clean(CleansUp())


class SowsAndPops(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        self.sow(nnx.Intermediate, "h", x)
        return x

    def losses(self) -> Any:
        return nnx.pop(self, nnx.Intermediate)


class Replaces(SowsAndPops):
    def losses(self) -> Any:
        return {}


class Extends(SowsAndPops):
    def losses(self) -> Any:
        return super().losses()


@has_setting
@pytest.mark.usefixtures("noop")
def test_a_method_that_another_replaces_never_runs() -> None:
    assert codes(SowsAndPops()) == codes(Extends()) == ["sow-without-capture"]
    clean(Replaces())
