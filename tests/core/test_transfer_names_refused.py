"""Names that do not fit two models: all that is wrong in one error, before an array moves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import statewise as sw
from refusals import refused


def model(**shapes: Any) -> nnx.Module:
    """A model with these parameters: a shape, or a list of shapes."""
    ones = lambda shape: nnx.Param(jnp.ones(shape))  # noqa: E731
    parts = {
        name: nnx.List([nnx.Dict(w=ones(each)) for each in shape]) if isinstance(shape, list) else ones(shape)
        for name, shape in shapes.items()
    }
    return nnx.Dict(**parts)


def taken(*objects: Any, **shapes: Any) -> sw.State:
    made = objects or (model(**shapes),)
    return sw.plan(*made).take(*made)


def fit(number: int) -> str:
    return f"The source does not fit the target: {number} lea{'f differs' if number == 1 else 'ves differ'}."


W = sw.Names({"w": "l/{i}/w"})


def test_all_that_is_wrong_is_one_error_and_nothing_moves() -> None:
    names = sw.Names(
        {
            "w": sw.Name("l/{i}/w", "layer o i -> layer i o"),
            "a": "b",
            "c": sw.Name("c/{i}/w", "l (n h) -> l n h", h=4),
            "typo": "d",
        }
    )
    src = taken(w=(3, 2, 5), a=(2,), c=(2, 3, 4), e=(1,))
    target = taken(l=[(5, 2), (2, 5)], b=(3,), c=[(12,), (12,)], d=(2,), e=(2,))
    before = [np.asarray(leaf).copy() for leaf in jax.tree.leaves(target)]
    param = "Param{} float32  kind=params  ({})"
    with refused(
        sw.errors.StructureError,
        fit(5),
        leaves=[
            "b: " + param.format("(3,)", "is (2,) in the source"),
            "w: " + param.format("(3, 2, 5)", "would be l/2/w, which the target lacks"),
            "l/1/w: " + param.format("(2, 5)", "is (5, 2) in the source"),
            "d: " + param.format("(2,)", "is in the row 'typo', which is about no leaf of the source"),
            "e: " + param.format("(2,)", "is (1,) in the source"),
        ],
        kind="params",
        hint="the models differ: plan the target's model as the source's was made\n"
        "another name in the row 'w', or a target that has this leaf\nits path there",
    ):
        sw.transfer(src, target, names=names)
    assert all(map(np.array_equal, jax.tree.leaves(target), before))


def test_backwards_all_that_is_wrong_is_one_error() -> None:
    names = sw.Names({"w": sw.Name("l/{i}/w", "layer o i -> layer i o"), "a": "b", "typo": "d"})
    target = taken(w=(3, 2, 5), a=(2,))
    src = taken(l=[(5, 2), (5, 3)], b=(3,), d=(1,))
    with refused(
        sw.errors.StructureError,
        fit(3),
        leaves=[
            "a: Param(2,) float32  kind=params  (b is (3,) in the source)",
            "w: Param(3, 2, 5) float32  kind=params  (the source has no l/2/w)",
            "d: Param(1,) float32  kind=params  (is in the row 'typo', which is about no leaf of the target)",
        ],
        kind="params",
        hint="the models differ: plan the target's model as the source's was made\n"
        "another name in the row 'w', or a source that has this leaf\nits path there",
    ):
        sw.transfer(src, target, names=names)


def test_a_pattern_that_does_not_fit() -> None:
    with pytest.raises(sw.errors.StructureError) as caught:
        sw.transfer(taken(w=(3, 5)), taken(v=(15,)), names=sw.Names({"w": sw.Name("v", "(n h) -> n h", h=4)}))
    notes = [leaf.note for leaf in caught.value.leaves]
    assert notes[0] == "has an axis of 5, which is not h=4 as '(n h) -> n h' has it"
    names = sw.Names({"w": sw.Name(["a", "b"], join=0, sizes=(1, 1))})
    with pytest.raises(sw.errors.StructureError) as caught:
        sw.transfer(taken(w=(3, 5)), taken(a=(1, 5), b=(2, 5)), names=names)
    assert caught.value.leaves[0].note == "has an axis of 3 there, and sizes=(1, 1) add up to 2"


def test_one_leaf_with_two_sources() -> None:
    names = sw.Names({"a": "c", "b": "c"})
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["c: Param(2,) float32  kind=params  (would be a of the source, and b)"],
        kind="params",
        hint="names in which each leaf of the target has one source",
    ):
        sw.transfer(taken(a=(2,), b=(2,)), taken(c=(2,)), names=names)
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["b: Param(2,) float32  kind=params  (would be c of the source, which is also a)"],
        kind="params",
        hint="names that differ; or tie the leaves in the model",
    ):
        sw.transfer(taken(c=(2,)), taken(a=(2,), b=(2,)), names=names)
    names = sw.Names({"l/{i}/w": "x/{i}", "l/0/{j}": "y/{j}"})
    with pytest.raises(sw.errors.StructureError) as caught:
        sw.transfer(taken(l=[(2,)]), taken(w=(2,)), names=names)
    assert caught.value.leaves[0].note == "is in several rows: 'l/{i}/w', 'l/0/{j}'"


def test_tied_leaves_that_would_come_apart() -> None:
    shared = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    tied = nnx.Dict(l=nnx.List([shared, shared]))
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["l/0/w: Param(2,) float32  kind=params  (would be two parts of w in the source)"],
        kind="params",
        hint="untie the leaves of the target",
    ):
        sw.transfer(taken(w=(2, 2)), taken(tied), names=W)
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["l/0/w: Param(2,) float32  kind=params  (tied here, apart in the source as a/0 and a/1)"],
        kind="params",
        hint="tie them in the target as they are in the source: assign the same nnx.Variable, or two",
    ):
        sw.transfer(taken(**{"a/0": (2,), "a/1": (2,)}), taken(tied), names=sw.Names({"l/{i}/w": "a/{i}"}))


def test_a_leaf_that_the_source_lacks_needs_a_state() -> None:
    names = sw.Names({"w": "l/{i}/w", "a": None})
    src, target = taken(l=[(2,)]), taken(w=(1, 2), a=(3,))
    note = "the source does not have it, as the names say, and a plan has no values"
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=[f"a: Param(3,) float32  kind=params  ({note})"],
        kind="params",
        hint="sw.transfer(src, plan.take(model), names=names)",
    ):
        sw.transfer(src, target.plan, names=names)
    sw.transfer(src, target, names=names)  # the hint


def test_ensembles_and_values_per_device() -> None:
    one, listed = model(w=(2, 3)), model(l=[(3,), (3,)])
    plan = sw.plan(one)
    ensemble = plan.stacked(2).stack([plan.take(one)] * 2)
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["w: Param(2, 2, 3) float32  kind=params  (is of an ensemble, which names do not describe)"],
        kind="params",
        hint="one = ensemble.member(0)  # a state of one member",
    ):
        sw.transfer(ensemble, taken(listed), names=W)
    sw.transfer(ensemble.member(0), taken(listed), names=W)  # the hint
    kinds = sw.Kinds(params=sw.Kind(nnx.Param, placement=sw.PerDevice("data")))
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    src = kinds.plan(one).take(one, mesh=mesh)
    with pytest.raises(sw.errors.StructureError, match="has a value for each of 2 devices in the source") as caught:
        sw.transfer(src, taken(listed), names=W)
    assert caught.value.hint == "sw.transfer(src.reduce_devices('params', how='mean'), ...)  # or how='first'"
    sw.transfer(src.reduce_devices("params", how="mean"), taken(listed), names=W)  # the hint


def test_a_path_within_two_objects() -> None:
    src = taken(w=(2, 3))
    policy, reference = model(l=[(3,), (3,)]), model(l=[(3,), (3,)])
    plan = sw.plan(policy=policy, reference=reference)
    target = plan.take(policy=policy, reference=reference)
    with pytest.raises(sw.errors.StructureError, match="would be l/0/w and 1 more, which the target lacks"):
        sw.transfer(src, target, names=W)
    names = sw.Names({"w": "policy/l/{i}/w"})
    with pytest.raises(sw.errors.StructureError) as caught:
        sw.transfer(src, target, names=names)
    assert [str(leaf).split(":")[0] for leaf in caught.value.leaves] == ["reference/l/0/w", "reference/l/1/w"]


def test_dtypes_as_in_every_transfer() -> None:
    src, target = taken(w=(2, 3)), taken(l=[(3,), (3,)]).cast(params="float16")
    with pytest.raises(sw.errors.StructureError, match="is float32 in the source") as caught:
        sw.transfer(src, target, names=W)
    assert caught.value.hint == "sw.transfer(src, target, cast=True)  # or a dtype"
    sw.transfer(src, target, names=W, cast=True)  # the hint
    large = jax.tree.map(lambda array: array * 1e6, src)
    with pytest.raises(sw.errors.StructureError, match="that float16 cannot represent"):
        sw.transfer(large, target, names=W, cast=True)


def test_donated_and_abstract_sources_and_what_are_no_names() -> None:
    src, target = taken(w=(2, 3)), taken(l=[(3,), (3,)])
    with refused(
        sw.errors.StructureError,
        "names is dict, and not sw.Names.",
        hint="sw.transfer(src, target, names=sw.Names({'layers/kernel': 'layers/{i}/kernel'}))",
    ):
        sw.transfer(src, target, names={"w": "l/{i}/w"})  # type: ignore[arg-type]
    with pytest.raises(sw.errors.StructureError, match="The source is abstract"):
        sw.transfer(src.plan.abstract(), target, names=W)
    jax.tree.leaves(src)[0].delete()
    with pytest.raises(sw.errors.StructureError, match="was donated"):
        sw.transfer(src, target, names=W)


def test_a_layer_of_the_source_is_not_left_out() -> None:
    stack, three, four = taken(w=(3, 2)), taken(l=[(2,)] * 3), taken(l=[(2,)] * 4)
    note = "is in the row 'w', which matches no leaf of the target for it"
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=[f"l/3/w: Param(2,) float32  kind=params  ({note})"],
        kind="params",
        hint="a target of the source's size: as many layers",
    ):
        sw.transfer(four, stack, names=W)
    assert sw.transfer(three, stack, names=W)["params"]["w"].shape == (3, 2)
    assert sw.transfer(four, taken(w=(4, 2)), names=W)["params"]["w"].shape == (4, 2)  # the hint


def test_a_leaf_whose_value_goes_elsewhere() -> None:
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["a: Param(2,) float32  kind=params  (by the names, the source's is another leaf of the target)"],
        kind="params",
        hint="a row in the names for this leaf too",
    ):
        sw.transfer(taken(a=(2,), b=(2,)), taken(a=(2,), b=(2,)), names=sw.Names({"a": "b"}))
    swapped = sw.Names({"a": "b", "b": "a"})  # the hint
    assert sw.transfer(taken(a=(2,), b=(2,)), taken(a=(2,), b=(2,)), names=swapped)["params"]["a"].shape == (2,)


def test_a_layer_of_a_kind_with_another_name_is_not_left_out() -> None:
    stack = model(w=(3, 2))
    src = sw.Kinds(weights=sw.Kind(nnx.Param)).plan(stack).take(stack)
    with refused(
        sw.errors.StructureError,
        fit(1),
        leaves=["w: Param(3, 2) float32  kind=weights  (would be l/2/w, which the target lacks)"],
        kind="weights",
        hint="another name in the row 'w', or a target that has this leaf",
    ):
        sw.transfer(src, taken(l=[(2,)] * 2), names=W)
    assert sw.transfer(src, taken(l=[(2,)] * 3), names=W)["params"]["l"][2]["w"].shape == (2,)
