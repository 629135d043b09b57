"""Flax's process-wide modes change nothing: the same model, plan and step give the same numbers under each of them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import variablelib

import modes
import statewise as sw

SOURCE = Path(__file__).parents[2] / "src" / "statewise"
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)


class Net(nnx.Module):
    """Several kinds of state, a module that two paths reach, and a tied weight."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(3, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.again = self.inner
        self.out = nnx.Param(jnp.ones((3, 3)))
        self.tied = self.out
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        x = self.again(self.dropout(self.norm(self.inner(x))))
        return x @ self.out[...] @ self.tied[...]


def loss_of(model: Any, x: Any) -> Any:
    return (model(x) ** 2).mean()


def sowing_loss_of(model: Any, x: Any) -> Any:
    out = model(x)
    model.sow(nnx.Intermediate, "out", out)
    return (out**2).mean()


def everything(folder: Path) -> dict[str, Any]:
    """Calls every verb on a new model; returns what came out as plain data."""
    model = Net()
    kinds = sw.Kinds.standard()
    plan = kinds.plan(model, optimizers={"params": optax.adam(0.1)})
    state = plan.take(model)
    step = sw.train_step(sowing_loss_of, writes=("stats", "rng", "variables"), capture="intermediates")
    losses, sown = [], []
    for _ in range(3):
        state, (loss, captured) = step(state, X)
        losses.append(np.asarray(loss))
        sown.append(np.asarray(captured["out"][0]))
    sw.save(folder / "state", state)
    restored, _ = sw.restore(folder / "state", plan.abstract())
    plan.put(restored, model)
    built = plan.build(state)
    assert built.tied is built.out
    assert built.again is built.inner
    graphdef, parts = sw.split(model, kinds)
    merged = sw.merge(graphdef, parts)
    assert merged.tied is merged.out
    model.eval(graph=True)
    grads = sw.grad(loss_of, wrt=nnx.Param)(model, X)
    with sw.watch(model) as watch:
        model(X)
    sw.update(model, {"calls": 40})
    return {
        "losses": losses,
        "sown": sown,
        "state": arrays(dict(restored)),
        "grads": arrays(grads),
        "built": np.asarray(built.out[...]),
        "merged": np.asarray(merged.inner.kernel[...]),
        "calls": int(model.calls[...]),
        "changed": {kind: [leaf.path for leaf in leaves] for kind, leaves in watch.changed.items()},
        "counts": sw.count(model, nnx.Param, sw.Exactly(nnx.Variable), nnx.RngState),
        "plan": str(plan),
        "aliases": [leaf.aliases for leaf in plan.leaves],
        "census": str(sw.census(model)),
        "lint": list(map(str, sw.lint(model))),
        "audit": str(sw.audit(loss_of, model, X)),
        "diff": str(sw.diff(model, built)),
    }


def arrays(tree: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))[0]
    values = {keys: leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf for keys, leaf in leaves}
    return {
        jax.tree_util.keystr(keys): np.asarray(
            jax.random.key_data(value) if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else value
        )
        for keys, value in values.items()
    }


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with modes.classic():
        return everything(tmp_path_factory.mktemp("classic"))


@pytest.mark.parametrize("mode", modes.CONTEXTS)
def test_every_verb_gives_the_same_under_each_mode(mode: str, expected: dict[str, Any], tmp_path: Path) -> None:
    with modes.CONTEXTS[mode]():
        results = everything(tmp_path)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        flat, structure = jax.tree.flatten(result)
        wanted, of_wanted = jax.tree.flatten(expected[name])
        assert structure == of_wanted, name
        for ours, theirs in zip(flat, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)


def test_a_step_gives_the_numbers_of_flax_whatever_the_mode() -> None:
    """`nnx.jit` cannot write hijax Variables, so the judge runs in graph mode with plain ones."""
    with modes.classic():
        model = Net()
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

        @nnx.jit
        def by_flax(model: Any, optimizer: Any, x: Any) -> Any:
            loss, grads = nnx.value_and_grad(loss_of)(model, x)
            optimizer.update(model, grads)
            return loss

        expected = [float(by_flax(model, optimizer, X)) for _ in range(3)]
    for mode, context in modes.CONTEXTS.items():
        with context():
            net = Net()
            state = sw.plan(net, optimizers={"params": optax.adam(0.1)}).take(net)
            step = sw.train_step(loss_of, writes=("stats", "rng", "variables"))
            losses = []
            for _ in range(3):
                state, loss = step(state, X)
                losses.append(float(loss))
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=mode)


def test_flax_is_asked_for_a_graph_wherever_it_lets_us() -> None:
    """A call of ours that leaves `graph=` out would change with the switch."""
    missing = []
    for file in sorted([*SOURCE.glob("_src/**/*.py"), *SOURCE.glob("cli/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not isinstance(node.func.value, ast.Name) or node.func.value.id != "nnx":
                continue
            function = getattr(nnx, node.func.attr)
            if inspect.isclass(function) or "graph" not in inspect.signature(function).parameters:
                continue
            if "graph" not in {keyword.arg for keyword in node.keywords}:
                missing.append(f"{file.relative_to(SOURCE)}:{node.lineno} nnx.{node.func.attr}")
    assert not missing


# --- the run of the suite under each mode ------------------------------------------------------------------------


def test_a_mode_is_set_as_its_name_says() -> None:
    mode = modes.MODES[modes.current()]
    assert mode.exists
    defaults = nnx.var_defaults()
    assert nnx.set_graph_mode.current_value() == (modes.current() != "tree")
    assert nnx.set_graph_updates.current_value() == (modes.current() != "no-updates")
    assert (defaults.hijax, defaults.ref) == (modes.current() == "hijax", modes.current() == "ref")


def test_an_error_below_statewise_is_never_taken_for_a_refusal_of_flax(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = modes.Refusal("tree", "ModelError|ValueError: mine", "because")
    monkeypatch.setattr(modes, "REFUSALS", (refusal,))
    monkeypatch.setenv(modes.VARIABLE, "tree")

    def caught(function: Callable[[], Any]) -> BaseException:
        with pytest.raises(Exception) as error:
            function()
        return error.value

    def raising(*_: Any) -> Any:
        raise ValueError("mine")

    assert modes.refused_by_flax(caught(lambda: sw.plan(3))) == ""
    assert modes.refused_by_flax(caught(raising)) == "flax in mode tree: because"
    # The user's function under a step of ours: the test's own code is what was refused.
    state = sw.plan(Net()).take(Net())
    assert modes.refused_by_flax(caught(lambda: sw.step(raising)(state))) == "flax in mode tree: because"
    # Under hijax no refusal of Flax comes from there: a step's Variables are plain.
    monkeypatch.setattr(modes, "REFUSALS", (dataclasses.replace(refusal, mode="hijax"),))
    monkeypatch.setenv(modes.VARIABLE, "hijax")
    assert modes.refused_by_flax(caught(raising)) == "flax in mode hijax: because"
    assert modes.refused_by_flax(caught(lambda: sw.step(raising)(state))) == ""
    monkeypatch.setenv(modes.VARIABLE, "graph")
    assert modes.refused_by_flax(caught(raising)) == ""


def test_what_a_mode_changes_names_tests_that_exist() -> None:
    folder, missing = Path(__file__).parents[1], []
    for mode, reasons in modes.CHANGED.items():
        for name in (name for names in reasons.values() for name in names):
            file, _, test = name.partition("[")[0].partition("::")
            if not any(f"def {test}(" in path.read_text(encoding="utf-8") for path in folder.rglob(file)):
                missing.append((mode, name))
    assert missing == []


# --- what Flax itself refuses: each error of `modes.REFUSALS`, without Statewise -----------------------------------


class Small(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.ones(2))
        self.n = nnx.Variable(jnp.array(0))


def write(model: Any) -> None:
    model.n[...] += 1


def update_with_mapped_gradients() -> None:
    model = Small()
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))


def collection_of_a_parameter() -> None:
    of_parameters = type(nnx.Param(jnp.ones(2)))
    names = {name: each for name, each in variablelib.VariableTypeCache.items() if each is not of_parameters}
    with mock.patch.dict(variablelib.VariableTypeCache, names, clear=True):  # whoever asks for one registers it
        nnx.variable_name_from_type(of_parameters)


def tied() -> Any:
    return nnx.Dict(a=(weight := nnx.Param(jnp.ones(2))), b=weight)


SHOWN: dict[str, Callable[[], Any]] = {
    "tied weights in a call of its own": lambda: nnx.split(tied(), graph=False),
    "hijax Variables are not written inside nnx.jit": lambda: nnx.jit(write)(Small()),
    "nnx.grad of hijax Variables": lambda: nnx.grad(lambda model: model.w[...].sum())(Small()),
    "hijax Variables as an output of jax.jit": lambda: jax.jit(lambda state: state)(nnx.state(Small())),
    "hijax Variables carried by a scan": lambda: jax.lax.scan(lambda w, _: (w, w[...]), Small().w, length=1),
    "nnx.vmap does not make hijax Variables": lambda: nnx.vmap(lambda _: Small())(jnp.arange(3)),
    "nnx.vmap does not take hijax Variables": lambda: nnx.vmap(lambda w, x: w * x)(nnx.Param(jnp.ones(2)), jnp.ones(2)),
    "hijax Variables in jax.jit have no shape": lambda: jax.jit(
        lambda state: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state)
    )(nnx.state(Small(), nnx.Param)),
    "nnx.grad of hijax Variables that are read twice": lambda: nnx.grad(
        lambda model: (model.w[...] * model.w[...]).sum()
    )(Small()),
    "the bridge to Linen has no collection for hijax Variables": collection_of_a_parameter,
    "nnx.EMA of hijax Variables": lambda: nnx.EMA(Small(), 0.9),
    "nnx.Optimizer.update takes no gradients from jax.tree.map of hijax Variables": update_with_mapped_gradients,
    "a hijax Variable holds arrays only": lambda: nnx.Variable("text"),
    "a reference holds one array, not text, None or a tuple": lambda: nnx.Variable((jnp.ones(2), jnp.ones(3))),
    "references are not returned from jax.jit": lambda: jax.jit(lambda state: state)(nnx.state(Small())),
    "nnx.grad makes no references": lambda: nnx.grad(lambda model: model.w[...].sum())(Small()),
    "nnx.eval_shape of references": lambda: nnx.eval_shape(Small),
    "tied references as arguments of jax.jit": lambda: jax.jit(lambda model: model["a"][...])(tied()),
    "a reference has no methods of arrays, as is_deleted": lambda: Small().w.is_deleted(),
    "nnx.SpectralNorm of references": lambda: nnx.jit(lambda layer: layer(jnp.ones((1, 2)), update_stats=True))(
        nnx.SpectralNorm(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    ),
    "nnx.RNN of references": lambda: nnx.RNN(nnx.GRUCell(2, 3, rngs=nnx.Rngs(0)))(jnp.ones((1, 2, 2))),
    "nnx.split_rngs writes other shapes into references": lambda: nnx.split_rngs(nnx.Rngs(0), splits=2),
}


def test_each_refusal_is_shown() -> None:
    assert SHOWN.keys() == {refusal.reason for refusal in modes.REFUSALS}


@pytest.mark.parametrize("refusal", modes.REFUSALS, ids=lambda refusal: refusal.reason)
def test_flax_alone_refuses(refusal: modes.Refusal) -> None:
    with modes.classic(), modes.CONTEXTS[refusal.mode]():
        if not refusal.stands:
            SHOWN[refusal.reason]()
            return
        with pytest.raises(Exception) as error:
            SHOWN[refusal.reason]()
    assert re.search(refusal.error, f"{type(error.value).__name__}: {error.value}")


# What JAX 0.10 to 0.12 say where a function of theirs gets a reference.
NO_ARRAY = "a Ref can't be passed|requires ndarray or scalar arguments|Out of bound indexer"


def test_what_flax_alone_does_otherwise_in_a_mode() -> None:
    with nnx.var_defaults(hijax=True, ref=False):  # `modes.CHANGED`
        model = Small()
        assert not nnx.to_flat_state(nnx.pop(model, nnx.Variable))
        assert hasattr(model, "n")
        assert jax.tree.leaves(model)[0] is model.n
        assert nnx.Variable(np.array([2**40, 1])).get_raw_value().dtype == np.int32
        graphdef, state = nnx.split(model)
        if not modes.hijax_is_written_in_traces():
            with pytest.raises(flax.errors.ImmutableVariableError, match="inside JAX transformations"):
                jax.jit(lambda state: write(nnx.merge(graphdef, state)))(state)
    with modes.classic(), nnx.var_defaults(ref=True):
        model = nnx.Dict(w=nnx.Param(jnp.ones((2, 2))))
        for optimizer in (optax.adafactor(min_dim_size_to_factor=2), optax.inject_hyperparams(optax.adam)(1e-3)):
            with pytest.raises((TypeError, ValueError), match=NO_ARRAY):
                nnx.Optimizer(model, optimizer, wrt=nnx.Param)
        # Why some tests ask for plain Variables: `docs/compatibility.md`.
        assert model.w.get_value() is not model.w.get_value()
        assert model.w[...].committed
        assert not jnp.ones(2).committed
        with pytest.raises(ValueError, match="axis spec None"):
            jax.vmap(lambda _: nnx.Variable(jnp.ones(2))[...], out_axes=None)(jnp.arange(3))


@pytest.mark.skipif(
    not modes.MODES["sow-noop"].exists, reason=f"flax {flax.__version__} does not have nnx_sow_capture_noop"
)
def test_flax_alone_leaves_nothing_where_sow_does_nothing() -> None:
    setting = flax.config.nnx_sow_capture_noop
    flax.config.update("nnx_sow_capture_noop", True)  # `modes.CHANGED`
    try:
        model = Small()
        model.sow(nnx.Intermediate, "out", jnp.ones(2))
        assert not hasattr(model, "out")
    finally:
        flax.config.update("nnx_sow_capture_noop", setting)
