"""Rules of types: what a leaf's type promises, and what it holds."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
from flax import nnx

import statewise as sw
from linted import clean, codes, finds
from statewise.examples.multi_state import BatchStat


class Derived(nnx.BatchStat):
    pass


Derived.__name__ = "BatchStat"


def test_two_types_of_one_name() -> None:
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    finds(
        "types-of-one-name",
        "2 types are called BatchStat: statewise.examples.multi_state.BatchStat, flax.nnx.variablelib.BatchStat.",
        ["a: BatchStat(2,) float32  kind=variables  (of statewise.examples.multi_state)"],
        "class BatchStat(nnx.BatchStat): ...  # a subclass, which nnx.BatchStat means too; or another name",
        nnx.Dict(a=BatchStat(jnp.ones(2)), norm=norm),
    )
    clean(nnx.Dict(a=BatchStat(jnp.ones(2))))
    clean(nnx.Dict(a=Derived(jnp.ones(2)), norm=norm))


def gate() -> type[nnx.Variable]:
    class Gate(nnx.Variable):
        pass

    return Gate


def test_two_types_of_one_name_that_are_both_the_users() -> None:
    one, other = gate(), gate()
    finds(
        "types-of-one-name",
        f"2 types are called Gate: {__name__}.Gate, {__name__}.Gate.",
        [f"b: Gate() float32  kind=variables  (of {__name__})"],
        "one class Gate, imported by both modules; or another name",
        nnx.Dict(a=one(jnp.ones(())), b=other(jnp.ones(()))),
    )


def test_a_parameter_of_integers() -> None:
    finds(
        "integer-parameter",
        "1 nnx.Param is not made of floating-point numbers.",
        ["index: Param(3,) int32  kind=params"],
        "self.index = nnx.Variable(...)  # or a kind of its own: sw.Kind(..., frozen=True)",
        nnx.Dict(index=nnx.Param(jnp.arange(3)), w=nnx.Param(jnp.ones(2))),
    )
    assert codes(nnx.Dict(key=nnx.Param(jax.random.key(0)), mask=nnx.Param(jnp.ones(2, bool)))) == ["integer-parameter"]
    clean(nnx.Dict(index=nnx.Variable(jnp.arange(3)), w=nnx.Param(jnp.ones(2, complex)), none=nnx.Param(None)))


def test_quantised_weights_in_a_frozen_kind_are_fine() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(2, jnp.int8)))
    clean(model, kinds=sw.Kinds(params=sw.Kind(nnx.Param, frozen=True)))


def test_a_parameter_without_elements() -> None:
    finds(
        "empty-parameter",
        "1 nnx.Param has no elements.",
        ["w: Param(0, 3) float32  kind=params"],
        "check the sizes that the module was made with: one is 0",
        nnx.Dict(w=nnx.Param(jnp.zeros((0, 3))), b=nnx.Param(jnp.zeros(()))),
    )
    clean(nnx.Dict(buffer=nnx.Variable(jnp.zeros((0, 3)))))


class Sows(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # new flax would rather be asked by nnx.capture
            self.sow(nnx.Intermediate, "seen", x)
        return x


def test_what_an_earlier_sow_left(hijax: bool) -> None:
    hint = "sown = nnx.pop(model, nnx.Intermediate)  # after each call"
    if hijax:
        hint = "del self.seen  # after each call; nnx.pop does not find hijax Variables"
    model = Sows()
    clean(model)
    model(jnp.ones(2))
    finds(
        "sown-values-left",
        "1 sown value was left in the model.",
        ["seen: Intermediate- -  kind=intermediates"],
        f"{hint}\nor @sw.step(capture='intermediates'), which leaves none",
        model,
    )
    exec(hint.replace("self.", "model."), {"model": model, "nnx": nnx})
    clean(model)


def test_a_perturbation_is_meant_to_stay() -> None:
    clean(nnx.Dict(p=nnx.Perturbation(jnp.zeros(2))))
