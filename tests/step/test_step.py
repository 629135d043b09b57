"""What a step's function may not do, and what a step may not be given: each refused in full, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from comparing import same
from refusals import refused
from strategies import Node, OwnStat

KINDS = sw.Kinds(
    params=sw.Kind(nnx.Param),
    stats=sw.Kind(OwnStat),
    base=sw.Kind(nnx.BatchStat, frozen=True),
    cache=sw.Kind(nnx.Cache, saved=False),
    rest=sw.Kind(...),
)


def model() -> Node:
    return Node(
        w=nnx.Param(jnp.ones((2, 3))),
        inner=Node(stat=OwnStat(jnp.zeros(3)), count=nnx.Variable(jnp.array(0))),
        base=nnx.BatchStat(jnp.ones(2)),
        cache=nnx.Cache(jnp.zeros((4,), jnp.bfloat16)),
        raw=nnx.data(jnp.ones(2)),
        two=nnx.Variable({"a": jnp.ones(1), "b": jnp.ones(())}),
    )


TX = optax.sgd(0.1)


def taken() -> sw.State:
    return KINDS.plan(model(), optimizers={"params": TX}).take(model())


def refuses(make: Callable[..., Any], *args: Any, **expected: Any) -> None:
    """A step refuses, twice alike; the state is as it was, and other steps go on with it."""
    state = taken()
    for _ in range(2):
        with refused(sw.StructureError, **expected):
            make()(state, *args)
    assert same(state, taken())
    _, loss = sw.train_step(lambda model: model.w[...].sum())(state)
    assert float(loss) == 6


# --- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message", "hint"),
    [
        (lambda m: m.w[...].sum(0), "The loss of loss is not a scalar: its shape is (3,).", "return loss.mean()"),
        (lambda m: m.w[0:1, 0], "The loss of loss is not a scalar: its shape is (1,).", "return loss.mean()"),
        (
            lambda m: m.w[...].sum() + 1j,
            "The loss of loss is complex64, not a real floating-point number.",
            "return loss.real",
        ),
        (
            lambda m: m.inner.count[...],
            "The loss of loss is int32, not a real floating-point number.",
            "return loss.astype(jnp.float32)",
        ),
        (
            lambda m: m.w[0, 0] > 0,
            "The loss of loss is bool, not a real floating-point number.",
            "return loss.astype(jnp.float32)",
        ),
        (
            lambda m: (m.w[...].sum(), {"x": m.w[0, 0]}),
            "loss returns PyTreeDef((*, {'x': *})), not a loss.",
            "@sw.train_step(has_aux=True)",
        ),
        (
            lambda m: (m.w[...].sum(), m.w[0, 0]),
            "loss returns PyTreeDef((*, *)), not a loss.",
            "@sw.train_step(has_aux=True)\nor, if the second is the weight of the batch: @sw.train_step(weighted=True)",
        ),
        (lambda m: None, "loss returns PyTreeDef(None), not a loss.", "return the loss"),
        (lambda m: [m.w[...].sum()], "loss returns PyTreeDef([*]), not a loss.", "return the loss"),
    ],
)
def test_what_is_no_loss(loss: Callable[..., Any], message: str, hint: str) -> None:
    loss.__name__ = "loss"
    refuses(lambda: sw.train_step(loss), message=message, hint=hint)


@pytest.mark.parametrize(
    "out",
    [
        lambda loss: loss,
        lambda loss: (loss,),
        lambda loss: (loss, 1, 2),
        lambda loss: [loss, 1],
        lambda loss: {"loss": loss, "aux": 1},
    ],
)
def test_no_aux_where_it_is_announced(out: Callable[..., Any]) -> None:
    def loss(model: Any) -> Any:
        return out(model.w[...].sum())

    refuses(
        lambda: sw.train_step(loss, has_aux=True),
        message="loss has has_aux=True, but does not return (loss, aux).",
        hint="return loss, {'logits': logits}",
    )


def test_a_loss_in_half_precision_and_weak_ones_are_losses() -> None:
    def sixteen(m: Any) -> Any:
        return m.w[...].sum().astype("float16")

    for loss in (lambda m: m.w[...].sum().astype("bfloat16"), lambda m: m.w[...].sum() * 0.5, sixteen):
        state, value = sw.train_step(loss)(taken())
        assert jnp.isfinite(value)
        assert jnp.isfinite(state["params"]["w"]).all()


# --- the output --------------------------------------------------------------------------------------------------

ALL = [
    "base: BatchStat(2,) float32",
    "cache: Cache(4,) bfloat16",
    "inner/count: Variable() int32",
    "inner/stat: OwnStat(3,) float32",
    "two: Variable- -",
    "w: Param(2, 3) float32",
]


@pytest.mark.parametrize(
    ("out", "leaves"),
    [
        (lambda m: m, ALL),
        (lambda m: (m.w[...], {"model": [m]}), ALL),
        (lambda m: m.w, [".: Param(2, 3) float32"]),
        (lambda m: m.inner, ["count: Variable() int32", "stat: OwnStat(3,) float32"]),
        (lambda m: (m.w, m.inner.stat), [".: Param(2, 3) float32", ".: OwnStat(3,) float32"]),
    ],
)
@pytest.mark.parametrize("decorate", [sw.step, sw.train_step(has_aux=True)], ids=["step", "train_step"])
def test_a_function_that_returns_the_model(decorate: Any, out: Callable[..., Any], leaves: list[str]) -> None:
    def leak(model: Any) -> Any:
        return (model.w[...].sum(), out(model)) if decorate is not sw.step else out(model)

    refuses(
        lambda: decorate(leak),
        message="leak returns the model, or Variables of it; they exist only inside the step.",
        leaves=leaves,
        hint="return arrays: model.kernel[...]; the step returns the state by itself",
    )


def test_a_module_without_leaves_is_no_output_either() -> None:
    refuses(
        lambda: sw.step(lambda model: nnx.Dict()),
        message="<lambda> returns the model, or Variables of it; they exist only inside the step.",
        leaves=[".: Dict- -  (a module)"],
        hint="return arrays: model.kernel[...]; the step returns the state by itself",
    )


@pytest.mark.parametrize(
    ("thing", "name"), [("text", "str"), (object(), "object"), (len, "builtin_function_or_method")]
)
def test_an_output_that_is_no_array(thing: Any, name: str) -> None:
    refuses(
        lambda: sw.step(lambda model: {"a": model.w[...], "b": thing}),
        message=f"<lambda> returns {name}, which is not an array.",
        hint="return arrays, numbers, or tuples, lists and dicts of them",
    )


def test_variables_of_the_function_s_own_are_data() -> None:
    out = sw.step(lambda model: {"new": nnx.Param(model.w[...] * 2), "state": nnx.state(model, OwnStat)})(taken())
    assert out["new"][...].shape == (2, 3)


# --- leaves that change their form -------------------------------------------------------------------------------


def grow(model: Any) -> None:
    model.inner.stat.set_value(jnp.zeros(5))
    model.cache.set_value(model.cache[...].astype(jnp.float32))
    model.inner.count.set_value((model.inner.count[...], jnp.zeros(1)))
    model.raw = jnp.ones((2, 2))


def test_leaves_that_change_shape_dtype_or_structure() -> None:
    refuses(
        lambda: sw.step(grow, writes=("stats", "cache", "rest")),
        message="grow changes the shape or dtype of leaves; a state keeps both from step to step.",
        leaves=[
            "cache: Cache(4,) bfloat16  kind=cache  (becomes (4,) float32)",
            "inner/count: Variable() int32  kind=rest  (becomes a value of another structure)",
            "inner/stat: OwnStat(3,) float32  kind=stats  (becomes (5,) float32)",
            "raw: Array(2,) float32  kind=rest  (becomes (2, 2) float32)",
        ],
        hint="assign a value of the leaf's own shape and dtype: leaf[...] = value.astype(leaf.dtype)",
    )


@pytest.mark.parametrize("value", [None, "text", object()], ids=["None", "str", "object"])
def test_leaves_that_become_no_array(value: Any) -> None:
    def spoil(model: Any) -> None:
        model.inner.stat.set_raw_value(value)

    state = taken()
    with pytest.raises(sw.StructureError, match=r"stat: OwnStat\(3,\) float32  kind=stats  \(becomes ") as caught:
        sw.step(spoil, writes="stats")(state)
    assert caught.value.message == "spoil changes the shape or dtype of leaves; a state keeps both from step to step."
    assert same(state, taken())


# --- Variables that come and go ----------------------------------------------------------------------------------


def test_variables_added_removed_and_replaced() -> None:
    def rebuild(model: Any) -> None:
        model.extra = nnx.Cache(jnp.ones(1))
        model.inner.more = Node(x=nnx.Param(jnp.ones((1, 2))))
        del model.inner.count
        model.w = nnx.Param(model.w[...] * 2)
        model.raw = "text"

    refuses(
        lambda: sw.step(rebuild, writes=("params", "rest", "cache")),
        message="rebuild changes which Variables the model has; a state cannot take new ones.",
        leaves=[
            "inner/count: Variable() int32  kind=rest  (removed)",
            "raw: Array(2,) float32  kind=rest  (replaced by str)",
            "w: Param(2, 3) float32  kind=params  (replaced by another Variable)",
            "extra: Cache(1,) float32  (made by the function)",
            "inner/more/x: Param(1, 2) float32  (made by the function)",
        ],
        hint="assign values, not Variables: self.count[...] = self.count[...] + 1\n"
        "or, make the Variable before the plan (with model.init_cache(...), for example)",
    )


def test_a_variable_that_is_replaced_alone() -> None:
    def swap(model: Any) -> None:
        model.inner.stat = OwnStat(model.inner.stat[...] + 1)

    refuses(
        lambda: sw.step(swap, writes="stats"),
        message="swap changes which Variables the model has; a state cannot take new ones.",
        leaves=["inner/stat: OwnStat(3,) float32  kind=stats  (replaced by another Variable)"],
        hint="assign values, not Variables: self.count[...] = self.count[...] + 1\n"
        "or, kinds = kinds.replace(stats=dataclasses.replace(kinds['stats'], saved=False))\n"
        "capture='stats'  # in the step's decorator",
    )


def test_what_is_sown_without_capture() -> None:
    def sow(model: Any) -> None:
        model.seen = nnx.Intermediate(model.w[...])

    refuses(
        lambda: sw.step(sow),
        message="sow changes which Variables the model has; a state cannot take new ones.",
        leaves=["seen: Intermediate(2, 3) float32  (made by the function)"],
        hint="kinds = kinds | sw.Kinds(sown=sw.Kind(nnx.Intermediate, saved=False))\n"
        "capture='sown'  # in the step's decorator",
    )


# --- what a step is given ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, 3, jnp.ones(2), {}], ids=["None", "int", "array", "dict"])
@pytest.mark.parametrize("use", [lambda step, x: step(x), lambda step, x: step.lower(x)], ids=["call", "lower"])
def test_no_state(given: Any, use: Any) -> None:
    run = sw.step(lambda model: None)
    with refused(
        sw.StructureError,
        f"<lambda> is a step: its first argument is a state, not {type(given).__name__}.",
        hint="state = plan.take(model)\nstep(state, ...)",
    ):
        use(run, given)


def test_a_model_in_the_place_of_a_state() -> None:
    with pytest.raises(sw.StructureError, match="its first argument is a state, not Node"):
        sw.step(lambda model: None)(model())


@pytest.mark.parametrize("given", [3, "f", jnp.ones(1)], ids=["int", "str", "array"])
@pytest.mark.parametrize("name", ["step", "train_step"])
def test_no_function(name: str, given: Any) -> None:
    with pytest.raises(sw.StructureError, match="is not a function") as caught:
        getattr(sw, name)(given)
    assert caught.value.hint == f"@sw.{name}\ndef f(model, x): ..."


def test_a_state_of_another_plan_where_a_step_was_compiled_ahead() -> None:
    run = sw.step(lambda model: model.w[...].sum())
    compiled = run.lower(taken()).compile()
    other = sw.plan(model()).take(model())
    with refused(
        sw.StructureError,
        "<lambda> was compiled for a plan other than this state's.",
        hint="step.lower(state, ...).compile()",
    ):
        compiled(other)
    assert float(compiled(taken())) == float(run(other)) == 6


def test_a_state_whose_arrays_do_not_fit_its_plan() -> None:
    state = jax.tree.map(lambda array: jnp.stack([array, array]), taken())
    with pytest.raises(sw.StructureError) as caught:
        sw.step(lambda model: model.w[...].sum())(state)
    assert caught.value.message == "The state's arrays do not have the shapes and dtypes of its plan."
    assert len(caught.value.leaves) == len(jax.tree.leaves(state))
    assert "jax.vmap(step, in_axes=(plan.axes(params=0), ...))" in (caught.value.hint or "")


def test_no_state_where_a_step_was_compiled_ahead() -> None:
    compiled = sw.step(lambda model: model.w[...].sum()).lower(taken()).compile()
    with refused(
        sw.StructureError,
        "<lambda> is a step: its first argument is a state, not Node.",
        hint="state = plan.take(model)\nstep(state, ...)",
    ):
        compiled(model())


@pytest.mark.parametrize("values", [(1, 1.0), (1, True), ((1,), (1.0,))], ids=str)
def test_static_arguments_of_different_types_are_different(values: tuple[Any, Any]) -> None:
    def name_of(value: Any) -> str:
        return name_of(value[0]) if isinstance(value, tuple) else type(value).__name__

    model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    step = sw.step(lambda model, k: jnp.asarray(len(name_of(k))), static_argnames="k")
    state = sw.plan(model).take(model)
    assert [int(step(state, k=value)) for value in values] == [len(name_of(value)) for value in values]
