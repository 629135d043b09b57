"""The law of packed train steps: whatever options meet, a packed state goes through the numbers of an unpacked one.

And of a loop of `jax.value_and_grad` and Optax, one part of the batch after another, which knows nothing of Statewise.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw


class Net(nnx.Module):
    """Holds enough small arrays for buffers: of parameters, of two shapes, and of statistics."""

    def __init__(self) -> None:
        self.scales = nnx.List([nnx.Param(jnp.linspace(0.6, 1.1, 3) + 0.1 * number) for number in range(4)])
        self.shifts = nnx.List([nnx.Param(jnp.full((1, 3), 0.1 * number)) for number in range(4)])
        self.means = nnx.List([nnx.BatchStat(jnp.full(3, 0.1 * number)) for number in range(4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for scale, shift, mean in zip(self.scales, self.shifts, self.means, strict=True):
            x = x * scale[None, :] + shift[...]
            mean[...] = 0.5 * mean[...] + 0.5 * x.mean(0)
        return x


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class Options(NamedTuple):
    """What a train step is asked to do, each on or off."""

    elementwise: bool
    averages: bool
    writes: bool
    skips: bool
    parts: bool
    weighted: bool
    measures: bool

    def __str__(self) -> str:
        return "-".join(name for name, is_on in self._asdict().items() if is_on) or "none"

    @property
    def tx(self) -> Any:
        """Returns the optimizer: of two updates by the shape of a leaf, or of one that looks at all leaves."""
        if self.elementwise:
            return optax.masked(optax.adamw(0.05, weight_decay=0.1), matrices)
        return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))


# Sixteen of the 128 combinations, in which every three options meet in all eight ways.
FEWER = [
    Options(a, b, c, d, a ^ b ^ c, b ^ c ^ d, a ^ c ^ d) for a, b, c, d in itertools.product([False, True], repeat=4)
]
X = jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)
BAD = X.at[3, 1].set(jnp.nan)
WEIGHT = jnp.array([1.0, 3.0, 0.5, 0.25])


def decay(count: Any) -> Any:
    return (1 + count) / (10 + count)


def loss_of(options: Options, model: Any, x: jax.Array, weight: jax.Array) -> Any:
    if options.writes:  # one parameter of a buffer, as layers do that normalize their own weights
        model.shifts[1][...] = model.shifts[1][...] * 0.9
        model.scales[2][...] = model.scales[2][...] * 1.1
    loss = (model(x) ** 2).mean()
    return (loss, weight.sum()) if options.weighted else loss


# --- by Statewise ------------------------------------------------------------------------------------------------


def prepared(options: Options, pack: bool) -> tuple[sw.State, Any]:
    """Returns a state and a step."""
    averages: Any = {("params", "stats"): sw.EMA(decay)} if options.averages else None
    plan = sw.plan(Net(), optimizers={"params": options.tx}, averages=averages)
    step = sw.train_step(
        functools.partial(loss_of, options),
        writes=("params", "stats") if options.writes else None,
        nonfinite="skip" if options.skips else "write",
        microbatches=2 if options.parts else 1,
        weighted=options.weighted,
        measure=options.measures,
    )
    state = plan.take(Net(), pack=pack)
    assert (len(jax.tree.leaves(state)) < 15) == pack  # without buffers there would be nothing to try
    return state, step


def trained(options: Options, batches: Any, pack: bool) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Returns the arrays of a state by kind, the losses, and what was measured, after some steps."""
    state, step = prepared(options, pack)
    losses, measured = [], []
    for x in batches:
        state, out = step(state, x, WEIGHT)
        loss, figures = out if options.measures else (out, None)
        losses.append(loss)
        measured.append(jax.tree.leaves(figures))
    return {kind: state[kind] for kind in state}, losses, measured


# --- by hand -----------------------------------------------------------------------------------------------------


def arrays_of(model: Any, type_: Any) -> dict[str, jax.Array]:
    """Returns a model's arrays of one type, by path."""
    found = nnx.iter_graph(model, graph=True)
    return {"/".join(map(str, path)): leaf[...] for path, leaf in found if isinstance(leaf, type_)}


def part_by_hand(options: Options, params: Any, stats: Any, x: Any, weight: Any) -> tuple[Any, Any]:
    """Returns (output, parameters and statistics afterwards) of one part, and the gradients."""

    def pure(params: Any) -> Any:
        with nnx.var_defaults(hijax=False, ref=False):
            model = Net()
        for path, leaf in nnx.iter_graph(model, graph=True):
            if isinstance(leaf, nnx.Variable):
                leaf[...] = (params | stats)["/".join(map(str, path))]
        out = loss_of(options, model, x, weight)
        loss, own = out if options.weighted else (out, jnp.array(1.0))
        return loss, (own, arrays_of(model, nnx.Param), arrays_of(model, nnx.BatchStat))

    (loss, after), grads = jax.value_and_grad(pure, has_aux=True)(params)
    return (loss, *after), grads


def batch_by_hand(options: Options, params: Any, stats: Any, x: Any) -> tuple[Any, Any, Any, Any]:
    """Returns loss, gradients, parameters and statistics after all parts of a batch."""
    count = 2 if options.parts else 1
    loss, total, sums = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
    for rows, weights in zip(jnp.split(x, count), jnp.split(WEIGHT, count), strict=True):
        (own, weight, params, stats), grads = part_by_hand(options, params, stats, rows, weights)
        loss, total = loss + weight * own, total + weight
        sums = jax.tree.map(lambda old, new, weight=weight: old + weight * new, sums, grads)
    return loss / total, jax.tree.map(lambda old: old / total, sums), params, stats


def by_hand(options: Options, batches: Any) -> tuple[dict[str, Any], list[Any]]:
    """Returns the arrays by kind, and the losses, after some steps."""
    with nnx.var_defaults(hijax=False, ref=False):
        params, stats = arrays_of(Net(), nnx.Param), arrays_of(Net(), nnx.BatchStat)
    moments, ema = options.tx.init(params), params | stats
    losses: list[Any] = []
    for x in batches:
        loss, grads, new, new_stats = batch_by_hand(options, params, stats, x)
        losses.append(loss)
        if options.skips and not np.isfinite(loss):
            continue
        kept = decay(len(losses) - 1)  # the only batch that is not finite is the last one
        updates, moments = options.tx.update(grads, moments, new)
        params, stats = optax.apply_updates(new, updates), new_stats
        ema = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * new, ema, params | stats)
    return {"params": params, "stats": stats} | ({"ema": ema} if options.averages else {}), losses


def flat(nested: Any) -> dict[str, np.ndarray]:
    """Returns what a state has of a kind by path, its averages without the kinds' names."""
    flattened = jax.tree_util.tree_flatten_with_path(jax.tree.map(np.asarray, nnx.to_pure_dict(nested)))[0]
    paths = {"/".join(str(key.key) for key in keys): array for keys, array in flattened}
    return {path.removeprefix("params/").removeprefix("stats/"): array for path, array in paths.items()}


# --- the law -----------------------------------------------------------------------------------------------------


def test_every_three_options_meet_in_every_way() -> None:
    for chosen in itertools.combinations(range(len(Options._fields)), 3):
        assert len({tuple(row[index] for index in chosen) for row in FEWER}) == 8


@pytest.mark.parametrize("options", [row for row in FEWER if row.averages and (row.skips or row.weighted)], ids=str)
def test_a_packed_step_that_may_change_nothing_is_traced(options: Options) -> None:
    """The fast half of the law: what a step may keep as it is has the same buffers as what it computes."""
    state, step = prepared(options, pack=True)
    after, _ = jax.eval_shape(step, state, X, WEIGHT)
    assert list(map(jnp.shape, jax.tree.leaves(after))) == list(map(jnp.shape, jax.tree.leaves(state)))


@pytest.mark.heavy
@pytest.mark.parametrize("options", FEWER, ids=str)
def test_a_packed_step_is_the_unpacked_one_and_the_one_by_hand(options: Options) -> None:
    batches = [X, X + 0.5, BAD] if options.skips else [X, X + 0.5]
    packed, losses, measured = trained(options, batches, pack=True)
    unpacked, same, figures = trained(options, batches, pack=False)
    np.testing.assert_allclose(losses, same, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), measured, figures)
    assert packed.keys() == unpacked.keys()
    for kind in packed:
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), packed[kind], unpacked[kind])

    kinds, expected = by_hand(options, batches)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for kind, arrays in kinds.items():
        ours = flat(packed[kind])
        for path, array in arrays.items():
            np.testing.assert_allclose(ours[path], array, rtol=1e-4, atol=1e-5, err_msg=f"{kind} {path}")
