"""A leaf whose type Flax changed is restored; one whose type the user changed is refused.

`Scaled` stands for a layer of Flax, whose version changes with the type of its scale.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import statewise as sw
from refusals import refused
from statewise._src.common import compat

OLD, NEW = "0.0.1", "0.0.2"


class Scaled(nnx.Module):
    """A layer of a Flax that made its scale a Param."""

    made: Any = nnx.Param

    def __init__(self, scale: float = 2.0) -> None:
        self.w = nnx.Param(jnp.ones(3))
        # As in Flax's layers, the code has the types that it makes.
        _ = (nnx.Variable, nnx.Param, nnx.BatchStat)
        self.scale = self.made(jnp.full(3, scale))


Scaled.__module__ = "flax.nnx.nn.scaled"


class Holder(nnx.Module):
    """A user's model: a layer of Flax, and the same by its own subclasses."""

    def __init__(self, layer: Any) -> None:
        self.layers = nnx.List([layer])


class Unchanged(Scaled):
    """A user's subclass that leaves the scale to Flax."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * self.w[...]


class Own(Scaled):
    """A user's subclass that makes the scale itself."""

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__(scale)
        self.scale = self.made(jnp.full(3, scale))


class Mine(nnx.Module):
    """A user's own layer."""

    made: Any = nnx.Param

    def __init__(self, scale: float = 2.0) -> None:
        self.w = nnx.Param(jnp.ones(3))
        self.scale = self.made(jnp.full(3, scale))


@contextlib.contextmanager
def flax(version: str, made: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A version of Flax in which the scale is of some type."""
    versions = compat.versions()
    with monkeypatch.context() as patch:
        patch.setattr(compat, "versions", lambda: versions | {"flax": version})
        for cls in (Scaled, Mine):
            patch.setattr(cls, "made", staticmethod(made))
        yield


def array(value: jax.Array) -> jax.Array:
    return value


KINDS = sw.Kinds.standard()
TYPES = {"an array": array, "a Variable": nnx.Variable, "a Param": nnx.Param, "a BatchStat": nnx.BatchStat}


def plan_of(model: Any, **options: Any) -> sw.Plan:
    return KINDS.plan(model, optimizers={"params": optax.adam(0.1)}, **options)


@pytest.mark.parametrize("layer", [Scaled, Unchanged])
@pytest.mark.parametrize("there", TYPES)
@pytest.mark.parametrize("here", TYPES)
def test_a_type_that_flax_changed_restores(
    here: str, there: str, layer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with flax(OLD, TYPES[there], monkeypatch):
        model = Holder(layer(5.0))
        kind = next(leaf.kind for leaf in sw.plan(model).leaves if leaf.path[-1] == "scale")
        sw.save(tmp_path / "saved", plan_of(model).take(model))
    with flax(NEW, TYPES[here], monkeypatch):
        plan = plan_of(Holder(layer()))
        state, report = sw.restore(tmp_path / "saved", plan.abstract())
        built = plan.build(state)
    assert np.array_equal(nnx.as_pure(built.layers[0].scale), jnp.full(3, 5.0))
    (line,) = [each for each in report if each.leaf.path[-2:] == (0, "scale") and each.leaf.kind != "optimizer"]
    names = {"an array": "an Array", "a Variable": "a Variable", "a Param": "a Param", "a BatchStat": "a BatchStat"}
    was = f"was {names[there]}{'' if line.leaf.kind == kind else f' of kind {kind!r}'} in flax {OLD}"
    assert (line.outcome, line.why) == (("restored", "") if here == there else ("retyped", was))
    # What has moments on one side only.
    others = {each.outcome for each in report if each.leaf.kind == "optimizer" and each.leaf.path[-1] == "scale"}
    expected = {"restarted"} if here == "a Param" else {"dropped"} if there == "a Param" else set()
    assert others == ({"restored"} if here == there == "a Param" else expected)


@pytest.mark.parametrize("named", [False, True])
def test_several_objects(named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def planned(scale: float) -> tuple[sw.Plan, sw.State]:
        objects = {"z": Holder(Mine()), "a": Holder(Scaled(scale))}
        plan = sw.plan(**objects) if named else sw.plan(*objects.values())
        return plan, plan.take(**objects) if named else plan.take(*objects.values())

    with flax(OLD, array, monkeypatch):
        sw.save(tmp_path / "saved", planned(5.0)[1])
    with flax(NEW, nnx.Param, monkeypatch):
        report = sw.preview(tmp_path / "saved", planned(2.0)[0].abstract())
    outcomes = {each.leaf.path[0]: each.outcome for each in report if each.leaf.path[-1] == "scale"}
    # The scale of `Mine` changed its type too, and is the user's.
    assert outcomes == ({"z": "problem", "a": "retyped"} if named else {0: "problem", 1: "retyped"})


def test_a_type_that_a_user_gives_to_an_attribute_of_flax_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Flax's layer does not make a Cache of it, whatever version wrote the checkpoint."""
    with flax(OLD, nnx.Param, monkeypatch):
        model = Holder(Scaled())
        sw.save(tmp_path / "saved", sw.plan(model).take(model))
    with flax(NEW, nnx.Param, monkeypatch):
        model = Holder(Scaled())
        model.layers[0].scale = nnx.Intermediate(jnp.ones(3))
        kinds = sw.Kinds(params=sw.Kind(nnx.Param), rest=sw.Kind(...))
        with pytest.raises(
            sw.RestoreError, match=r"layers/0/scale: Intermediate\(3,\) .*is of kind 'params', a Param in"
        ):
            sw.restore(tmp_path / "saved", kinds.plan(model).take(model))


@pytest.mark.parametrize("layer", [Own, Mine])
def test_a_type_that_the_user_changed_is_refused(layer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with flax(OLD, array, monkeypatch):
        model = Holder(layer())
        sw.save(tmp_path / "saved", sw.plan(model).take(model))
    with flax(NEW, nnx.Param, monkeypatch):
        target = sw.plan(Holder(layer())).abstract()
        with refused(
            sw.RestoreError,
            f"{tmp_path / 'saved'} does not fit the target: 1 leaf differs. Nothing was read or changed.",
            leaves=[
                "layers/0/scale: Param(3,) float32  kind=params  (is of kind 'variables', an Array in the checkpoint)"
            ],
            hint="declare it as it was saved, of kind 'variables'; then sw.transfer(restored, plan) into other kinds\n"
            "give the leaf the type that it was saved with: Array",
        ):
            sw.restore(tmp_path / "saved", target)


def test_with_the_same_flax_a_type_that_changed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with flax(OLD, array, monkeypatch):
        model = Holder(Scaled())
        sw.save(tmp_path / "saved", sw.plan(model).take(model))
    with flax(OLD, nnx.Param, monkeypatch):
        report = sw.preview(tmp_path / "saved", sw.plan(Holder(Scaled())).abstract())
    assert [leaf.note for leaf in report.problems] == ["is of kind 'variables', an Array in the checkpoint"]


@pytest.mark.parametrize("container", [nnx.List, lambda items: nnx.Dict(a=items[0])], ids=["List", "Dict"])
def test_what_a_container_of_flax_holds_is_the_user_s(
    container: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with flax(OLD, array, monkeypatch):
        model = container([nnx.BatchStat(jnp.ones(3))])
        sw.save(tmp_path / "saved", sw.plan(model).take(model))
    with flax(NEW, array, monkeypatch):
        report = sw.preview(tmp_path / "saved", sw.plan(container([nnx.Param(jnp.ones(3))])).abstract())
    assert [leaf.note for leaf in report.problems] == ["is of kind 'stats', a BatchStat in the checkpoint"]


def test_another_shape_or_a_type_of_the_user_s_is_refused_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Scale(nnx.Variable):
        pass

    with flax(OLD, Scale, monkeypatch):
        model = Holder(Scaled())
        sw.save(tmp_path / "own", sw.plan(model).take(model))
    with flax(OLD, lambda value: jnp.concatenate([value, value]), monkeypatch):
        model = Holder(Scaled())
        sw.save(tmp_path / "longer", sw.plan(model).take(model))
    with flax(NEW, nnx.Param, monkeypatch):
        target = sw.plan(Holder(Scaled())).abstract()
        assert [leaf.note for leaf in sw.preview(tmp_path / "own", target).problems] == [
            "is of kind 'variables', a Scale in the checkpoint"
        ]
        assert [leaf.note for leaf in sw.preview(tmp_path / "longer", target).problems] == ["is (6,) in the checkpoint"]


def test_kinds_that_are_asked_for_or_cast_or_saved_over_a_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with flax(OLD, array, monkeypatch):
        model = Holder(Scaled(5.0))
        state = plan_of(model).take(model)
        sw.save(tmp_path / "base", state)
        sw.save(tmp_path / "over", state, only="optimizer", base=tmp_path / "base")
    with flax(NEW, nnx.Param, monkeypatch):
        plan = plan_of(Holder(Scaled()))
        alone, report = sw.restore(tmp_path / "base", plan.take(Holder(Scaled())), only="params")
        assert float(alone["params"]["layers"][0]["scale"][0]) == 5
        assert report.counts["params"] == {"restored": 1, "retyped": 1}
        half = plan.abstract().cast(params="bfloat16")
        cast, report = sw.restore(tmp_path / "base", half, cast=True)
        assert cast["params"]["layers"][0]["scale"].dtype == jnp.bfloat16
        lines = [each for each in report["params"] if each.leaf.path[-1] == "scale"]
        assert [(each.outcome, each.why) for each in lines] == [
            ("cast", f"from float32 to bfloat16, was an Array of kind 'variables' in flax {OLD}")
        ]
        over, report = sw.restore(tmp_path / "over", plan.abstract())
        lines = [each for each in report["params"] if each.leaf.path[-1] == "scale"]
        assert [(each.outcome, each.why) for each in lines] == [
            ("retyped", f"was an Array of kind 'variables' in flax {OLD}, from the base")
        ]
        assert float(over["params"]["layers"][0]["scale"][0]) == 5


def test_new_moments_start_as_the_optimizer_s_init_makes_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not all start with zeros: these start as copies of the restored parameters."""
    copying = optax.GradientTransformation(
        lambda params: (jnp.array(7.0), params), lambda updates, state, params=None: (updates, state)
    )
    with flax(OLD, array, monkeypatch):
        model = Holder(Scaled(5.0))
        state = KINDS.plan(model, optimizers={"params": copying}).take(model)
        moved = jax.tree.map(lambda value: value + 1, state["optimizer"])
        sw.save(tmp_path / "saved", state.replace(optimizer=moved))
    with flax(NEW, nnx.Param, monkeypatch):
        plan = KINDS.plan(Holder(Scaled()), optimizers={"params": copying})
        for target in (plan.abstract(), plan.take(Holder(Scaled())), plan.take(Holder(Scaled()), pack=True)):
            count, copies = sw.restore(tmp_path / "saved", target)[0]["optimizer"]["params"]
            assert float(count) == 8
            assert np.array_equal(copies["layers"][0]["scale"], jnp.full(3, 5.0))
            assert np.array_equal(copies["layers"][0]["w"], jnp.full(3, 2.0))
        mesh = jax.make_mesh((1, 8), ("x", "y"))
        restored, _ = sw.restore(tmp_path / "saved", plan.abstract(mesh))
        assert restored["optimizer"]["params"][1]["layers"][0]["scale"].sharding.mesh == mesh


def test_members_of_an_ensemble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with flax(OLD, array, monkeypatch):
        models = [Holder(Scaled(scale)) for scale in (3.0, 5.0)]
        single = plan_of(models[0])
        plan = single.stacked(2, params=0, optimizer=0, variables=0)
        sw.save(tmp_path / "saved", plan.stack([single.take(model) for model in models]))
    with flax(NEW, nnx.Param, monkeypatch):
        plan = plan_of(Holder(Scaled())).stacked(2, params=0, optimizer=0)
        state, report = sw.restore(tmp_path / "saved", plan.abstract())
    assert report.counts["params"] == {"restored": 1, "retyped": 1}
    assert np.array_equal(state["params"]["layers"][0]["scale"][:, 0], [3, 5])
    assert state["optimizer"]["params"][0].mu["layers"][0]["scale"].shape == (2, 3)


def test_state_of_an_optimizer_of_flax(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its new moments keep what the target has; only the program can make them."""

    def objects() -> tuple[Any, Any]:
        model = Holder(Scaled(5.0))
        return model, nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    with flax(OLD, array, monkeypatch):
        given = objects()
        sw.save(tmp_path / "array", sw.plan(*given).take(*given))
    with flax(NEW, nnx.Param, monkeypatch):
        given = objects()
        plan = sw.plan(*given)
        sw.save(tmp_path / "param", plan.take(*given))
        report = sw.restore(tmp_path / "array", plan.take(*given))[1]
        assert report.counts["optimizer"]["kept"] == 2
        was = f"of 0/layers/0/scale, which was an Array of kind 'variables' in flax {OLD}"
        assert {each.why for each in report["optimizer"] if each.outcome == "kept"} == {
            f"missing from the checkpoint, {was}"
        }
        report = sw.preview(tmp_path / "array", plan.abstract())
        assert {leaf.note for leaf in report.problems} == {
            f"missing from the checkpoint, {was}, and the target is abstract: it has no value to keep"
        }
        assert report.hints == ("restore into a state with values: sw.restore(path, plan.take(model))",)
    with flax(OLD, array, monkeypatch):
        report = sw.preview(tmp_path / "param", sw.plan(*objects()).abstract())
    assert report.ok
    assert report.counts["optimizer"]["dropped"] == 2
