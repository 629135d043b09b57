"""The proof that an optimizer is elementwise: against Optax itself, and against optimizers that are not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import statewise as sw
from statewise._src.core.plan import tables_of
from statewise._src.plan.elementwise import PARAM, Elementwise
from statewise._src.plan.optimizer_state import OptimizerGroup


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])
        self.gain = nnx.Param(jnp.ones(()))


def is_matrix(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def labels(params: Any) -> Any:
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "rest", params)


PROVEN = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(1e-2),
    "adam of half moments": optax.adam(1e-2, mu_dtype=jnp.bfloat16),
    "adamw with a schedule": optax.adamw(optax.cosine_decay_schedule(1e-2, 10)),
    "clipped by global norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "masked decay": optax.adamw(1e-2, weight_decay=0.1, mask=is_matrix),
    "masked transformation": optax.masked(optax.sgd(0.1), is_matrix),
    "two by label": optax.multi_transform({"matrix": optax.adam(1e-2), "rest": optax.sgd(0.1)}, labels),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(1e-2),
    "plateau": optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau(patience=1)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
}
REFUSED = {
    "lamb": optax.lamb(1e-3),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=2),
    "muon": optax.contrib.muon(1e-3),
    "several steps": optax.MultiSteps(optax.adam(1e-3), 2),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, 0), optax.sgd(0.1)),
    "line search": optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
    "centralised": optax.chain(optax.centralize(), optax.sgd(0.1)),
}


def group_of(tx: Any) -> OptimizerGroup:
    return tables_of(sw.plan(Net(nnx.Rngs(0)), optimizers={"params": tx})).optimizers[0]


def flat_update(proof: Elementwise, params: list[Any], grads: list[Any], moments: list[Any]) -> tuple[Any, Any]:
    """One update by the proof, the leaves of each signature joined into one buffer."""
    run = proof.shared(params, grads, moments, jnp.float32(0.5))
    new_params, new_moments = list(params), run.shared_moments()
    for signature in dict.fromkeys(proof.signatures):
        mine = [leaf for leaf, its in enumerate(proof.signatures) if its == signature]
        where = {owner: at for at, owner in enumerate(proof.roles) if owner is not None}

        def joined(arrays: list[Any]) -> Any:
            return jnp.concatenate([jnp.ravel(array) for array in arrays])

        buffers = {PARAM: joined([params[leaf] for leaf in mine]), "grad": joined([grads[leaf] for leaf in mine])}
        for role, _ in signature:
            if role != PARAM:
                buffers[role] = joined([moments[where[role, leaf]] for leaf in mine])
        made, at = run.leaf(signature, buffers), 0
        for leaf in mine:
            size, shape = params[leaf].size, params[leaf].shape
            for role, flat in made.items():
                array = flat[at : at + size].reshape(shape)
                if role == PARAM:
                    new_params[leaf] = array
                else:
                    new_moments[where[role, leaf]] = array
            at += size
    return new_params, new_moments


@pytest.mark.parametrize("name", PROVEN)
def test_an_update_on_buffers_is_optaxs_own(name: str) -> None:
    group = group_of(PROVEN[name])
    proof = group.proof()
    assert proof is not None
    keys = iter(jax.random.split(jax.random.key(0), 64))
    params = [jax.random.normal(next(keys), specs[0].shape) for _, specs, _ in group.rows]
    moments = group.init(params)

    def reference(params: list[Any], grads: list[Any], moments: list[Any]) -> tuple[Any, Any]:
        state = jax.tree.unflatten(group.layout.structure, moments)
        nested = group.params(params)
        updates, state = group.tx.update(group.params(grads), state, nested, value=jnp.float32(0.5))
        return group.arrays(optax.apply_updates(nested, updates)), jax.tree.leaves(state)

    # Primitive by primitive, so that XLA does not contract a multiplication and an addition in one and not the other.
    for _ in range(3):
        grads = [jax.random.normal(next(keys), array.shape) for array in params]
        expected = reference(params, grads, moments)
        made = flat_update(proof, params, grads, moments)
        for want, have in zip(jax.tree.leaves(expected), jax.tree.leaves(made), strict=True):
            assert want.dtype == have.dtype
            if name == "clipped by global norm":  # the sum over all leaves is compiled as one, and in another order
                assert jnp.allclose(want, have, rtol=1e-6, atol=1e-8)
            else:
                assert (want == have).all()  # bit for bit
        params, moments = expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_elementwise_is_not_proven(name: str) -> None:
    assert group_of(REFUSED[name]).proof() is None


def test_leaves_that_are_updated_apart_have_different_signatures() -> None:
    proof = group_of(PROVEN["masked decay"]).proof()
    assert proof is not None
    by_leaf = dict(zip([path[-1] for path, _, _ in proof_rows("masked decay")], proof.signatures, strict=True))
    assert by_leaf["bias"] == by_leaf["gain"] != by_leaf["kernel"]


def proof_rows(name: str) -> Any:
    return group_of(PROVEN[name]).rows


def leafwise(scale: Any) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> Any:
        return scale(updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def shift_leaves(updates: Any) -> Any:
    """Gives each leaf the update of its neighbour of the same shape."""
    leaves, structure = jax.tree.flatten(updates)
    shapes = [leaf.shape for leaf in leaves]
    return structure.unflatten([leaves[shapes.index(shape)] for shape in shapes])


SNEAKY = {
    "reads another leaf": leafwise(shift_leaves),
    "reverses each leaf": leafwise(
        lambda updates: jax.tree.map(lambda leaf: leaf[..., ::-1] if leaf.ndim else leaf, updates)
    ),
    "cumulates along an axis": leafwise(
        lambda updates: jax.tree.map(lambda leaf: jnp.cumsum(leaf, -1) if leaf.ndim else leaf, updates)
    ),
    "a different factor by position": leafwise(
        lambda updates: jax.tree.map(lambda leaf: leaf * jnp.arange(leaf.size).reshape(leaf.shape), updates)
    ),
}


@pytest.mark.parametrize("name", SNEAKY)
def test_an_optimizer_cannot_pass_for_elementwise(name: str) -> None:
    assert group_of(SNEAKY[name]).proof() is None


def test_constants_that_differ_by_leaf_keep_leaves_apart() -> None:
    def by_rank(updates: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf * (leaf.ndim + 1.0), updates)

    proof = group_of(leafwise(by_rank)).proof()
    assert proof is not None
    assert len(set(proof.signatures)) == 3


@pytest.mark.parametrize(
    "tx",
    [
        leafwise(lambda grads: jax.tree.map(lambda leaf: leaf / jnp.linalg.norm(leaf), grads)),
        optax.clip_by_block_rms(0.1),
    ],
)
def test_a_norm_of_each_leaf_keeps_all_leaves_apart(tx: Any) -> None:
    """A norm is shared by the elements of its leaf, so the proof holds; but no two leaves can have one buffer."""
    proof = group_of(tx).proof()
    assert proof is not None
    assert len(set(proof.signatures)) == len(proof.signatures)
