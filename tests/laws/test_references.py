"""Variables that are references or hijax's own: every verb that takes a model refuses them, with a hint that helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from hints import parses

MEND = (
    "model = nnx.with_vars(model, hijax=False, ref=False, allow_duplicates=True)  # a copy, of plain Variables\n"
    "or, for all that is made from then on: nnx.var_defaults(hijax=False, ref=False)"
)
X = jnp.ones((1, 2))


class Model(nnx.Module):
    """Its weight is tied; what it holds is of the kind that is asked for."""

    def __init__(self, **options: bool) -> None:
        with nnx.var_defaults(**options):
            self.count = nnx.Variable(jnp.array(0))
            self.w = nnx.Param(jnp.full((2, 2), 2.0))
            self.tied = self.w

    def __call__(self, x: Any) -> Any:
        self.count[...] += 1
        return x @ self.w[...] @ self.tied[...]


def watched(model: Any) -> None:
    with sw.watch(model):
        pass


PLAIN = Model(hijax=False)
VERBS: list[Callable[[Any], Any]] = [
    sw.plan,
    lambda model: sw.plan(model, PLAIN),
    lambda model: sw.plan(PLAIN).take(model),
    lambda model: sw.plan(PLAIN).put(sw.plan(PLAIN).take(PLAIN), model),
    sw.census,
    lambda model: sw.select(model, nnx.Param),
    lambda model: sw.count(model, nnx.Param),
    lambda model: sw.explain(model, nnx.Param),
    sw.lint,
    lambda model: sw.split(model, sw.Kinds.standard()),
    lambda model: sw.update(model, {"count": jnp.array(1)}),
    lambda model: sw.diff(model, PLAIN),
    lambda model: sw.audit(lambda model: model(X), model),
    sw.value_and_grad(lambda model: model(X).sum()),
    sw.grad(lambda model: model(X).sum()),
    lambda model: sw.scan_layers(lambda layer, x: x, model, X),
    watched,
]


@pytest.mark.parametrize("options", [{"ref": True}, {"hijax": True}, {"hijax": True, "ref": True}], ids=str)
@pytest.mark.parametrize("verb", VERBS, ids=range(len(VERBS)))
def test_every_verb_refuses_them(verb: Callable[[Any], Any], options: dict[str, bool]) -> None:
    model = Model(**options)
    with pytest.raises(sw.StructureError, match="references, or hijax Variables") as caught:
        verb(model)
    error = caught.value
    note = ", ".join(f"{name}=True" for name in sorted(options))
    assert [str(leaf).partition("count")[2] for leaf in error.leaves if "count" in leaf.path] == [
        f": Variable() int32  ({note})"
    ]
    assert len(error.leaves) == 2
    assert error.hint == MEND
    parses(error.hint)
    assert int(model.count[...]) == 0


@pytest.mark.parametrize("options", [{"ref": True}, {"hijax": True}, {"hijax": True, "ref": True}], ids=str)
def test_the_hint_makes_them_plain(options: dict[str, bool]) -> None:
    model = Model(**options)
    given = model
    scope: dict[str, Any] = {"nnx": nnx, "model": model}
    exec(MEND.splitlines()[0], scope)
    model = scope["model"]
    assert model.w is model.tied
    state = sw.plan(model).take(model)
    state, out = sw.step(lambda model, x: model(x), writes="variables")(state, X)
    np.testing.assert_array_equal(out, given(X))
    sw.plan(model).put(state, model)
    assert int(model.count[...]) == int(given.count[...]) == 1


def test_a_reference_outside_of_variables() -> None:
    with pytest.raises(sw.StructureError, match=r"r: Ref\(2,\) float32|r: Array\(2,\) float32"):
        sw.plan(nnx.Dict(r=nnx.data(jax.new_ref(jnp.ones(2))), w=nnx.Param(jnp.ones(2))))


def test_an_array_of_a_reference_is_never_shared_with_a_model_or_a_state() -> None:
    model, given = Model(hijax=False), Model(ref=True)
    with pytest.raises(sw.StructureError, match="a reference"):
        sw.update(model, nnx.state(given))
    graphdef, parts = sw.split(model, sw.Kinds.standard())
    parts["params"] = nnx.state(given, nnx.Param)
    with pytest.raises(sw.StructureError, match="a reference"):
        sw.merge(graphdef, parts)
    state = sw.plan(model).take(model)
    with pytest.raises(sw.StructureError, match="does not fit the plan"):
        state.replace(params=nnx.state(given, nnx.Param))
    assert float(model.w[...].sum()) == 8


@pytest.mark.parametrize("options", [{"ref": True}, {"hijax": True}], ids=str)
def test_made_in_a_step_they_are_refused_too(options: dict[str, bool]) -> None:
    model = Model(hijax=False)

    def make(model: Any) -> None:
        model.other = nnx.Intermediate(jnp.ones(2), **options)

    with pytest.raises(sw.StructureError, match="references, or hijax Variables"):
        sw.step(make, capture="intermediates")(sw.plan(model).take(model))


def test_what_is_sown_is_captured_where_hijax_is_the_default() -> None:
    """`nnx.capture` does not know its own hijax Variables again, and would hand out nothing."""

    class Sower(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(2))

        def __call__(self, x: Any) -> Any:
            self.sow(nnx.Intermediate, "h", x * self.w[...])
            return x

    model = Sower()
    state = sw.plan(model).take(model)
    with nnx.var_defaults(hijax=True):
        _, captured = sw.step(lambda model, x: model(x), capture="intermediates")(state, jnp.ones(2))
    assert captured["h"][0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("options", [{"hijax": True}, {"hijax": True, "ref": True}], ids=str)
@pytest.mark.parametrize("deep", [False, True])
def test_a_hijax_variable_among_the_arguments_is_refused_and_the_hint_helps(
    options: dict[str, bool], deep: bool
) -> None:
    model = Model(hijax=False)
    state = sw.plan(model).take(model)
    v: Any = nnx.Variable(jnp.ones(()), **options)
    v = {"one": [v]} if deep else v

    def read(model: Any, v: Any) -> Any:
        return jax.tree.leaves(v)[0] + 1

    step = sw.step(read)
    with pytest.raises(sw.StructureError, match="The argument v of read holds a hijax Variable") as caught:
        step(state, v)
    scope = {"nnx": nnx, "v": v}
    exec(str(caught.value.hint), scope)
    assert float(step(state, scope["v"])) == 2.0


def test_a_reference_among_the_arguments_is_written_as_under_nnx_jit() -> None:
    model = Model(hijax=False)
    v = nnx.Variable(jnp.ones(()), ref=True)

    def count(model: Any, v: Any) -> Any:
        v[...] += 1
        return v[...] * 10

    step = sw.step(count)
    state = sw.plan(model).take(model)
    assert [float(step(state, v)) for _ in range(2)] == [20.0, 30.0]
    assert float(v[...]) == 3.0
