"""`measure=`: every figure against NumPy, leaf by leaf, with the other options of a step; and bad input."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from measuring import Net, X, checked, close, expected, flat, loss_of, plan_of
from statewise.errors import DeclarationError, StructureError
from statewise.results import Measured

# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [False, True])
def test_every_figure_of_a_model_is_that_of_numpy(pack: bool) -> None:
    """The gradients are those of `nnx.grad`; the state before and after gives the rest."""
    model = Net(nnx.Rngs(0))
    state = plan_of(model).take(model, pack=pack)
    grads = nnx.grad(loss_of, graph=True)(model, X)
    by_path = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(grads)}
    step = sw.train_step(loss_of, measure=True)
    state, (_, measured) = checked(step, state, X, grads=by_path, written=("stats", "variables"))
    assert isinstance(measured, Measured)
    assert ("blocks", 1, "bias") not in {leaf.path for leaf in state.plan["params"]}  # tied: measured once
    assert measured.to_dict()["written_norm/variables/calls"] == 1
    assert measured.nonfinite == ()
    assert not any("rngs" in key for key in measured.to_dict())


ODD: dict[str, Any] = {
    "small": [1e-3, -2.0, 0.5],
    "zero": np.zeros((3, 2)),
    "empty": np.zeros((0, 4)),
    "scalar": -7.0,
    "huge": [1e30, -2e30, 3e38, 1.0],
    "around the split": [1.3e8, 1.4e8] * 40,
    "one above many": [2.0**28] + [2.0**26] * 5000,
    "tiny": [1e-20, -3e-20],
    "tiny and large": [1e-20, 1e20],
    "nan": [1.0, np.nan, 2.0],
    "infinite": [1.0, -np.inf, np.inf],
    "both": [np.nan, np.inf],
    "long": np.linspace(-1, 3, 20001),
    "long rows": np.linspace(-1, 3, 512 * 40),
    "wide": np.linspace(-5, 5, 40 * 600).reshape(40, 600),
    "kernel": np.linspace(-5, 5, 3 * 3 * 50 * 50).reshape(3, 3, 50, 50),
    "thin": np.linspace(-5, 5, 9000 * 3).reshape(9000, 3),
}


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_extreme_values_in_every_dtype(dtype: Any) -> None:
    """Gradients that are given: the loss is linear.  Large and small leaves, zero-size ones, NaN and infinities."""
    with np.errstate(over="ignore"):
        given = {name: jnp.asarray(np.asarray(value, np.float32), dtype) for name, value in ODD.items()}
    model = nnx.Dict({name: nnx.Param(jnp.zeros_like(value)) for name, value in given.items()})
    state = sw.plan(model, optimizers={"params": optax.sgd(0.0)}).take(model)

    @sw.train_step(measure="grads")
    def train(model: Any, given: Any) -> jax.Array:
        return sum((leaf[...] * given[name]).sum().astype(jnp.float32) for name, leaf in model.items())

    _, (_, measured) = train(state, given)
    found = measured.to_dict()
    close(found, expected("grad", "params", {(name,): value for name, value in given.items()}), rtol=2e-6)
    assert [leaf.path[0] for leaf in measured.nonfinite] == sorted(
        name for name, value in given.items() if not np.isfinite(np.asarray(value, np.float32)).all()
    )
    assert "grads: 1 of 3 not finite" in {leaf.note for leaf in measured.nonfinite}


def test_integers_and_complex_numbers_that_a_function_writes() -> None:
    model = nnx.Dict(
        w=nnx.Param(jnp.ones(2)),
        count=nnx.Variable(jnp.array(3_000_000, jnp.int32)),
        flags=nnx.Variable(jnp.array([False, True])),
        wave=nnx.Variable(jnp.array([3 + 4j, 0])),
        key=nnx.Variable(jax.random.key(0)),
    )

    @sw.train_step(measure="written")
    def train(model: Any) -> jax.Array:
        model.count[...] += 1
        model.flags[...] = ~model.flags[...]
        model.wave[...] = model.wave[...] * jnp.array(2.0)
        model.key.set_value(jax.random.split(model.key.get_value())[0])
        return (model.w[...] ** 2).sum()

    _, (_, measured) = train(sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model))
    found = {key: value for key, value in measured.to_dict().items() if "norm" in key}
    assert found == {
        "written_norm/variables/count": 3_000_001,
        "written_norm/variables/flags": 1,
        "written_norm/variables/wave": 10,
    }


def test_counts_beyond_an_int32_stay_at_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such an array does not fit here, so the limit is lowered."""
    from statewise._src.step import instruments

    monkeypatch.setattr(instruments, "_MANY", 1000)
    monkeypatch.setattr(instruments, "_MOST", 30_000)
    model = nnx.Dict(w=nnx.Param(jnp.full((200, 600), jnp.nan)), v=nnx.Param(jnp.full((40, 600), jnp.nan)))
    step = sw.train_step(lambda model: (model.w[...].sum() + model.v[...].sum()) ** 2, measure="params")
    _, (_, measured) = step(sw.plan(model, optimizers={"params": optax.sgd(0.1)}).take(model))
    assert measured.to_dict(depth=0)["param_nonfinite/params"] == 30_000 + 24_000


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(1024, 1024), (2**20,)])
def test_long_sums_keep_their_digits(shape: tuple[int, ...]) -> None:
    """A large number before a million ones: added one by one in float32, they would leave no trace.

    Without its optimizations XLA adds one by one.
    """
    model = nnx.Dict(w=nnx.Param(jnp.ones(2**20).at[0].set(2.0**12).reshape(shape)))
    step = sw.train_step(lambda model: model.w[0].sum(), measure="params")
    _, (_, measured) = step(sw.plan(model, optimizers={"params": optax.sgd(0.0)}).take(model))
    wanted = math.sqrt(2**24 + 2**20 - 1)
    np.testing.assert_allclose(measured.to_dict()["param_norm/params/w"], wanted, rtol=1e-5)


def test_only_what_is_asked_for() -> None:
    model = Net(nnx.Rngs(0))
    for names in ("params", ["grads"], ("updates", "written")):
        _, (_, measured) = sw.train_step(loss_of, measure=names)(plan_of(model).take(model), X)
        wanted = {names} if isinstance(names, str) else set(names)
        assert {key.split("_")[0] for key in measured.to_dict()} == {name.removesuffix("s") for name in wanted}
    _, loss = sw.train_step(loss_of, measure=())(plan_of(model).take(model), X)
    assert loss.shape == ()


def test_few_arrays_cross_however_many_leaves() -> None:
    for count in (1, 30):
        model = nnx.Dict({f"w{number}": nnx.Param(jnp.ones(2)) for number in range(count)})
        state = plan_of(model).take(model)

        def fn(model: Any) -> jax.Array:
            return sum((leaf[...] ** 2).sum() for leaf in model.values())

        plain, measured = (
            jax.tree.leaves(jax.eval_shape(sw.train_step(fn, measure=measure), state)) for measure in (False, True)
        )
        assert len(measured) - len(plain) == 2


# --- with the other options --------------------------------------------------------------------------------------


def test_gradients_of_microbatches_are_those_of_the_mean() -> None:
    def fn(model: Any, x: jax.Array) -> jax.Array:
        return ((model(x) - 1) ** 2).mean()

    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    whole, parts = (sw.train_step(fn, measure=True, microbatches=count) for count in (1, 4))
    _, (_, expected_) = checked(whole, plan_of(model).take(model), X)
    _, (_, measured) = checked(parts, plan_of(model).take(model), X)
    close(measured.to_dict(), expected_.to_dict(), rtol=1e-5)


def test_weighted_and_statistics_after_the_last_part() -> None:
    def fn(model: Any, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        model.seen[...] += mask.sum()
        return (((x @ model.w[...]) ** 2) * mask).sum() / mask.sum(), mask.sum()

    model = nnx.Dict(w=nnx.Param(jnp.arange(4.0)), seen=nnx.BatchStat(jnp.zeros(())))
    mask = (jnp.arange(8) % 3 > 0).astype(jnp.float32)
    grads = jax.grad(lambda w: (((X @ w) ** 2) * mask).sum() / mask.sum())(jnp.arange(4.0))
    step = sw.train_step(fn, measure=True, weighted=True, microbatches=2)
    checked(step, plan_of(model).take(model), X, mask, grads={("w",): grads}, written=("stats",))


def test_aux_and_captured_values_stay_where_they_are() -> None:
    class Sowing(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(jnp.ones(4))

        def __call__(self, x: jax.Array) -> jax.Array:
            self.sow(nnx.Intermediate, "h", x.sum())
            return x @ self.w[...]

    def fn(model: Any, x: jax.Array) -> Any:
        return (model(x) ** 2).mean(), {"x": x}

    model = Sowing()
    options: dict[str, Any] = {"has_aux": True, "measure": True}
    plain = sw.train_step(lambda model, x: ((x @ model.w[...]).mean() ** 2, {"x": x}), **options)
    _, ((loss, measured), aux) = plain(plan_of(model).take(model), X)
    assert isinstance(measured, Measured)
    assert loss.shape == ()
    assert aux["x"].shape == X.shape
    step = sw.train_step(fn, capture="intermediates", **options)
    _, (((_, measured), aux), captured) = step(plan_of(model).take(model), X)
    assert isinstance(measured, Measured)
    assert "h" in captured


def test_a_skipped_step_applies_nothing_and_says_what_was_not_finite() -> None:
    model = Net(nnx.Rngs(0))
    step = sw.train_step(loss_of, measure=True, nonfinite="skip")
    state, (loss, measured) = checked(step, plan_of(model).take(model), X, written=("stats", "variables"))
    assert measured.to_dict(depth=0)["update_norm/params"] > 0
    params = flat(state, "params")
    state, (loss, measured) = step(state, X.at[3, 1].set(jnp.nan))
    assert np.isnan(loss)
    found = measured.to_dict(depth=0)
    assert found["update_norm/params"] == found["update_nonfinite/params"] == found["param_nonfinite/params"] == 0
    assert found["grad_nonfinite/params"] == sum(array.size for array in params.values())
    assert found["written_nonfinite/stats"] == 8  # what the function wrote, although it was not kept
    close(
        {key: value for key, value in measured.to_dict().items() if key.startswith("param")},
        expected("param", "params", params),
    )
    assert [leaf.path[0] for leaf in measured.nonfinite][:2] == ["norm", "norm"]  # the statistics come first
    assert measured.nonfinite[0].kind == "stats"


@pytest.mark.parametrize("pack", [False, True])
def test_averages_two_optimizers_and_compute_dtypes(pack: bool) -> None:
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.a, self.b = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
            self.b.bias = nnx.LoRAParam(jnp.ones(4))

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.b(self.a(x))

    kinds = sw.Kinds(params=sw.Kind(sw.Exactly(nnx.Param), compute="bfloat16"), lora=sw.Kind(nnx.LoRAParam))
    plan = kinds.plan(
        Two(nnx.Rngs(0)),
        optimizers={"params": optax.adam(1e-2), "lora": optax.sgd(0.5)},
        averages={"params": sw.EMA(0.9)},
    )
    state = plan.take(Two(nnx.Rngs(0)), pack=pack)
    before = {kind: flat(state, kind) for kind in ("params", "lora")}
    state, (_, measured) = sw.train_step(loss_of, measure=True)(state, X.astype(jnp.bfloat16))
    found, wanted = measured.to_dict(), dict[str, float]()
    for kind, old in before.items():
        new = flat(state, kind)
        wanted |= expected("param", kind, new)
        wanted |= expected("update", kind, {path: new[path].astype(np.float64) - old[path] for path in new})
    close({key: value for key, value in found.items() if not key.startswith("grad")}, wanted)
    assert {key for key in found if key.startswith("grad_norm")} == {
        f"grad_norm/{key.removeprefix('param_norm/')}" for key in found if key.startswith("param_norm")
    }
    # The update of plain SGD is its gradient times the rate.
    np.testing.assert_allclose(found["update_norm/lora/b/bias"], found["grad_norm/lora/b/bias"] / 2, rtol=1e-5)


def test_values_that_their_gradient_replaces() -> None:
    model = nnx.Dict(w=nnx.Param(jnp.ones(3)), scale=nnx.BatchStat(jnp.ones(3)))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1), "stats": sw.overwrite_with_gradient()})
    step = sw.train_step(lambda model: (model.w[...] * model.scale[...] * 3).sum(), measure=True)
    _, (_, measured) = step(plan.take(model))
    found = measured.to_dict()
    assert found["grad_max/stats/scale"] == found["param_max/stats/scale"] == 3
    assert found["update_max/stats/scale"] == 2


def test_several_objects_use_the_paths_of_tables() -> None:
    policy, critic = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 1, rngs=nnx.Rngs(1))

    @sw.train_step(measure="params")
    def train(policy: Any, critic: Any, x: jax.Array) -> jax.Array:
        return (critic(policy(x)) ** 2).mean()

    optimizers = {"params": optax.sgd(0.1)}
    named = sw.Kinds.standard().plan(policy=policy, critic=critic, optimizers=optimizers)
    for plan, keys in ((named, {"policy", "critic"}), (sw.plan(policy, critic, optimizers=optimizers), {"0", "1"})):
        objects = {"policy": policy, "critic": critic} if plan is named else {}
        state = plan.take(**objects) if objects else plan.take(policy, critic)
        _, (_, measured) = train(state, X)
        assert set(measured.to_dict(depth=1)) == {
            f"param_{figure}/params/{key}" for figure in ("norm", "max", "nonfinite") for key in keys
        }


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("gradients", "'gradients'"),
        (("params", "loss"), "'loss'"),
        (3, "3"),
        (None, "None"),
        ([["grads"]], r"\['grads'\]"),
    ],
)
def test_a_measure_of_something_else(given: Any, shown: str) -> None:
    pattern = rf"measure=.*: {shown} is not one of 'params', 'grads', 'updates', 'written'\."
    with pytest.raises(DeclarationError, match=pattern) as raised:
        sw.train_step(loss_of, measure=given)
    assert raised.value.hint == "measure=('grads', 'updates')  # True for everything"


def test_only_what_is_written_where_nothing_is() -> None:
    model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    state = plan_of(model).take(model)
    with pytest.raises(StructureError, match="loss_of measures what its function writes, and it writes nothing") as e:
        sw.train_step(loss_of, measure="written")(state, X)
    assert e.value.hint == "measure=('params', 'grads', 'updates'), or leave measure out"
    state, (_, measured) = sw.train_step(loss_of, measure=True)(state, X)  # nothing was donated
    assert not any(key.startswith("written") for key in measured.to_dict())


@pytest.mark.parametrize("depth", [-1, 1.5, True, "2"])
def test_a_depth_that_is_none(depth: Any) -> None:
    model = Net(nnx.Rngs(0))
    _, (_, measured) = sw.train_step(loss_of, measure="params")(plan_of(model).take(model), X)
    for use in (measured.to_dict, measured.table, measured.to_json):
        with pytest.raises(DeclarationError, match=f"depth={depth!r} is not a number of keys of a path") as raised:
            use(depth)
        assert raised.value.hint == "depth=2"
