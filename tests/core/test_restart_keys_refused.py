"""Keys that are missing, useless or wrong in a restart, and functions that are not restarts."""

from __future__ import annotations

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from comparing import same
from drawing import INIT, SLOTS, adapters, drawn, key, noise, values
from refusals import refused
from strategies import Node

# --- what cannot be ----------------------------------------------------------------------------------------------


def test_a_key_that_is_missing() -> None:
    model = adapters()
    state = drawn().plan(model).take(model)
    for kinds, where, shown in (
        (("lora",), None, "'lora', "),
        ((), None, ""),
        (("lora",), [1], "'lora', where=where, "),
    ):
        with refused(
            sw.DeclarationError,
            "The restart of lora takes a key, and none was given.",
            kind="lora",
            hint=f"state.restart({shown}key=jax.random.key(0))  # another key each time",
        ) as caught:
            state.restart(*kinds, where=where)
        followed = eval(str(caught.value.hint), {"state": drawn().plan(model).take(model), "jax": jax, "where": where})
        assert not same(followed["lora"], state["lora"])
    assert same(state, drawn().plan(model).take(model))


@pytest.mark.parametrize("restart", [jnp.zeros_like, lambda array, path: array, functools.partial(noise, key=key())])
def test_a_key_that_nothing_takes(restart: Any) -> None:
    model = adapters()
    state = drawn(restart).plan(model).take(model)
    with refused(
        sw.DeclarationError,
        "key= would do nothing: the restart of lora takes no key.",
        kind="lora",
        hint="leave key= out, or take it: restart=lambda array, key: jax.random.normal(key, array.shape, array.dtype)",
    ):
        state.restart("lora", key=key())
    state.restart("lora")


def test_averages_take_no_key() -> None:
    model = adapters()
    plan = drawn().plan(model, averages={"lora": sw.EMA(0.9)})
    with refused(
        sw.DeclarationError,
        "key= would do nothing: the averages 'ema' restart as copies.",
        kind="ema",
        hint="state.restart('ema')",
    ):
        plan.take(model).restart("ema", key=key())
    state = plan.take(model).restart("lora", "ema", key=key())
    assert same(jax.tree.leaves(state["ema"]), jax.tree.leaves(state["lora"]))


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (0, "int"),
        (jax.random.split(jax.random.key(0), 3), "key<fry>[3]"),
        (jax.random.split(jax.random.PRNGKey(0), 3), "uint32[3, 2]"),
        (jnp.zeros(2), "float32[2]"),
        (nnx.Rngs(0), "Rngs"),
        ("key", "str"),
    ],
)
def test_what_is_not_one_key(wrong: Any, shown: str) -> None:
    model = adapters()
    state = drawn().plan(model).take(model)
    with refused(
        sw.DeclarationError,
        f"key= must be one PRNG key, from which each leaf and each slot gets its own, not {shown}.",
        hint="key=jax.random.key(0)",
    ):
        state.restart("lora", key=wrong)
    assert same(state, drawn().plan(model).take(model))


def test_an_initializer_is_not_a_restart() -> None:
    with refused(
        sw.DeclarationError,
        "restart=init is an initializer, of (key, shape, dtype), not a function of one array.",
        hint="sw.Kind(nnx.Param, restart=lambda array, key: init(key, array.shape, array.dtype))",
    ) as caught:
        sw.Kind(nnx.Param, restart=INIT)
    model = adapters()
    kind = eval(str(caught.value.hint), {"sw": sw, "nnx": nnx, "init": INIT})
    assert sw.Kinds(lora=kind, rest=sw.Kind(...)).plan(model).take(model).restart("lora", key=key())


@pytest.mark.parametrize(
    "wrong", [lambda: 0, lambda array, other: array, lambda array, key, /: array, lambda *, key: key]
)
def test_a_function_that_cannot_be_called_so(wrong: Any) -> None:
    with pytest.raises(
        sw.DeclarationError, match=r"^restart=<lambda> cannot be called with one array, and key= and path= by name: "
    ) as caught:
        sw.Kind(nnx.Param, restart=wrong)
    assert caught.value.hint == "sw.Kind(nnx.Param, restart=lambda array, key, path: ...)  # key, path: where needed"
    assert eval(str(caught.value.hint), {"sw": sw, "nnx": nnx}).restart


class Drawing:
    """A callable of one's own."""

    def __call__(self, array: Any, *, key: Any) -> Any:
        return noise(array, key)


@pytest.mark.parametrize(
    "restart",
    [
        noise,
        Drawing(),
        Drawing().__call__,
        functools.partial(lambda scale, array, key: scale * noise(array, key), 2.0),
        jax.jit(noise),
        functools.wraps(noise)(lambda *args, **kwargs: noise(*args, **kwargs)),
        lambda *args, key: noise(*args, key),
    ],
)
def test_callables_of_every_make(restart: Any) -> None:
    model = adapters()
    state = drawn(restart).plan(model).take(model).restart("lora", where=[0], key=key())
    assert len({array[0].tobytes() for array in values(state)}) == 4
    assert all((array[1:] == 5).all() for array in values(state))


@pytest.mark.parametrize("changed", [lambda array, key: key, lambda array, key: array[0], lambda array, key: 0.0])
def test_a_restart_that_changes_a_slot(changed: Any) -> None:
    model = Node(a=nnx.Param(jnp.ones((3, SLOTS))))
    state = drawn(changed, axis=1).plan(model).take(model)
    with pytest.raises(sw.StructureError, match=r"^The restart of kind 'lora' changes shapes or dtypes\."):
        state.restart("lora", where=[0], key=key())
    assert state["lora"]["a"].all()


def test_hints_for_leaves_without_slots_can_be_followed() -> None:
    model = Node(
        blocks=nnx.List([Node(k=nnx.Cache(jnp.ones((SLOTS, 2))), index=nnx.Cache(jnp.array(3))) for _ in range(2)]),
        odd=Node(k=nnx.Cache(jnp.ones(2))),
        w=nnx.Param(jnp.ones(2)),
    )
    for rest in (False, True):
        cache = sw.Kind(... if rest else nnx.Cache, saved=False, restart=jnp.zeros_like, batch_axis=0)
        others = {"params": sw.Kind(nnx.Param)} if rest else {"rest": sw.Kind(...)}
        plan = sw.Kinds(cache=cache, **others).plan(model)
        with pytest.raises(sw.StructureError, match=r"^Not every leaf of cache has 4 slots") as caught:
            plan.take(model).restart("cache", where=[1])
        names: dict[str, Any] = {"plan": plan, "sw": sw, "nnx": nnx, "dataclasses": __import__("dataclasses")}
        first, last = str(caught.value.hint).split("\n")
        assert last == "or restart all slots: state.restart('cache')"
        exec(first, names)
        state = names["kinds"].plan(model).take(model).restart("cache", where=[1])
        assert state["cache"]["blocks"][0]["k"].tolist() == [[1, 1], [0, 0], [1, 1], [1, 1]]
        assert [leaf.kind for leaf in names["kinds"].plan(model).leaves].count("cache_of_all") == 3
        assert names["kinds"]["cache_of_all"].saved is False


# --- checkpoints -------------------------------------------------------------------------------------------------


def test_missing_restart_takes_no_key() -> None:
    with refused(
        sw.DeclarationError,
        "missing='restart' calls restart without a key, but this one takes a key.",
        hint="sw.Kind(nnx.Param, missing='keep', restart=...)\n"
        "and after the restore: state.restart(..., key=jax.random.key(0))",
    ):
        sw.Kind(nnx.Param, missing="restart", restart=noise)


def test_a_restore_tells_the_path_and_keeps_what_would_be_drawn(tmp_path: pathlib.Path) -> None:
    model = adapters()
    small = Node(w=nnx.BatchStat(jnp.zeros(3)))
    sw.save(tmp_path / "a", drawn().plan(small).take(small))

    def by_path(array: Any, path: tuple[Any, ...]) -> Any:
        return jnp.full_like(array, len(str(path[-1])) if path[-1] == "lora_b" else path[1])

    plan = drawn(by_path, missing="restart").plan(model)
    state, report = sw.restore(tmp_path / "a", plan.abstract())
    assert report.counts["lora"] == {"restarted": 4}
    assert [array.flat[0] for array in values(state)] == [0, 6, 1, 6]

    unsaved = drawn(saved=False).plan(model)
    kept, report = sw.restore(tmp_path / "a", unsaved.take(model))
    assert report.counts["lora"] == {"kept": 4}
    assert same(kept["lora"], unsaved.take(model)["lora"])
    with pytest.raises(sw.RestoreError, match="its restart takes a key, which a restore does not have") as caught:
        sw.restore(tmp_path / "a", unsaved.abstract())
    assert caught.value.hint == (
        "restore into a state with values: sw.restore(path, plan.take(model)), "
        "and then: state.restart('lora', key=jax.random.key(0))"
    )
