"""`sw.diff`: every sort of difference, between models, states, plans and checkpoints in any mixture."""

from __future__ import annotations

import itertools
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given

import statewise as sw
from checkpoint_models import ALL_SAVED, spread, trained
from comparing import plannable
from disagreeing import ONES, state_of
from refusals import refused
from statewise._src.checkpoint.diff.diff import diff
from strategies import Node, OwnStat


def lines(found: Any) -> list[str]:
    return [
        f"{sw.format_path(one.leaf.path)} [{one.leaf.kind}] {', '.join(one.what)}: {one.why}" for one in found.leaves
    ]


def values(one: Any, other: Any) -> Any:
    """The difference of two leaves that hold these values."""
    found = diff(state_of(w=nnx.Variable(one)), state_of(w=nnx.Variable(other)))
    return found["variables"][0] if found else None


# --- each sort ---------------------------------------------------------------------------------------------------


def before() -> Node:
    shared = nnx.Param(jnp.ones(2))
    return Node(
        gone=nnx.Param(jnp.ones(3)),
        kind=OwnStat(jnp.ones(2)),
        shape=nnx.Param(jnp.ones((2, 3))),
        type=nnx.Variable(jnp.ones(2)),
        dtype=nnx.Param(jnp.array([1.0, 1 / 3])),
        value=nnx.BatchStat(jnp.array([1.0, 2.0, 3.0])),
        several=nnx.Variable({"a": jnp.ones(2), "b": jnp.ones(3)}),
        structure=nnx.Variable({"a": jnp.ones(2)}),
        tie=shared,
        tied=shared,
        alike=nnx.Param(jnp.ones(2)),
        key=nnx.RngKey(jax.random.key(0), tag="default"),
        impl=nnx.RngKey(jax.random.key(0), tag="default"),
    )


def after() -> Node:
    return Node(
        kind=OwnStat(jnp.ones(2)),
        shape=nnx.Param(jnp.ones((2, 4))),
        type=nnx.Param(jnp.ones(2)),
        dtype=nnx.Param(jnp.array([1.0, 1 / 3], "bfloat16")),
        value=nnx.BatchStat(jnp.array([1.0, 2.5, 2.0])),
        several=nnx.Variable({"a": jnp.ones(1), "b": jnp.ones(3, "int32")}),
        structure=nnx.Variable({"b": jnp.ones(2)}),
        tie=nnx.Param(jnp.ones(2)),
        tied=nnx.Param(jnp.ones(2)),
        alike=nnx.Param(jnp.ones(2)),
        key=nnx.RngKey(jax.random.key(1), tag="default"),
        impl=nnx.RngKey(jax.random.key(0, impl="rbg"), tag="default"),
        new=nnx.LoRAParam(jnp.ones((1, 2), "int8")),
    )


def own_kinds() -> sw.Kinds:
    return sw.Kinds(gates=sw.Kind(OwnStat)) | sw.Kinds.standard()


EXPECTED = [
    "dtype [params] dtype, value: float32 to bfloat16; 1 of 2 elements by up to 0.000651",
    "gone [params] missing: Param(3,) float32",
    "shape [params] shape: (2, 3) to (2, 4)",
    "tie [params] ties: tied to tied, then to nothing",
    "tied [params] unexpected: Param(2,) float32; tied to tie in the other",
    "new [lora] unexpected: LoRAParam(1, 2) int8",
    "value [stats] value: 2 of 3 elements by up to 1",
    "impl [rng] dtype: key<threefry2x32> to key<rbg>",
    "key [rng] value: 1 of 1 key",
    "kind [variables] kind: variables to gates",
    "several [variables] shape, dtype: (2,) to (1,) at a; float32 to int32 at b",
    "structure [variables] structure: a value of another structure",
    "type [variables] kind, type: variables to params; Variable to Param",
]


def test_every_sort_of_difference_between_two_states() -> None:
    found = diff(sw.plan(before()).take(before()), own_kinds().plan(after()).take(after()))
    assert sorted(lines(found)) == sorted(EXPECTED)
    assert found
    assert found.same == {"params": 1}
    assert (found.not_compared, found.not_saved) == ({}, ())
    assert {kind: [one.leaf.path for one in some] for kind, some in found.unexpected.items()} == {
        "params": [("tied",)],
        "lora": [("new",)],
    }
    by_word = {
        name: sorted(one.leaf.path[0] for some in getattr(found, name).values() for one in some)
        for name in ("missing", "type", "kind", "structure", "shape", "dtype", "ties", "value")
    }
    assert by_word == {
        "missing": ["gone"],
        "type": ["type"],
        "kind": ["kind", "type"],
        "structure": ["structure"],
        "shape": ["several", "shape"],
        "dtype": ["dtype", "impl", "several"],
        "ties": ["tie"],
        "value": ["dtype", "key", "value"],
    }


def test_the_same_between_whatever_holds_them(tmp_path: pathlib.Path) -> None:
    """Models, states (packed too) and checkpoints (of both layouts) on either side."""
    kinds = sw.Kinds.standard()
    sides: list[list[Any]] = []
    for number, model in enumerate((before(), after())):
        state = kinds.plan(model).take(model)
        sw.save(tmp_path / f"named{number}", state)
        sw.save(tmp_path / f"packed{number}", state, layout="packed")
        packed = kinds.plan(model).take(model, pack=True)
        sides.append([model, state, packed, tmp_path / f"named{number}", str(tmp_path / f"packed{number}")])
    expected = sorted(line for line in EXPECTED if not line.startswith("kind "))
    for one, other in itertools.product(*sides):
        found = diff(one, other)
        assert sorted(lines(found)) == expected
        assert found.same == {"params": 1, "variables": 1}
    for same in sides:
        for one, other in itertools.product(same, same):
            found = diff(one, other)
            assert not found, str(found)
            assert found.leaves == ()


def test_the_way_back_is_the_other_way_round() -> None:
    one, other = before(), after()
    back = diff(other, one)
    assert [leaf.leaf.path for some in back.missing.values() for leaf in some] == [("tied",), ("new",)]
    assert "shape [params] shape: (2, 4) to (2, 3)" in lines(back)
    assert "tie [params] ties: tied to nothing, then to tied" in lines(back)


def test_two_classes_of_one_name_are_told_apart() -> None:
    here, there = (type("Gate", (nnx.Variable,), {"__module__": place}) for place in ("here", "there"))
    assert lines(diff(state_of(v=here(ONES)), state_of(v=there(ONES)))) == [
        "v [variables] type: here.Gate to there.Gate"
    ]


def test_a_class_of_a_script_is_the_same_run_and_imported() -> None:
    run, imported = (type("Gate", (nnx.Variable,), {"__module__": place}) for place in ("__main__", "train"))
    assert not diff(state_of(v=run(ONES)), state_of(v=imported(ONES)))


def test_optimizer_state_counts() -> None:
    model = Node(w=nnx.Param(ONES))
    trained_ = sw.plan(model, optimizers={"params": optax.sgd(0.1, momentum=0.9)}).take(model)
    stepped, _ = sw.train_step(lambda model: model.w.sum())(jax.tree.map(jnp.copy, trained_))
    assert lines(diff(trained_, stepped)) == [
        "w [params] value: 6 of 6 elements by up to 0.1",
        "optimizer/params/0/trace/w [optimizer] value: 6 of 6 elements by up to 1",
    ]
    assert lines(diff(model, trained_)) == ["optimizer/params/0/trace/w [optimizer] unexpected: Array(2, 3) float32"]


# --- values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "elements", "largest", "why"),
    [
        ([1.0, 2.0], [1.0, 1.5], 1, 0.5, "1 of 2 elements by up to 0.5"),
        ([math.inf, 1.0], [-math.inf, 1.0], 1, math.inf, "1 of 2 elements by up to inf"),
        ([True, False], [True, True], 1, 1.0, "1 of 2 elements by up to 1"),
        ([1 + 1j, 0j], [4 - 3j, 0j], 1, 5.0, "1 of 2 elements by up to 5"),
        ([2**31 - 1, 0], [-(2**31), 0], 1, 2.0**32 - 1, "1 of 2 elements by up to 4.295e+09"),
        (3.0, 4.5, 1, 1.5, "1 of 1 element by up to 1.5"),
    ],
    ids=str,
)
def test_what_changed_and_by_how_much(one: Any, other: Any, elements: int, largest: float, why: str) -> None:
    found = values(jnp.asarray(one), jnp.asarray(other))
    assert (found.what, found.elements, found.largest, found.why) == (("value",), elements, largest, why)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "int4", "uint4", "int8", "uint32", "complex64"]
)
def test_values_of_any_dtype(dtype: str) -> None:
    found = values(jnp.array([0, 1, 2], dtype), jnp.array([0, 1, 4], dtype))
    assert (found.what, found.elements, found.largest) == (("value",), 1, 2.0)
    assert values(jnp.array([0, 1, 2], dtype), jnp.array([0, 1, 2], dtype)) is None


def test_numbers_of_64_bits_are_compared_exactly(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True):
        for number in (0, 1):
            extremes = {"i": jnp.array([-(2**63), 2**60 + number]), "u": jnp.array([2**64 - 1 - number], "uint64")}
            sw.save(
                tmp_path / str(number), state_of(v=nnx.Variable(extremes), w=nnx.Param(jnp.array([1 / 3 + number])))
            )
    assert lines(diff(tmp_path / "0", tmp_path / "1")) == [
        "w [params] value: 1 of 1 element by up to 1",
        "v [variables] value: 2 of 3 elements by up to 1",
    ]


@pytest.mark.parametrize(
    "array",
    [
        [math.nan, 1.0],
        [math.inf, -math.inf],
        [complex(math.nan, 1.0), 1j],
        np.zeros((0, 3), np.float32),
        np.float32(2.0),
    ],
    ids=str,
)
def test_nan_is_as_nan_and_nothing_as_nothing(array: Any) -> None:
    assert values(jnp.asarray(array), jnp.asarray(array)) is None


def test_zero_is_zero_whatever_its_sign() -> None:
    assert values(jnp.array([0.0]), jnp.array([-0.0])) is None


def test_nan_in_one_alone_is_said() -> None:
    found = values(jnp.array([1.0, math.nan, 3.0]), jnp.array([5.0, 2.0, 3.0]))
    assert (found.elements, found.why) == (2, "2 of 3 elements, NaN in only one")
    assert math.isnan(found.largest)


@pytest.mark.parametrize(
    ("there", "more"), [("int32", ""), ("bool", "; 1 of 2 elements by up to 1"), ("complex64", "")]
)
def test_values_of_two_dtypes_are_compared_as_numbers(there: str, more: str) -> None:
    found = values(jnp.array([1.0, 2.0]), jnp.array([1, 2], there))
    assert found.why == f"float32 to {there}{more}"
    assert found.what == (("dtype", "value") if more else ("dtype",))


def test_keys_are_compared_by_their_words() -> None:
    found = values(
        jax.random.split(jax.random.key(0), 3), jax.random.split(jax.random.key(0), 3).at[1].set(jax.random.key(9))
    )
    assert (found.what, found.elements, found.largest, found.why) == (("value",), 1, None, "1 of 3 keys")
    assert values(jax.random.key(4), jax.random.key(4)) is None


def test_a_key_is_not_its_words() -> None:
    found = values(jax.random.key(0), jax.random.PRNGKey(0))
    assert found.why == "() to (2,); key<threefry2x32> to uint32"
    assert found.what == ("shape", "dtype")


def test_arrays_larger_than_a_piece() -> None:
    """The pieces of an array are compared one after the other; the first and the last element are in two of them."""
    one = np.zeros((300, 1000), np.float32)
    other = one.copy()
    other[0, 0], other[-1, -1] = 1.0, -3.0
    assert values(jnp.asarray(one), jnp.asarray(other)).why == "2 of 300,000 elements by up to 3"


# --- what has no values, and what is left out --------------------------------------------------------------------


def test_an_abstract_side_is_compared_in_shape_alone() -> None:
    state = trained()
    for one, other in itertools.permutations((state, state.plan.abstract()), 2):
        found = diff(one, other)
        assert not found
        assert (found.same, sum(found.not_compared.values())) == ({}, len(state.plan.leaves))
    assert str(diff(state_of(w=nnx.Param(ONES)).plan, nnx.eval_shape(lambda: Node(w=nnx.Param(ONES))))) == (
        "a plan and a model (Node): no leaf differs; the values of 1 were not compared\n"
        "kind    leaves  outcome\n"
        "------------------------------\n"
        "params       1  not compared 1"
    )


def test_a_leaf_that_differs_says_that_its_values_were_not_compared() -> None:
    found = diff(state_of(w=nnx.Param(ONES)), state_of(w=nnx.Param(ONES.astype("bfloat16"))).plan)
    assert lines(found) == ["w [params] dtype: float32 to bfloat16; values not compared"]


def test_a_checkpoint_misses_no_kind_that_it_was_not_meant_to_hold(tmp_path: pathlib.Path) -> None:
    state = state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES), c=nnx.Cache(ONES))
    sw.save(tmp_path / "all", state)
    sw.save(tmp_path / "params", state, only="params")
    found = diff(tmp_path / "all", state)
    assert not found
    assert (found.same, found.not_saved) == ({"params": 1, "stats": 1}, ("cache",))
    assert str(diff(state, tmp_path / "params")).splitlines()[0] == (
        f"a state and {tmp_path}/params: no leaf differs; left out: stats, cache"
    )
    assert diff(tmp_path / "params", tmp_path / "all").not_saved == ("stats",)
    assert diff(state, state_of(w=nnx.Param(ONES), s=nnx.BatchStat(ONES))).missing.keys() == {"cache"}


def test_an_ephemeral_kind_that_the_checkpoint_does_not_know_is_left_out(tmp_path: pathlib.Path) -> None:
    sw.save(tmp_path / "run", state_of(sw.Kinds(params=sw.Kind(nnx.Param)), w=nnx.Param(ONES)))
    found = diff(tmp_path / "run", state_of(w=nnx.Param(ONES), c=nnx.Cache(ONES), s=nnx.BatchStat(ONES)))
    assert found.not_saved == ("cache",)
    assert found.unexpected.keys() == {"stats"}


def test_a_saved_kind_that_is_ephemeral_now_is_compared(tmp_path: pathlib.Path) -> None:
    model = Node(w=nnx.Param(ONES), c=nnx.Cache(ONES))
    sw.save(tmp_path / "run", ALL_SAVED.plan(model).take(model))
    model.c[...] += 1
    assert lines(diff(tmp_path / "run", model)) == ["c [cache] value: 6 of 6 elements by up to 1"]


def test_an_adapter_is_compared_with_its_base(tmp_path: pathlib.Path) -> None:
    state = state_of(w=nnx.Param(ONES), a=nnx.LoRAParam(jnp.ones(2)))
    sw.save(tmp_path / "base", state)
    sw.save(tmp_path / "adapter", state, only="lora", base=tmp_path / "base")
    found = diff(tmp_path / "adapter", state)
    assert not found
    assert found.same == {"params": 1, "lora": 1}
    other = state_of(w=nnx.Param(2 * ONES), a=nnx.LoRAParam(jnp.zeros(2)))
    assert list(diff(tmp_path / "adapter", other).value) == ["params", "lora"]
    shutil.rmtree(tmp_path / "base")
    with refused(
        sw.RestoreError,
        f"{tmp_path}/adapter was saved over another checkpoint, which is not at {tmp_path}/base.",
        hint="say where it is now: sw.restore(path, target, base=...)",
    ):
        diff(tmp_path / "adapter", state)


def test_of_a_kind_that_the_adapter_has_nothing_is_the_base_s(tmp_path: pathlib.Path) -> None:
    one = {"w": nnx.Param(ONES), "a": nnx.LoRAParam(jnp.ones(2))}
    sw.save(tmp_path / "base", state_of(**one, b=nnx.LoRAParam(jnp.ones(2))))
    sw.save(tmp_path / "adapter", state_of(**one), only="lora", base=tmp_path / "base")
    assert not diff(tmp_path / "adapter", state_of(**one))
    assert list(diff(tmp_path / "base", tmp_path / "adapter").missing) == ["lora"]


# --- kinds -------------------------------------------------------------------------------------------------------


def test_a_model_is_planned_by_the_kinds_of_the_other_side() -> None:
    kinds = sw.Kinds(gates=sw.Kind(OwnStat), rest=sw.Kind(...))
    model = Node(g=OwnStat(ONES), w=nnx.Param(ONES))
    state = kinds.plan(model).take(model)
    for other in (state, state.plan):
        assert not diff(model, other)
        assert not diff(other, model)


def test_kinds_are_for_models(tmp_path: pathlib.Path) -> None:
    kinds = sw.Kinds(gates=sw.Kind(OwnStat), rest=sw.Kind(...))
    model = Node(g=OwnStat(ONES), w=nnx.Param(ONES))
    sw.save(tmp_path / "run", kinds.plan(model).take(model))
    assert diff(tmp_path / "run", model, kinds=kinds).same == {"gates": 1, "rest": 1}
    assert [one.what for one in diff(tmp_path / "run", model).leaves] == [("kind",), ("kind",)]
    message = "Only a model is planned by kinds; states and checkpoints have theirs."
    with refused(sw.DeclarationError, message, hint="sw.diff(a, b)"):
        diff(tmp_path / "run", tmp_path / "run", kinds=kinds)
    with refused(
        sw.DeclarationError, "dict is not a Kinds.", hint="sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))"
    ):
        diff(model, model, kinds={"params": nnx.Param})


# --- laws --------------------------------------------------------------------------------------------------------


@given(plannable())
def test_a_model_does_not_differ_from_its_state(model: Any) -> None:
    state = sw.plan(model).take(model)
    found = diff(model, state)
    assert not found, str(found)
    assert (sum(found.same.values()), found.not_compared) == (len(state.plan.leaves), {})


def test_where_arrays_lie_is_no_difference(devices: list[jax.Device]) -> None:
    state = trained()
    assert not diff(state, spread(state, devices))
