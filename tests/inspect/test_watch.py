"""`watch`: what any code did to a model, and what it should have done and did not."""

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
from refusals import refused
from statewise._src.common.nnx_graph import raw_value
from watched import FROZEN, Tied, X, Y, hows, make, paths, train

# --- what changed ------------------------------------------------------------------------------------------------


def test_a_block_that_does_nothing_changes_nothing() -> None:
    model, _ = make()
    with sw.watch(model) as watch:
        nnx.view(model, deterministic=True, use_running_average=True)(X)
    assert paths(watch.changed) == {"variables": ["hits"]}
    with sw.watch(model) as watch:
        pass
    assert watch.changed == {}
    assert sum(map(len, watch.unchanged.values())) == 9


def test_a_step_under_nnx_jit_changes_what_it_writes() -> None:
    model, optimizer = make()
    with sw.watch((model, optimizer)) as watch:
        nnx.jit(train)(model, optimizer, X, Y)
    changed = paths(watch.changed)
    assert list(changed) == ["params", "stats", "rng", "optimizer", "variables"]
    assert {"0/dense/kernel", "0/norm/bias"} <= set(changed["params"])
    assert changed["stats"] == ["0/norm/mean", "0/norm/var"]
    assert changed["rng"] == ["0/drop/rngs/count"]
    assert "1/step" in changed["optimizer"]
    assert changed["variables"] == ["0/hits"]
    assert "0/drop/rngs/key" in paths(watch.unchanged)["rng"]


def test_what_changed_is_what_numpy_finds_changed() -> None:
    model, optimizer = make()

    def arrays() -> dict[str, bytes]:
        state = nnx.to_flat_state(nnx.state(nnx.clone((model, optimizer))))
        raw = [(path, raw_value(leaf)) for path, leaf in state]
        keys = jax.dtypes.prng_key
        return {
            sw.format_path(path): np.asarray(
                jax.random.key_data(value) if jnp.issubdtype(value.dtype, keys) else value
            ).tobytes()
            for path, value in raw
        }

    before = arrays()
    with sw.watch([model, optimizer]) as watch:
        nnx.jit(train)(model, optimizer, X, Y)
    after = arrays()
    assert hows(watch) == {path: "same" if before[path] == after[path] else "value" for path in before}


def test_the_dropped_update_of_a_plain_jit_is_found() -> None:
    model, optimizer = make()
    dropped = jax.jit(train)
    with sw.watch(model) as watch:
        dropped(model, optimizer, X, Y)
    assert watch.changed == {}
    hint = (
        "nnx.jit, or sw.train_step: what a function writes to a model under jax.jit is dropped\n"
        "or, watch.compare(model) at the end of the block, if the code returns a new model"
    )
    with (
        refused(
            sw.WatchError,
            "Nothing of params and stats changed, although that was expected.",
            leaves=[
                "dense/bias: Param(2,) float32  kind=params  (did not change)",
                "dense/kernel: Param(3, 2) float32  kind=params  (did not change)",
                "norm/bias: Param(2,) float32  kind=params  (did not change)",
                "norm/scale: Param(2,) float32  kind=params  (did not change)",
                "norm/mean: BatchStat(2,) float32  kind=stats  (did not change)",
                "norm/var: BatchStat(2,) float32  kind=stats  (did not change)",
            ],
            hint=hint,
        ),
        sw.watch(model, expect=("params", "stats")) as watch,
    ):
        dropped(model, optimizer, X, Y)
    # The report is there for all that.
    assert list(watch.missed) == ["params", "stats"]
    with sw.watch(model, expect="params"):
        nnx.jit(train)(model, optimizer, X, Y)


def test_one_missed_kind_is_named_by_the_error() -> None:
    model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
    with pytest.raises(sw.WatchError) as caught, sw.watch(model, expect="params"):
        pass
    assert caught.value.kind == "params"


def test_a_leaf_that_does_not_move_with_its_kind_is_missed_but_no_error() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with sw.watch(model, expect="params") as watch:
        model.kernel[...] += 1
    assert paths(watch.missed) == {"params": ["bias"]}


def test_a_changed_frozen_base_is_found() -> None:
    model = nnx.LoRA(3, 1, 2, base_module=nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)  # LoRAParam is a subclass: the base trains too

    @nnx.jit
    def step(model: nnx.LoRA, optimizer: nnx.Optimizer[nnx.LoRA]) -> None:
        optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean())(model))

    with sw.watch(model, FROZEN) as watch:
        step(model, optimizer)
    assert [sw.format_path(change.path) for change in watch.violations] == ["base_module/bias", "base_module/kernel"]
    with (
        refused(
            sw.WatchError,
            "Base changed, although frozen.",
            leaves=[
                "base_module/bias: Param(2,) float32  kind=base  (frozen, but changed)",
                "base_module/kernel: Param(3, 2) float32  kind=base  (frozen, but changed)",
            ],
            kind="base",
            hint="nnx.Optimizer(model, tx, wrt=filter) with a filter that leaves them out",
        ),
        sw.watch(model, FROZEN, expect="lora"),
    ):
        step(model, optimizer)
    right = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def right_step(model: nnx.LoRA, optimizer: nnx.Optimizer[nnx.LoRA]) -> None:
        diff = nnx.DiffState(0, nnx.LoRAParam)
        optimizer.update(model, nnx.grad(lambda model: (model(X) ** 2).mean(), argnums=diff)(model))

    with sw.watch(model, FROZEN, expect="lora") as watch:
        right_step(model, right)
    assert watch.violations == ()


def test_an_empty_expectation_asks_for_what_is_frozen_alone() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, frozen=True))
    with sw.watch(model, kinds, expect=()):
        pass
    with pytest.raises(sw.WatchError, match="Params changed, although frozen"), sw.watch(model, kinds, expect=()):
        model.bias[...] += 1
    with sw.watch(model, kinds) as watch:
        model.bias[...] += 1
    assert len(watch.violations) == 1
    with pytest.raises(sw.WatchError):
        watch.check()


def test_a_single_flipped_bit_is_found() -> None:
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    bits = np.array(model.kernel[...])
    with sw.watch(model) as watch:
        bits.view(np.uint32)[17, 5] ^= 1
        model.kernel[...] = jnp.asarray(bits)
    assert hows(watch) == {"bias": "same", "kernel": "value"}


def test_ten_thousand_leaves_are_watched() -> None:
    model = nnx.List([nnx.Param(np.full(3, number, np.float32)) for number in range(10_000)])
    with sw.watch(model) as watch:
        model[1234][...] = model[1234][...] + 1
    assert paths(watch.changed) == {"params": ["1234"]}
    assert len(watch.leaves) == 10_000


# --- what became of leaves ---------------------------------------------------------------------------------------


def test_leaves_added_removed_retyped_reshaped_and_recast_are_told_apart() -> None:
    model: Any = nnx.Dict(
        # A reference keeps its shape and dtype.
        {name: nnx.Param(jnp.ones((2, 3)), ref=False) for name in ("cast", "kept", "lost", "shape", "type")}
    )
    with sw.watch(model) as watch:
        model.cast.set_value(model.cast[...].astype(jnp.bfloat16))
        del model.lost
        model.shape.set_value(jnp.ones((3, 2)))
        model.type = nnx.BatchStat(jnp.ones((2, 3)))
        model.new = nnx.Cache(jnp.zeros(2))
    assert {sw.format_path(change.path): change.describe() for change in watch.leaves} == {
        "cast": "dtype: float32 to bfloat16",
        "kept": "same",
        "lost": "missing",
        "new": "unexpected",
        "shape": "shape: (2, 3) to (3, 2)",
        "type": "type: Param to BatchStat",
    }
    # Of a leaf that was there before it is the kind that it had.
    assert paths(watch.changed) == {"params": ["cast", "lost", "shape", "type"], "cache": ["new"]}


def test_another_structure_of_a_value_is_another_shape() -> None:
    model = nnx.Dict(pair=nnx.Variable((jnp.ones(2), jnp.ones(3))), name=nnx.Variable(jnp.ones(())))
    with sw.watch(model) as watch:
        model.pair.set_value((jnp.ones(2), jnp.zeros(3)))
        model.name.set_value((jnp.ones(()),))
    assert hows(watch) == {"name": "structure", "pair": "value"}


def test_a_tie_that_came_apart_is_found() -> None:
    model = Tied()
    with sw.watch(model) as watch:
        model.head.kernel = nnx.Param(jnp.copy(model.embed.embedding[...]))
    assert {sw.format_path(change.path): change.describe() for change in watch.leaves} == {
        "embed/embedding": "same",
        "head/kernel": "ties: tied to embed/embedding, then to nothing",
    }
    assert {kind: [row.path for row in rows] for kind, rows in watch.ties.items()} == {"params": [("head", "kernel")]}


def test_a_new_tie_is_found() -> None:
    model = Tied()
    model.head.kernel = nnx.Param(jnp.copy(model.embed.embedding[...]))
    with sw.watch(model) as watch:
        model.head.kernel = model.embed.embedding
    assert {sw.format_path(change.path): change.describe() for change in watch.leaves} == {
        "embed/embedding": "same",
        "head/kernel": "ties: tied to nothing, then to embed/embedding",
    }


def three() -> nnx.Dict:
    """Two parameters, one of them under two names."""
    model = nnx.Dict(a=nnx.Param(jnp.ones(2)), c=nnx.Param(jnp.zeros(2)))
    model.z = model.a
    return model


def retie(model: nnx.Dict) -> None:
    model.z = model.c


def untie(model: nnx.Dict) -> None:
    del model.z


def tie(model: nnx.Dict) -> None:
    model.y = model.c


@pytest.mark.parametrize(
    ("change", "path", "told"),
    [
        (retie, "z", "ties: tied to a, then to c"),
        (untie, "z", "missing: tied to a"),
        (tie, "y", "ties: tied to nothing, then to c"),
    ],
)
def test_a_further_path_of_a_tied_leaf_that_is_new_gone_or_leads_elsewhere_is_found(
    change: Callable[[nnx.Dict], None], path: str, told: str
) -> None:
    model = three()
    with sw.watch(model) as watch:
        change(model)
    assert {sw.format_path(row.path): row.describe() for row in watch.leaves} == {"a": "same", "c": "same", path: told}


def test_a_tied_leaf_that_is_gone_as_a_whole_is_told_of_once() -> None:
    model = three()
    with sw.watch(model) as watch:
        del model.a, model.z
    assert hows(watch) == {"a": "missing", "c": "same"}


def test_a_model_that_stays_tied_is_the_same() -> None:
    model = three()
    with sw.watch(model) as watch:
        model.z = model.a
    assert watch.changed == {}


def test_a_modules_plain_attributes_are_compared() -> None:
    model, _ = make()
    with sw.watch(model) as watch:
        model.eval()
    assert watch.changed == {}
    assert watch.static == {"drop/deterministic": (False, True), "norm/use_running_average": (False, True)}


def test_donated_arrays_are_no_problem_where_others_take_their_place() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    move = jax.jit(lambda kernel: kernel + 1, donate_argnums=0)
    with sw.watch(model) as watch:
        model.kernel.set_value(move(model.kernel.get_value()))
    assert hows(watch) == {"bias": "same", "kernel": "value"}


def test_an_array_that_was_donated_and_not_replaced_is_gone() -> None:
    with nnx.var_defaults(ref=False):  # reading a reference gives a copy
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    with sw.watch(model) as watch:
        model.kernel.get_value().delete()
    assert hows(watch) == {"bias": "same", "kernel": "donated"}


def test_a_kind_of_which_all_is_gone_did_not_get_the_values_expected() -> None:
    """A plain jax.jit that donates, so that the update is dropped and the model is lost."""
    # A reference is written, or not passed to jax.jit; flax 0.12.8 does not donate hijax Variables.
    with nnx.var_defaults(hijax=False, ref=False):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    gone = "donated: nothing in its place"
    with (
        refused(
            sw.WatchError,
            "Nothing of params got new values, although that was expected.",
            leaves=[
                f"bias: Param(2,) float32  kind=params  ({gone})",
                f"kernel: Param(3, 2) float32  kind=params  ({gone})",
            ],
            kind="params",
            hint="nnx.jit, or sw.train_step: what a function writes to a model under jax.jit is dropped\n"
            "or, watch.compare(model) at the end of the block, if the code returns a new model",
        ),
        sw.watch(model, expect="params") as watch,
    ):
        jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)(nnx.state(model))
    assert "expected to change, nothing got new values" in str(watch)


def test_arrays_of_numpy_and_numbers_are_what_they_become_in_jax() -> None:
    model: Any = nnx.Dict(wide=nnx.Param(np.ones(3)), count=nnx.Variable(7))
    with sw.watch(model) as watch:
        nnx.jit(lambda model: model.count.set_value(model.count.get_value() + 0))(model)
    assert isinstance(model.wide.get_value(), jax.Array)
    assert hows(watch) == {"count": "same", "wide": "same"}
    with sw.watch({"huge": nnx.Variable(1e300, ref=False)}) as watch:  # no number of 32 bits, and no reason to warn
        pass
    assert watch.changed == {}


def test_keys_numbers_and_text_are_compared_too() -> None:
    model: Any = nnx.Dict(
        key=nnx.RngKey(jax.random.key(0)), number=nnx.Variable(1.5), text=nnx.Variable("a"), none=nnx.Variable(None)
    )
    with sw.watch(model) as watch:
        pass
    assert watch.changed == {}
    with sw.watch(model) as watch:
        model.key.set_value(jax.random.key(1))
        model.number.set_value(2.5)
        model.text.set_value("b")
    assert hows(watch) == {"key": "value", "none": "same", "number": "value", "text": "value"}
