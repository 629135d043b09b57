"""Restarts that lose something: adapters of zeros, and draws that are alike."""

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

import statewise as sw
from linted import clean, codes, finds

KEY = jax.random.key(0)
INIT = nnx.initializers.he_uniform()


def adapter(array: Any, *, key: Any, path: Any) -> Any:
    return jnp.zeros_like(array) if path[-1] == "lora_b" else INIT(key, array.shape, array.dtype)


def model() -> nnx.Module:
    return nnx.Dict(
        layer=nnx.LoRALinear(4, 5, lora_rank=2, rngs=nnx.Rngs(0)), alone=nnx.LoRA(4, 2, 5, rngs=nnx.Rngs(1))
    )


def kinds(restart: Any, **options: Any) -> sw.Kinds:
    return sw.Kinds.standard().replace(lora=sw.Kind(nnx.LoRAParam, restart=restart, **options))


ZEROS = {
    "zeros_like": jnp.zeros_like,
    "zeros": lambda array: jnp.zeros(array.shape, array.dtype),
    "times zero": lambda array: array * 0,
    "full": functools.partial(jnp.full_like, fill_value=0),
    "jitted": jax.jit(jnp.zeros_like),
    "NumPy's": lambda array: np.zeros(array.shape, array.dtype),
    "with a key": lambda array, key: jnp.zeros_like(array),
    "an initializer": lambda array, key: nnx.initializers.zeros(key, array.shape, array.dtype),
    "with a path": lambda array, path: jnp.zeros_like(array) if path else array,
}


@pytest.mark.parametrize("restart", ZEROS.values(), ids=ZEROS.keys())
def test_a_restart_that_zeroes_every_factor(restart: Any) -> None:
    message = "The restart of lora makes every factor of an adapter zero."
    leaves = [
        "alone/lora_a: LoRAParam(4, 2) float32  kind=lora",
        "alone/lora_b: LoRAParam(2, 5) float32  kind=lora",
        "layer/lora/lora_a: LoRAParam(4, 2) float32  kind=lora",
        "layer/lora/lora_b: LoRAParam(2, 5) float32  kind=lora",
    ]
    hint = (
        "kinds = kinds.replace(lora=dataclasses.replace(kinds['lora'], restart=lambda array, key, path: "
        "jnp.zeros_like(array) if path[-1] == 'lora_b' else "
        "nnx.initializers.he_uniform()(key, array.shape, array.dtype)))"
    )
    declared = kinds(restart)
    finds("adapter-of-zeros", message, leaves, hint, model(), kinds=declared)
    finds("adapter-of-zeros", message, leaves, hint, declared.plan(model()))
    names: dict[str, Any] = {"kinds": declared, "dataclasses": dataclasses, "jnp": jnp, "nnx": nnx}
    exec(hint, names)
    clean(names["kinds"].plan(model()))
    state = names["kinds"].plan(model()).take(model()).restart("lora", key=KEY)
    assert state["lora"]["alone"]["lora_a"].all()
    assert not state["lora"]["alone"]["lora_b"].any()


@pytest.mark.parametrize("restart", [adapter, jnp.ones_like, lambda array: array, lambda array: 1 / 0])
@pytest.mark.parametrize("axis", [None, 0])
def test_a_restart_that_does_not(restart: Any, axis: int | None) -> None:
    clean(kinds(restart, batch_axis=axis).plan(model()))


def test_one_factor_that_restarts_at_zero_is_enough() -> None:
    declared = sw.Kinds.standard().replace(lora=sw.Kind(nnx.LoRAParam & sw.Path("**/lora_a")))
    clean(
        (declared | sw.Kinds(b=sw.Kind(sw.Path("**/lora_b"), restart=jnp.zeros_like)))
        .replace(params=sw.Kind(nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))))
        .plan(model())
    )


def test_two_kinds_that_both_zero_their_factor() -> None:
    declared = sw.Kinds(
        a=sw.Kind(sw.Path("**/lora_a"), restart=jnp.zeros_like),
        b=sw.Kind(sw.Path("**/lora_b"), restart=jnp.zeros_like),
        rest=sw.Kind(...),
    )
    assert codes(declared.plan(model())) == ["adapter-of-zeros"]


def test_the_standard_kinds_do_not_restart_adapters() -> None:
    assert sw.Kinds.standard()["lora"].restart is None
    clean(model())


def test_an_adapter_that_is_zero_already() -> None:
    one = nnx.Dict(lora=nnx.LoRA(4, 2, 5, rngs=nnx.Rngs(0)))
    one.lora.lora_a[...] = jnp.zeros((4, 2))
    finds(
        "adapter-of-zeros",
        "Every factor of an adapter is zero.",
        ["lora/lora_a: LoRAParam(4, 2) float32  kind=lora", "lora/lora_b: LoRAParam(2, 5) float32  kind=lora"],
        "self.lora_a = nnx.LoRAParam(nnx.initializers.he_uniform()(key, shape, dtype))  # all but one",
        one,
    )


DRAWS = {
    "closure": lambda array: jax.random.normal(KEY, array.shape, array.dtype),
    "partial": functools.partial(lambda array, key: INIT(key, array.shape, array.dtype), key=KEY),
    "made inside": lambda array: jax.random.uniform(jax.random.PRNGKey(0), array.shape),
    "by path": lambda array, path: INIT(jax.random.fold_in(KEY, len(path)), array.shape, array.dtype),
    "jitted": jax.jit(lambda array: array + jax.random.bernoulli(KEY, 0.5, array.shape)),
}


@pytest.mark.parametrize("restart", DRAWS.values(), ids=DRAWS.keys())
def test_a_restart_that_draws_from_a_key_of_its_own(restart: Any) -> None:
    hint = (
        "kinds = kinds.replace(lora=dataclasses.replace(kinds['lora'], restart=lambda array, key: "
        "jax.random.normal(key, array.shape, array.dtype), missing='keep'))"
    )
    one = nnx.LoRA(4, 2, 5, rngs=nnx.Rngs(0))
    declared = kinds(restart, missing="restart")
    finds(
        "restart-draws-alike",
        "The restart of lora draws from a key of its own.",
        ["lora_a: LoRAParam(4, 2) float32  kind=lora", "lora_b: LoRAParam(2, 5) float32  kind=lora"],
        hint,
        declared.plan(one),
    )
    names: dict[str, Any] = {"kinds": declared, "dataclasses": dataclasses, "jax": jax}
    exec(hint, names)
    clean(names["kinds"].plan(one))


def test_what_is_made_of_the_stream_of_now_draws_nothing_alike() -> None:
    def on(keys: Any) -> Any:
        return jax.random.fold_in(keys, 1)

    declared = sw.Kinds.standard().replace(rng=sw.Kind(nnx.RngState))
    declared = declared | sw.Kinds(streams=sw.Kind(nnx.RngKey, restart=on))
    declared = declared.replace(rng=sw.Kind(nnx.RngCount))
    clean(declared.plan(nnx.Dropout(0.5, rngs=nnx.Rngs(0))))


def test_nothing_is_traced_for_kinds_without_a_restart() -> None:
    clean(sw.plan(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optimizers={"params": optax.adam(1e-3)}))
