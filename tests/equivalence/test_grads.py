"""`sw.value_and_grad` and `sw.grad` against `nnx.value_and_grad` with `nnx.DiffState`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from equivalence.models import (
    BatchNormDropout,
    LowRank,
    Nested,
    Rematerialised,
    Scale,
    Scanned,
    TiedEmbedding,
    cross_entropy,
    rows,
    squares,
    tokens,
)
from equivalence.rivals import assert_same_flat, flat_of, leaves_of

CASES: dict[str, tuple[Callable[[], Any], Any, Any, Any]] = {
    "batchnorm_dropout": (BatchNormDropout, squares, rows, nnx.Param),
    "by_path": (BatchNormDropout, squares, rows, sw.Path("inner/*")),
    "by_operators": (BatchNormDropout, squares, rows, sw.Exactly(nnx.Param) & ~sw.Path("**/bias")),
    "lora": (LowRank, squares, rows, nnx.LoRAParam),
    "base_without_lora": (LowRank, squares, rows, nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))),
    "tied": (TiedEmbedding, cross_entropy, tokens, nnx.Param),
    "own_type": (Nested, squares, rows, nnx.Any(Scale, nnx.PathContains(10))),
    "rematerialised": (Rematerialised, squares, rows, nnx.Param),
    "scanned": (Scanned, squares, rows, nnx.Param),
    "statistics": (Rematerialised, squares, rows, nnx.All(nnx.BatchStat, nnx.PathContains("norm"))),
}


def arguments(batch: Any) -> tuple[Any, ...]:
    return batch(np.random.default_rng(0))


EAGERLY = ("batchnorm_dropout", "lora", "own_type")  # each operation is compiled by itself: slow


@pytest.mark.parametrize("name, around", [(name, "nnx.jit") for name in CASES] + [(name, "eager") for name in EAGERLY])
def test_loss_gradients_and_writes_are_those_of_nnx(name: str, around: str) -> None:
    make, loss, batch, wrt = CASES[name]
    ours = sw.value_and_grad(loss, wrt=wrt)
    theirs = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))
    if around == "nnx.jit":
        ours, theirs = nnx.jit(ours), nnx.jit(theirs)
    model, rival = make(), make()
    for _ in range(2):  # the second call starts from what the first has written
        args = arguments(batch)
        (value, grads), (expected, their_grads) = ours(model, *args), theirs(rival, *args)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert_same_grads(grads, their_grads)
        assert_same_flat(leaves_of(model), leaves_of(rival))


def assert_same_grads(grads: Any, expected: Any) -> None:
    mine, theirs = nnx.to_flat_state(grads), nnx.to_flat_state(expected)
    assert [path for path, _ in mine] == [path for path, _ in theirs]
    assert [type(leaf) for _, leaf in mine] == [type(leaf) for _, leaf in theirs]
    assert_same_flat(flat_of(nnx.as_pure(grads)), flat_of(nnx.as_pure(expected)))


def test_eagerly_the_same_operations_give_the_same_bits() -> None:
    model, rival = TiedEmbedding(), TiedEmbedding()
    args = arguments(tokens)
    value, grads = sw.value_and_grad(cross_entropy)(model, *args)
    expected, their_grads = nnx.value_and_grad(cross_entropy)(rival, *args)
    assert float(value) == float(expected)
    assert_same_flat(flat_of(nnx.as_pure(grads)), flat_of(nnx.as_pure(their_grads)), exact=True)


@pytest.mark.parametrize("around", [lambda fn: fn, nnx.jit])
def test_aux_comes_back_beside_the_loss(around: Any) -> None:
    def loss(model: Any, x: Any, y: Any) -> Any:
        predicted = model(x)
        return ((predicted - y) ** 2).mean(), {"predicted": predicted, "shape": (x.shape[0], None)}

    x, y = arguments(rows)
    model, rival, third = BatchNormDropout(), BatchNormDropout(), BatchNormDropout()
    (value, aux), grads = around(sw.value_and_grad(loss, has_aux=True))(model, x, y=y)
    (expected, their_aux), their_grads = around(nnx.value_and_grad(loss, has_aux=True))(rival, x, y=y)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert_same_flat(flat_of(aux), flat_of(their_aux))
    assert_same_grads(grads, their_grads)
    alone, alone_aux = around(sw.grad(loss, has_aux=True))(third, x, y=y)
    assert_same_grads(alone, their_grads)
    assert_same_flat(flat_of(alone_aux), flat_of(their_aux))
    assert_same_grads(around(sw.grad(squares))(BatchNormDropout(), x, y), their_grads)
    assert_same_flat(leaves_of(model), leaves_of(rival))


def test_tied_weights_stay_tied_and_get_one_gradient() -> None:
    model = TiedEmbedding()
    _, grads = sw.value_and_grad(cross_entropy)(model, *arguments(tokens))
    assert [path for path, _ in nnx.to_flat_state(grads)] == [
        ("again", "bias"),
        ("again", "kernel"),
        ("embed", "embedding"),
    ]
    assert model.again is model.mixer
    assert model.table is model.embed.embedding


def test_gradients_feed_an_optimizer_of_the_same_filter() -> None:
    model, rival = LowRank(), LowRank()
    for each, gradients in (
        (model, sw.value_and_grad(squares, wrt=nnx.LoRAParam)),
        (rival, nnx.value_and_grad(squares, argnums=nnx.DiffState(0, nnx.LoRAParam))),
    ):
        optimizer = nnx.Optimizer(each, optax.adam(0.05, eps=1e-2), wrt=nnx.LoRAParam)
        for _ in range(3):
            _, grads = gradients(each, *arguments(rows))
            optimizer.update(each, grads)
    assert_same_flat(leaves_of(model), leaves_of(rival))


@pytest.mark.filterwarnings("ignore:cross_entropy declares that it writes everything:statewise.StatewiseWarning")
@pytest.mark.parametrize("name", ["batchnorm_dropout", "scanned", "tied", "own_type"])
def test_inside_a_step(name: str) -> None:
    make, loss, batch, wrt = CASES[name]
    model, rival = make(), make()
    kinds = sw.Kinds(everything=sw.Kind(...))
    gradients = sw.step(writes="everything")(sw.value_and_grad(loss, wrt=wrt))
    state = kinds.plan(model).take(model)
    theirs = nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt)))
    for _ in range(2):
        args = arguments(batch)
        state, (value, grads) = gradients(state, *args)
        expected, their_grads = theirs(rival, *args)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert_same_grads(grads, their_grads)
        assert_same_flat(flat_of(state["everything"]), leaves_of(rival))


def test_inside_a_step_it_writes_no_more_than_the_function_does() -> None:
    """A step that declares no parameters may still differentiate them: unwritten leaves stay unwritten."""
    model = BatchNormDropout()
    state = sw.plan(model).take(model)
    gradients = sw.step(writes=("stats", "rng"))(sw.grad(squares))
    state, grads = gradients(state, *arguments(rows))
    assert_same_grads(grads, nnx.grad(squares)(model, *arguments(rows)))
    model.eval()
    pure = sw.step(sw.grad(squares))
    assert_same_grads(pure(sw.plan(model).take(model), *arguments(rows)), nnx.grad(squares)(model, *arguments(rows)))


def test_second_derivatives() -> None:
    """Gradients of gradients: the outer function differentiates what the inner one returns."""

    def sharpness(norm_of: Any) -> Callable[[Any], Any]:
        def penalty(model: Any) -> Any:
            grads = norm_of(lambda model: squares(model, x, y))(model)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(nnx.as_pure(grads)))

        return penalty

    x, y = arguments(rows)
    mine = sw.grad(sharpness(sw.grad))(OneLayer())
    assert_same_grads(mine, nnx.grad(sharpness(nnx.grad))(OneLayer()))


class OneLayer(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(6, 2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return nnx.tanh(self.layer(x))


def test_values_of_several_arrays_are_differentiated_whole() -> None:
    class Pair(nnx.Module):
        def __init__(self) -> None:
            self.both = nnx.Param({"w": jnp.ones((6, 2)), "b": (jnp.zeros(2), jnp.ones(()))})

        def __call__(self, x: Any) -> Any:
            values = self.both.get_value()
            return x @ values["w"] + values["b"][0][None] * values["b"][1]

    x, y = arguments(rows)
    value, grads = sw.value_and_grad(squares)(Pair(), x, y)
    expected, theirs = jax.value_and_grad(
        lambda values: ((x @ values["w"] + values["b"][0][None] * values["b"][1] - y) ** 2).mean()
    )(Pair().both.get_value())
    np.testing.assert_allclose(value, expected)
    assert_same_flat(flat_of(grads["both"].get_value()), flat_of(theirs))


def test_objects_beside_the_model_are_written_as_it_is() -> None:
    def loss(model: Any, x: Any, y: Any, rngs: nnx.Rngs, others: Any) -> Any:
        predicted = model(x + 0.1 * rngs.normal(x.shape))
        others["metric"].update(values=predicted)
        others["count"][...] += others["by"]
        return ((predicted - y) ** 2).mean()

    x, y = arguments(rows)
    found = []
    for gradients in (sw.grad, nnx.grad):
        model, rngs = BatchNormDropout(), nnx.Rngs(7)
        others = {"metric": nnx.metrics.Average(), "count": nnx.Variable(jnp.array(0)), "by": 3}
        grads = gradients(loss)(model, x, y, rngs, others)
        found.append((grads, leaves_of(model, rngs, others)))
    (mine, ours), (expected, theirs) = found
    assert_same_grads(mine, expected)
    assert_same_flat(ours, theirs)
    assert ours[1, "default", "count"] == 1
    assert ours[2, "count"] == 3


def test_a_filter_looks_at_the_model_alone() -> None:
    """A second model among the arguments is neither differentiated nor part of the filter's paths."""
    model, teacher = OneLayer(), OneLayer()
    x, _ = arguments(rows)
    grads = sw.grad(lambda model, teacher: squares(model, x, teacher(x + 1)), wrt=sw.Path("layer/kernel"))(
        model, teacher
    )
    assert [path for path, _ in nnx.to_flat_state(grads)] == [("layer", "kernel")]
    expected = nnx.grad(lambda model: squares(model, x, teacher(x + 1)))(model)
    np.testing.assert_allclose(grads["layer"]["kernel"][...], expected["layer"]["kernel"][...], rtol=1e-6)


def test_one_variable_is_a_model_too() -> None:
    def loss(variable: Any, by: float) -> Any:
        return by * (variable[...] ** 2).sum()

    grads = sw.grad(loss)(nnx.Param(jnp.arange(3.0)), 2.0)
    expected = nnx.grad(loss)(nnx.Param(jnp.arange(3.0)), 2.0)
    assert type(grads) is type(expected) is type(nnx.Param(0.0))  # that of a hijax Variable is another
    np.testing.assert_array_equal(grads[...], expected[...])
