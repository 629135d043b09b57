"""Casting would lose numbers: one check at every door where a value changes its dtype, and NumPy is the judge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import statewise as sw
from refusals import refused
from statewise._src.common import narrowing

LOST = "Casting would lose numbers: 1 leaf has some that the new dtype cannot represent. Nothing was changed."
FLOATS = ("float64", "float32", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")


def model_of(**values: Any) -> nnx.Dict[Any]:
    # A reference would hold JAX's array, of JAX's dtype.
    return nnx.Dict(**{name: nnx.Param(value, ref=False) for name, value in values.items()})


def state_of(**values: Any) -> sw.State:
    model = model_of(**values)
    return sw.plan(model).take(model)


def judged(array: np.ndarray, dtype: Any) -> np.ndarray | None:
    """What NumPy makes of it; None where that is another number than rounding makes."""
    with np.errstate(all="ignore"):
        made = array.astype(dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        return made if all(int(one) == int(other) for one, other in zip(array.flat, made.flat, strict=True)) else None
    wide, back = array.astype(np.float64), made.astype(np.float64)
    same = (np.isfinite(wide) == np.isfinite(back)) & (np.isnan(wide) == np.isnan(back))
    return made if same.all() else None


@st.composite
def casts(draw: st.DrawFn) -> tuple[np.ndarray, Any]:
    """An array, zero-size and scalar ones too, and another dtype of its family."""
    names = draw(st.sampled_from([FLOATS, INTEGERS]))
    theirs, ours = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    shape = draw(st.sampled_from([(), (0,), (3,), (2, 2)]))
    if names is INTEGERS:
        return draw(npst.arrays(theirs, shape)), jnp.dtype(ours)
    edges = [0.0, 1.5, 65519.0, 65520.0, 3.3961e38, 3.4028235e38, 1e39, 1e300, 1e-300, np.inf, -np.inf, np.nan, -7e4]
    values = st.one_of(st.sampled_from(edges), st.floats())
    with np.errstate(all="ignore"):
        return draw(npst.arrays(np.float64, shape, elements=values)).astype(jnp.dtype(theirs)), jnp.dtype(ours)


def check(array: np.ndarray, dtype: Any, door: Callable[[], Any]) -> None:
    """The door gives back the values, rounded, or refuses."""
    expected = judged(array, dtype)
    if expected is None:
        with pytest.raises(sw.StatewiseError, match="Casting would lose numbers") as caught:
            door()
        assert [sw.format_path(leaf.path) for leaf in caught.value.leaves] == ["a"]
        return
    got = door()
    assert got.dtype == dtype
    assert np.array_equal(np.asarray(got, np.float64), np.asarray(expected, np.float64), equal_nan=True)


@given(casts())
def test_the_check_is_numpys_on_the_host_and_on_the_device(cast: tuple[np.ndarray, Any]) -> None:
    array, dtype = cast
    leaf = sw.plan(model_of(a=1.0)).leaves[0]
    with jax.enable_x64(True):
        for given_ in (array, jnp.asarray(array)):
            found = narrowing.Casts()
            found.add(leaf, given_, dtype)
            assert bool(found.lost()) == (judged(array, dtype) is None)


@given(casts())
def test_a_convert_gives_the_values_or_refuses(cast: tuple[np.ndarray, Any]) -> None:
    array, dtype = cast
    if dtype.itemsize == 8:
        return  # this process has no target of it
    target = state_of(a=jnp.zeros(array.shape, dtype))
    check(array, dtype, lambda: sw.convert({"a": array}, None, to="orbax", target=target, cast=True).tree["a"])


@given(casts())
def test_a_transfer_gives_the_values_or_refuses(cast: tuple[np.ndarray, Any]) -> None:
    array, dtype = cast
    with jax.enable_x64(True):
        src, target = state_of(a=jnp.asarray(array)), state_of(a=jnp.zeros(array.shape, dtype))
        check(array, dtype, lambda: sw.transfer(src, target, cast=True)["params"]["a"])
        assert np.array_equal(target["params"]["a"], np.zeros(array.shape))


@given(casts())
def test_a_taken_numpy_array_gives_its_values_or_is_refused(cast: tuple[np.ndarray, Any]) -> None:
    array, _ = cast
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    model = model_of(a=array)
    check(array, dtype, lambda: sw.plan(model).take(model)["params"]["a"])
    state = state_of(a=jnp.zeros(array.shape, dtype))
    check(array, dtype, lambda: state.replace(params={"a": array})["params"]["a"])


@given(casts())
def test_a_cast_of_a_state_gives_the_values_or_refuses(cast: tuple[np.ndarray, Any]) -> None:
    array, dtype = cast
    if not jnp.issubdtype(dtype, jnp.floating):
        return
    with jax.enable_x64(True):
        state = state_of(a=jnp.asarray(array))
        check(array, dtype, lambda: state.cast(params=dtype)["params"]["a"])


@pytest.mark.parametrize("layout", ["named", "packed"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(5 * 10**12, "int64"), (-(2**31) - 1, "int64"), (2**32, "uint64"), (1e300, "float64"), (3.5e38, "float64")],
)
def test_what_a_64_bit_process_wrote_is_not_narrowed(tmp_path: Path, value: Any, dtype: str, layout: Any) -> None:
    with jax.enable_x64(True):
        sw.save(tmp_path / "run", state_of(a=jnp.array([1, value], dtype), b=jnp.ones(2)), layout=layout)
    narrow = str(jax.dtypes.canonicalize_dtype(dtype))
    target = state_of(a=jnp.zeros(2, narrow), b=jnp.zeros(2))
    with refused(
        sw.RestoreError,
        LOST,
        leaves=[
            f"a: Param(2,) {narrow}  kind=params  "
            f"({dtype} numbers, one of magnitude {abs(float(value)):.3g}, that {narrow} cannot represent)"
        ],
        kind="params",
        hint=f"plan the model with the dtype that was saved\n{narrowing.WIDE}",
    ):
        sw.restore(tmp_path / "run", target, cast=True)
    assert not target["params"]["b"].any()
    with jax.enable_x64(True):  # what the hint says
        wide = state_of(a=jnp.zeros(2, dtype), b=jnp.zeros(2))
        assert sw.restore(tmp_path / "run", wide)[0]["params"]["a"][1] == value


def test_what_fits_is_restored_where_the_target_lies(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        sw.save(tmp_path / "run", state_of(a=jnp.array([7] * 8), b=jnp.array([0.1] * 8)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))
    plan = kinds.plan(model_of(a=jnp.zeros(8, int), b=jnp.zeros(8)))
    state, report = sw.restore(tmp_path / "run", plan.abstract(mesh), cast=True)
    assert report.counts == {"params": {"cast": 2}}
    assert state["params"]["a"].tolist() == [7] * 8
    assert state["params"]["b"].tolist() == [np.float32(0.1)] * 8
    assert state["params"]["a"].sharding == plan.shardings(mesh)["params"]["a"]


def test_a_restore_of_floats_says_which_dtype_holds_them(tmp_path: Path) -> None:
    sw.save(tmp_path / "run", state_of(a=jnp.array([1e6, 1.0])))
    target = state_of(a=jnp.zeros(2, "float16"))
    with pytest.raises(sw.RestoreError) as caught:
        sw.restore(tmp_path / "run", target, cast=True)
    assert caught.value.hint == "sw.restore(path, target.cast(params='bfloat16'), cast=True)"
    state, _ = sw.restore(tmp_path / "run", target.cast(params="bfloat16"), cast=True)
    assert state["params"]["a"].tolist() == [jnp.bfloat16(1e6), 1.0]


@pytest.mark.parametrize("axis_type", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_sharded_array_is_looked_at_where_it_is(axis_type: Any) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    values = np.arange(64, dtype=np.int32).reshape(8, 8)
    placed = jax.device_put(values * 2000, jax.NamedSharding(mesh, jax.P("data")))
    found = narrowing.Casts()
    with jax.transfer_guard_device_to_host("disallow_explicit"):
        found.add(sw.plan(model_of(a=1.0)).leaves[0], placed, jnp.dtype("int16"))
    (leaf,) = found.lost()
    assert leaf.note == "int32 numbers, one of magnitude 1.26e+05, that int16 cannot represent"


def test_a_transfer_refuses_all_leaves_at_once_and_says_what_holds_them() -> None:
    src = state_of(a=jnp.array([70000, 1]), b=jnp.array([1, 2]), c=jnp.array([-1]))
    target = state_of(a=jnp.zeros(2, "int16"), b=jnp.zeros(2, "int16"), c=jnp.zeros(1, "uint8"))
    with refused(
        sw.StructureError,
        "Casting would lose numbers: 2 leaves have some that the new dtype cannot represent. Nothing was changed.",
        leaves=[
            "a: Param(2,) int16  kind=params  (int32 numbers, one of magnitude 7e+04, that int16 cannot represent)",
            "c: Param(1,) uint8  kind=params  (int32 numbers, one of magnitude 1, that uint8 cannot represent)",
        ],
        kind="params",
        hint=f"build the target's model with the dtype of the source\n{narrowing.WIDE}",
    ):
        sw.transfer(src, target, cast=True)


def test_the_dtype_that_a_cast_names_instead_holds_the_numbers() -> None:
    state = state_of(a=jnp.array([1e30, 1.0]), b=jnp.ones(2))
    with pytest.raises(sw.StructureError) as caught:
        state.cast(params="float16")
    assert caught.value.hint == "state.cast(params='bfloat16')"
    assert [leaf.path for leaf in caught.value.leaves] == [("a",)]
    assert state.cast(params="bfloat16")["params"]["a"][0] == jnp.bfloat16(1e30)
    with pytest.raises(sw.StructureError) as caught:
        sw.transfer(state, state, cast="float16")
    assert caught.value.hint == "sw.transfer(src, target, cast='bfloat16')"
    assert sw.transfer(state, state, cast="bfloat16")["params"]["a"][0] == jnp.bfloat16(1e30)


@pytest.mark.parametrize("value", [2**40, 2**70, -(2**31) - 1, 1e300, np.int64(2**40), np.full(2, 1e39), 1e300 + 1j])
def test_numbers_of_numpy_and_python_in_a_model_are_not_narrowed(value: Any) -> None:
    model = model_of(a=value, b=jnp.ones(2))
    plan = sw.plan(model)  # which knows no values
    note = rf"of magnitude .*{plan['params'][0].dtype} cannot represent"
    for door in (plan.take, lambda *args: plan.take(*args, copy=False), lambda *args: plan.take(*args, mesh=_mesh())):
        with pytest.raises(sw.StructureError, match=note):
            door(model)


def _mesh() -> Any:
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("value", [2**40, 1e300])
def test_update_refuses_a_number_and_changes_nothing(value: Any) -> None:
    model = model_of(a=jnp.array(1 if isinstance(value, int) else 1.0), b=jnp.array([1.0]))
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        sw.update(model, {"a": value, "b": jnp.array([2.0])})
    assert model["a"][...] == 1
    assert model["b"][0] == 1


def test_a_step_that_assigns_numpys_numbers_is_refused() -> None:
    model = model_of(a=jnp.array([1, 1]))

    @sw.step(writes="params")
    def write(model: Any) -> None:
        model["a"].set_value(np.array([1, 2**40]))

    with refused(
        sw.StructureError,
        f"write assigns numbers that JAX cannot represent. {LOST}",
        leaves=[
            "a: Param(2,) int32  kind=params  (int64 numbers, one of magnitude 1.1e+12, that int32 cannot represent)"
        ],
        kind="params",
        hint=narrowing.WIDE,
    ):
        write(sw.plan(model).take(model))


@pytest.mark.parametrize("each", [False, True])
def test_a_restart_that_gives_numpys_numbers_is_refused(tmp_path: Path, each: bool) -> None:
    kind = sw.Kind(
        nnx.Cache,
        saved=False,
        restart=lambda array: np.full(array.shape, 2**40),
        placement=sw.PerDevice("data") if each else None,
    )
    model = nnx.Dict(a=nnx.Cache(jnp.array([1, 1])), w=nnx.Param(jnp.ones(1)))
    plan = sw.Kinds(cache=kind, params=sw.Kind(nnx.Param)).plan(model)
    mesh = _mesh()
    state = plan.take(model, mesh=mesh) if each else plan.take(model)
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        state.restart("cache")
    sw.save(tmp_path / "run", state)
    with pytest.raises(sw.RestoreError, match="Casting would lose numbers"):
        sw.restore(tmp_path / "run", plan.abstract(mesh) if each else plan.abstract())


def test_a_fold_that_gives_numpys_numbers_is_refused() -> None:
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.PerDevice("data")))
    model = model_of(a=jnp.array([1, 1]))
    state = kinds.plan(model).take(model, mesh=_mesh())
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        state.reduce_devices("params", how=lambda array: np.array([1, 2**40]))


@pytest.mark.parametrize("pack", [False, True])
def test_averages_of_another_dtype_are_checked(tmp_path: Path, pack: bool) -> None:
    model = model_of(**{name: jnp.full(2, 1e30) for name in "abcdef"})
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)}, averages={"params": sw.EMA(0.9, dtype="float16")})
    with pytest.raises(sw.StructureError, match="Casting would lose numbers: 6 leaves") as caught:
        plan.take(model, pack=pack)
    assert caught.value.leaves[0].path == ("ema", "params", "a")
    small = model_of(**{name: jnp.ones(2) for name in "abcdef"})
    state = plan.take(small, pack=pack)
    large = state.replace(params=jax.tree.map(lambda array: array * 1e30, state["params"]))
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        large.restart("ema")
    sw.save(tmp_path / "run", large)
    with pytest.raises(sw.RestoreError, match="Casting would lose numbers"):
        sw.restore(tmp_path / "run", state, only="params")
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        sw.transfer(large, state, kinds="params")


def test_using_checks_what_the_values_cannot_hold() -> None:
    model = model_of(a=jnp.ones(2, "float16"))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)}, averages={"params": sw.EMA(0.9)})
    state = plan.take(model)
    state = state.replace(ema=jax.tree.map(lambda array: array * 1e6, state["ema"]))
    with pytest.raises(sw.StructureError, match=r"one of magnitude 1e\+06, that float16 cannot represent"):
        state.with_averages("ema")


def test_put_and_build_refuse_what_somebody_mapped_to_numpy_of_64_bits() -> None:
    with jax.enable_x64(True):
        model = model_of(a=jnp.array([2**40]))
        plan = sw.plan(model)
        state = jax.tree.map(np.asarray, plan.take(model))
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        plan.put(state, model)
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        plan.build(state)
    assert model["a"].get_raw_value().dtype == "int64"


def test_scan_layers_refuses_numpys_numbers() -> None:
    layers = nnx.Dict(scale=nnx.Param(np.array([1, 2**40]), ref=False))
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):
        sw.scan_layers(lambda layer, x: x * layer["scale"][...], layers, jnp.array(1))


def test_a_difference_sees_what_a_state_would_not_hold() -> None:
    narrow = int(np.int64(5 * 10**12).astype(np.int32))
    assert sw.diff(model_of(a=np.array([5 * 10**12])), model_of(a=jnp.array([narrow]))).value


def test_integers_and_floats_do_not_become_each_other(tmp_path: Path) -> None:
    src, target = state_of(a=jnp.array([70000001])), state_of(a=jnp.zeros(1))
    with pytest.raises(sw.StructureError, match="which does not become float32"):
        sw.transfer(src, target, cast=True)
    sw.save(tmp_path / "run", src)
    with pytest.raises(sw.RestoreError, match="which does not become float32"):
        sw.restore(tmp_path / "run", target, cast=True)
    found = narrowing.Casts()  # and where one day they do, only integers that are held exactly
    found.add(src.plan.leaves[0], src["params"]["a"], jnp.dtype("float32"))
    assert "magnitude 7e+07" in found.lost()[0].note


@pytest.mark.parametrize("dtype", ["int4", "uint4", "float8_e4m3fn", "float8_e5m2"])
def test_small_dtypes_are_checked_both_ways(dtype: str) -> None:
    large = state_of(a=jnp.array([1e6]) if dtype.startswith("f") else jnp.array([99]))
    small = state_of(a=jnp.ones(1, dtype))
    with pytest.raises(sw.StructureError, match=f"that {dtype} cannot represent"):
        sw.transfer(large, small, cast=True)
    assert sw.transfer(small, large, cast=True)["params"]["a"] == 1


def test_complex_numbers_are_checked_in_both_parts() -> None:
    with jax.enable_x64(True):
        src = state_of(a=jnp.array([1 + 1e300j]))
        with pytest.raises(sw.StructureError, match=r"one of magnitude 1e\+300, that complex64 cannot represent"):
            sw.transfer(src, state_of(a=jnp.zeros(1, "complex64")), cast=True)


def test_where_values_are_traced_a_cast_goes_through() -> None:
    state = state_of(a=jnp.array([1e30]))
    assert jax.jit(lambda state: state.cast(params="float16"))(state)["params"]["a"][0] == jnp.inf
    with pytest.raises(sw.StructureError, match="Casting would lose numbers"):  # a value all the same
        jax.jit(lambda: state.cast(params="float16")["params"]["a"])()


def test_where_no_dtype_changes_nothing_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"params": optax.sgd(0.1)}, averages={"params": sw.EMA(0.9)})

    def never(*_: Any) -> Any:
        raise AssertionError("a reduction runs")

    monkeypatch.setattr(narrowing, "_worst_of", never)
    state = plan.take(model)
    sw.save(tmp_path / "run", state)
    sw.restore(tmp_path / "run", plan.abstract())
    sw.restore(tmp_path / "run", state, cast=True)
    sw.transfer(state, state, cast=True)
    state.cast(params="float32")
    monkeypatch.setattr(narrowing, "_worst_of", lambda *_: -1.0)
    half = state.cast(params="bfloat16")
    monkeypatch.setattr(narrowing, "_worst_of", never)
    sw.transfer(half, state, kinds="params", cast=True)  # to more bits
    plan.put(state.replace(params=state["params"]), model)
    state.with_averages("ema").restart("ema")
