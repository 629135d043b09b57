"""A tied leaf that a source has under several of its names: one value for all of them, or an error that names them."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import statewise as sw
from refusals import refused
from strategies import Node


def tied(shape: tuple[int, ...] = (2, 3), dtype: Any = jnp.float32, names: int = 2) -> sw.State:
    shared = nnx.Param(jnp.zeros(shape, dtype))
    model = Node(other=nnx.Param(jnp.zeros(2)), **{f"w{at}": shared for at in range(names)})
    return sw.plan(model).take(model)


def arrays(*values: Any, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return {"other": jnp.ones(2)} | {f"w{at}": jnp.full((2, 3), value, dtype) for at, value in enumerate(values)}


def sources(tmp_path: pathlib.Path, given: dict[str, jax.Array]) -> list[Any]:
    """The same arrays as a mapping, as a file, and as a plain Orbax checkpoint."""
    safetensors.flax.save_file(given, tmp_path / "made.safetensors")
    sw.convert(given, tmp_path / "plain", to="orbax")
    return [given, tmp_path / "made.safetensors", tmp_path / "plain"]


def test_two_values_of_one_leaf_are_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    for source in sources(tmp_path, arrays(1.0, 2.0)):
        before = sorted(tmp_path.rglob("*"))
        name = "the mapping" if isinstance(source, dict) else source
        made = tmp_path / "made"
        hint = "untie the leaves in the model before planning it, or leave one out: rename={'w1': None}"
        with refused(
            sw.RestoreError,
            f"{name} does not become {made} (statewise): 1 leaf is in the way. Nothing was read or written.",
            leaves=[
                "w0: Param(2, 3) float32  kind=params  (is tied, and has two different values in the source: w0 and w1)"
            ],
            hint=hint,
        ):
            sw.convert(source, made, target=tied())
        dry = sw.convert(source, made, target=tied(), dry_run=True)
        assert not dry.ok
        assert dry.hints == (hint,)
        assert sorted(tmp_path.rglob("*")) == before


def test_what_the_hint_leaves_out_is_left_over(tmp_path: pathlib.Path) -> None:
    for source in sources(tmp_path, arrays(1.0, 2.0)):
        conversion = sw.convert(source, None, to="linen", target=tied(), rename={"w1": None})
        assert conversion.unexpected == ("w1",)
        assert np.array_equal(conversion.tree["params"]["w0"], np.full((2, 3), 1.0))


def test_equal_values_are_one_leaf_and_nothing_is_left_over(tmp_path: pathlib.Path) -> None:
    for source in sources(tmp_path, arrays(1.0, 1.0, 1.0)):
        conversion = sw.convert(source, None, to="linen", target=tied(names=3))
        assert conversion.ok
        assert conversion.unexpected == ()
        assert [name for name, _ in conversion.matched] == ["other", "w0"]


def test_the_third_of_three_is_looked_at_too() -> None:
    conversion = sw.convert(arrays(1.0, 1.0, 2.0), None, to="linen", target=tied(names=3), dry_run=True)
    assert [leaf.note for leaf in conversion.problems] == [
        "is tied, and has two different values in the source: w0 and w2"
    ]


def test_another_shape_is_another_value() -> None:
    given = arrays(1.0) | {"w1": jnp.ones((3, 2))}
    assert not sw.convert(given, None, to="linen", target=tied(), dry_run=True).ok


def test_shapes_without_values_have_none_to_compare() -> None:
    given = jax.eval_shape(lambda: arrays(1.0, 2.0))
    assert sw.convert(given, None, to="linen", target=tied(), dry_run=True).ok


@given(
    one=st.floats(width=32),
    other=st.floats(width=32),
    dtypes=st.tuples(*[st.sampled_from(["float32", "bfloat16", "float16"])] * 2),
)
def test_a_conversion_goes_through_where_both_values_are_equal_and_only_there(
    one: float, other: float, dtypes: tuple[str, str]
) -> None:
    with np.errstate(over="ignore"):
        first, second = (
            np.full((2, 3), value, jnp.dtype(dtype)) for value, dtype in zip((one, other), dtypes, strict=True)
        )
    given = {"other": np.ones(2, np.float32), "w0": first, "w1": second}
    equal = np.array_equal(first.astype(np.float64), second.astype(np.float64))
    same = first.dtype == second.dtype and first.tobytes() == second.tobytes()  # NaN
    conversion = sw.convert(given, None, to="linen", target=tied(), dry_run=True, cast=True)
    both_nan = bool(np.isnan(first).all() and np.isnan(second).all())
    assert both_nan or conversion.ok == (equal or same)
