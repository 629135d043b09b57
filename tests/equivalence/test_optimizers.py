"""Step for step the same numbers as `nnx.jit` with `nnx.Optimizer`, optimizer by optimizer: parameters and state."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import statewise as sw
from equivalence.models import HalfPrecision, LowRank, Perceptron, rows, squares
from equivalence.rivals import (
    Case,
    Snapshot,
    assert_same,
    assert_same_flat,
    batches,
    by_hand,
    by_steps,
    flat_of,
    leaves_of,
    leaves_of_state,
)

PERCEPTRON = Case(Perceptron, rows, squares)


def matrices(params: Any) -> Any:
    """A mask: the kernels and not the biases."""
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def by_path(params: Any) -> Any:
    """A label for each leaf, by where it stands."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "first" if path[0].key == "inner" else "others", params)


def written_mask() -> Any:
    """A mask that names its leaves, nested as the parameters are, in what Flax nests them in."""
    layers = {"inner": "kernel", "middle": "bias", "outer": "kernel"}
    names = ((layer, name) for layer in layers for name in ("kernel", "bias"))
    return nnx.from_flat_state({(layer, name): name == layers[layer] for layer, name in names})


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 6)

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.05),
    "adamw_clipped": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.05, weight_decay=0.1)),
    "adamw_mask": lambda: optax.adamw(0.05, weight_decay=0.3, mask=matrices),
    "masked_by_function": lambda: optax.chain(optax.masked(optax.trace(0.9), matrices), optax.scale(-0.1)),
    "masked_by_names": lambda: optax.chain(optax.sgd(0.1), optax.masked(optax.adam(0.1), written_mask())),
    "multi_transform": lambda: optax.multi_transform({"first": optax.adam(0.05), "others": optax.sgd(0.1)}, by_path),
    "partly_frozen": lambda: optax.partition({"first": optax.set_to_zero(), "others": optax.lion(0.01)}, by_path),
    "schedule": lambda: optax.adam(SCHEDULE),
    "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=4),
    "muon": lambda: contrib.muon(0.05),
    "lamb": lambda: optax.lamb(0.05),
    "sm3": lambda: optax.sm3(0.1),
    "named_chain": lambda: optax.named_chain(("moments", optax.scale_by_adam()), ("rate", optax.scale(-0.1))),
    "flatten": lambda: optax.flatten(optax.adam(0.05)),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.05), every_k_schedule=2),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(0.05), 3),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE, weight_decay=0.1),
    "reduce_on_plateau": lambda: optax.chain(optax.sgd(0.1), contrib.reduce_on_plateau(0.5, patience=0, rtol=0.5)),
    "schedule_free": lambda: contrib.schedule_free_adamw(0.05, b1=0.9),
    "noise": lambda: optax.noisy_sgd(0.1, key=jax.random.key(3)),
    "polyak": lambda: optax.polyak_sgd(),
}
SEARCHES: dict[str, Any] = {
    "lbfgs": lambda: optax.lbfgs(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(4)),
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameters_and_optimizer_state_are_those_of_nnx_optimizer(name: str) -> None:
    tx = OPTIMIZERS[name]()
    ours, theirs = by_steps(PERCEPTRON, tx), by_hand(PERCEPTRON, tx)
    assert_same(ours, theirs, 1e-4)
    assert any((ours[0].leaves[path] != ours[-1].leaves[path]).any() for path in ours[0].leaves)


@pytest.mark.parametrize("name", SEARCHES)
def test_line_searches_evaluate_the_loss(name: str) -> None:
    tx = SEARCHES[name]()
    ours, theirs = by_steps(PERCEPTRON, tx), by_hand(PERCEPTRON, tx, value_fn=True)
    assert_same(ours, theirs, 1e-3)
    assert ours[-1].loss < ours[0].loss


@pytest.mark.parametrize("name", [*OPTIMIZERS, *SEARCHES])
def test_packing_changes_nothing_whatever_the_optimizer(name: str) -> None:
    """Rounding aside: XLA fuses the two programs differently, and then rounds at other places."""
    make = {**OPTIMIZERS, **SEARCHES}[name]
    packed, plain = by_steps(PERCEPTRON, make(), pack=True), by_steps(PERCEPTRON, make())
    assert_same(packed, plain, 1e-4 if name in ("muon", "lbfgs") else 2e-5)


# --- several kinds ---------------------------------------------------------------------------------------------

LORA = Case(LowRank, rows, squares)


def test_one_optimizer_for_several_kinds_clips_by_their_common_norm() -> None:
    tx = optax.chain(optax.clip_by_global_norm(0.05), optax.adam(0.05, eps=1e-2))
    joint = dataclasses.replace(LORA, trained=("params", "lora"))
    ours = by_steps(joint, tx)
    assert_same(ours, by_hand(joint, tx), 1e-4)
    apart = by_two(tx, tx)
    assert any(np.abs(ours[-1].leaves[path] - apart[-1].leaves[path]).max() > 1e-3 for path in apart[-1].leaves)


def by_two(params: Any, lora: Any) -> list[Snapshot]:
    model = LowRank()
    plan = sw.plan(model, optimizers={"params": params, "lora": lora})
    state, train, found = plan.take(model), sw.train_step(squares), []
    for args in batches(LORA):
        state, loss = train(state, *args)
        moments = flat_of(state["optimizer"])
        found.append(Snapshot(np.asarray(loss), leaves_of_state(state), moments))
    return found


def test_kinds_with_optimizers_of_their_own_are_updated_apart() -> None:
    txs = {"params": optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(0.1)), "lora": optax.adamw(0.05)}
    filters = {"params": nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam)), "lora": nnx.LoRAParam}
    model = LowRank()
    optimizers = {name: nnx.Optimizer(model, tx, wrt=filters[name]) for name, tx in txs.items()}

    @nnx.jit
    def train(model: Any, optimizers: Any, *args: Any) -> Any:
        loss, grads = nnx.value_and_grad(squares)(model, *args)
        for name, optimizer in optimizers.items():
            optimizer.update(model, nnx.filter_state(grads, filters[name]))
        return loss

    theirs = []
    for args in batches(LORA):
        loss = train(model, optimizers, *args)
        moments = flat_of({name: nnx.as_pure(optimizer.opt_state) for name, optimizer in optimizers.items()})
        theirs.append(Snapshot(np.asarray(loss), leaves_of(model), moments))
    assert_same(by_two(**txs), theirs, 1e-4)


def test_adapters_are_trained_and_their_base_is_not() -> None:
    kinds = sw.Kinds.standard().replace(params=sw.Kind(sw.Kinds.standard()["params"].of, frozen=True))
    case = dataclasses.replace(LORA, wrt=nnx.LoRAParam, trained="lora", kinds=kinds)
    tx = optax.adam(0.05, eps=1e-2)
    ours = by_steps(case, tx)
    assert_same(ours, by_hand(case, tx), 1e-4)
    before = leaves_of(LowRank())
    for path, leaf in ours[-1].leaves.items():
        assert np.array_equal(leaf, before[path]) == ("lora_a" not in path and "lora_b" not in path), path
    assert {path[-1] for path in ours[-1].moments if "mu" in path} == {"lora_a", "lora_b"}


# --- dtypes, and what an optimizer brings along ----------------------------------------------------------------


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keeps the moments of half-precision parameters in float32."""
    widen = functools.partial(optax.tree.cast, dtype=jnp.float32)
    return optax.GradientTransformation(
        lambda params: tx.init(widen(params)),
        lambda grads, state, params: tx.update(widen(grads), state, widen(params)),
    )


@pytest.mark.parametrize("tx", [in_float32(optax.adamw(0.05)), optax.adam(0.05, mu_dtype="float32")])
def test_half_precision_parameters_with_float32_moments(tx: Any) -> None:
    case = Case(HalfPrecision, rows, squares)
    ours = by_steps(case, tx)
    assert_same(ours, by_hand(case, tx), rtol=2e-2)
    mu = {path: leaf for path, leaf in ours[-1].moments.items() if "mu" in path}
    assert {leaf.dtype for leaf in mu.values()} == {np.dtype(np.float32)}
    assert ours[-1].leaves["inner", "kernel"].dtype == jnp.bfloat16


def test_arrays_that_an_optimizer_was_made_with_stay_whole() -> None:
    rate, key = jnp.asarray(0.1), jax.random.key(0)
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(learning_rate=rate), optax.add_noise(0.01, 0.5, key=key))
    first, second = by_steps(PERCEPTRON, tx, steps=2), by_steps(PERCEPTRON, tx, steps=2)
    assert not rate.is_deleted()
    assert not key.is_deleted()
    assert_same(first, second, exact=True)


def test_hyperparameters_are_set_from_outside() -> None:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    model = Perceptron()
    state, train = sw.plan(model, optimizers={"params": tx}).take(model), sw.train_step(squares)
    args = batches(PERCEPTRON)[0]
    state, _ = train(state, *args)
    state = state.replace(optimizer=optax.tree.set(state["optimizer"], learning_rate=jnp.zeros(())))
    before = leaves_of_state(state)
    state, _ = train(state, *args)
    assert_same_flat(leaves_of_state(state), before, exact=True)
