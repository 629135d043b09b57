"""Conversions: what goes over is what was there, told by those who wrote the other formats, and both ways."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors
import safetensors.flax
import safetensors.numpy
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import statewise as sw
from checkpoint_models import ADAM, ALL_SAVED, assert_identical, train, trained
from comparing import plannable
from foreign_models import LinenNet, Net, Odd, X, equal, linen, odd, state_of
from statewise._src.checkpoint.interop.convert import convert
from statewise._src.checkpoint.interop.export import collection_of

# --- Linen -----------------------------------------------------------------------------------------------------


def test_a_linen_model_gives_the_same_outputs_in_nnx(tmp_path: Path) -> None:
    variables = linen()
    conversion = convert(variables, tmp_path / "imported", target=state_of().plan.abstract())
    assert (len(conversion.matched), conversion.unexpected) == (8, ())
    state, _ = sw.restore(tmp_path / "imported", state_of())
    assert np.array_equal(state.plan.build(state)(X), LinenNet().apply(variables, X))


def test_an_nnx_model_gives_the_same_outputs_in_linen(tmp_path: Path) -> None:
    state = state_of()
    sw.save(tmp_path / "first", state)
    variables = convert(tmp_path / "first", None, to="linen").tree
    assert np.array_equal(LinenNet().apply(variables, X), state.plan.build(state)(X))


def test_linen_variables_come_back_from_a_checkpoint_of_statewise(tmp_path: Path) -> None:
    variables = linen()
    convert(variables, tmp_path / "imported", target=state_of())
    assert equal(convert(tmp_path / "imported", None, to="linen").tree, variables)


def test_linen_variables_on_disk_are_read_by_orbax(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", state_of())
    convert(tmp_path / "first", tmp_path / "variables", to="linen")
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "variables")
    assert equal(read, convert(tmp_path / "first", None, to="linen").tree)


def test_a_train_state_of_linen_gives_its_parameters(tmp_path: Path) -> None:
    variables = linen()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "linen", variables | {"step": 3, "opt_state": [{"mu": jnp.ones(2)}]})
    conversion = convert(tmp_path / "linen", tmp_path / "imported", target=state_of())
    assert sorted(conversion.unexpected) == ["opt_state/0/mu", "step"]
    state, _ = sw.restore(tmp_path / "imported", state_of())
    assert np.array_equal(state.plan.build(state)(X), LinenNet().apply(variables, X))


def test_a_bridged_linen_model_gives_its_variables_back(tmp_path: Path) -> None:
    bridged = nnx.bridge.ToNNX(LinenNet(), rngs=nnx.Rngs(0)).lazy_init(X)
    state = sw.plan(bridged).take(bridged)
    sw.save(tmp_path / "first", state)
    variables = convert(tmp_path / "first", None, to="linen").tree
    assert {"params", "batch_stats"} <= set(variables)
    expected = LinenNet().apply({name: variables[name] for name in ("params", "batch_stats")}, X)
    assert np.array_equal(bridged(X), expected)


def test_a_bridged_nnx_model_takes_the_variables(tmp_path: Path) -> None:
    bridge = nnx.bridge.to_linen(Net)
    state = state_of()
    sw.save(tmp_path / "first", state)
    variables = convert(tmp_path / "first", None, to="linen").tree
    given = {name: variables[name] for name in ("params", "batch_stats")}
    made = bridge.init(jax.random.key(0), X)
    made = {name: part for name, part in made.items() if name not in given}
    assert np.array_equal(bridge.apply(made | given, X), state.plan.build(state)(X))


def test_boxed_variables_are_taken_out_of_their_boxes(tmp_path: Path) -> None:
    boxed = jax.tree.map(lambda array: nn.Partitioned(array, names=(None,) * array.ndim), linen())
    convert(boxed, tmp_path / "imported", target=state_of())
    assert equal(convert(tmp_path / "imported", None, to="linen").tree, linen())


def test_a_custom_type_has_its_own_collection(tmp_path: Path) -> None:
    class Gate(nnx.Variable):
        pass

    model = nnx.Dict(gate=Gate(jnp.ones(2)), plain=nnx.Variable(jnp.zeros(1)))
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    tree = convert(tmp_path / "first", None, to="linen").tree
    assert jax.tree.map(np.shape, tree) == {"Gate": {"gate": (2,)}, "Variable": {"plain": (1,)}}
    assert equal(convert(tmp_path / "first", None, to="linen", target=state).tree, tree)
    convert(tree, tmp_path / "back", target=state)
    assert_identical(sw.restore(tmp_path / "back", state)[0], state)


def test_a_registered_name_of_a_collection_is_used() -> None:
    class Quantised(nnx.Variable):
        pass

    nnx.register_variable_name("quantised_of_a_test", Quantised)
    assert collection_of(Quantised) == "quantised_of_a_test"


def test_the_name_of_a_type_is_looked_up_and_never_imported() -> None:
    assert collection_of("no.such.module:Holder.Gate") == "Gate"
    assert collection_of("flax.nnx:Param") == "params"
    assert collection_of("os:getcwd") == "getcwd"
    assert collection_of("builtins:int") is None, "no Variable"
    assert collection_of("nonsense") is None


def test_collections_that_nnx_does_not_know_go_over_beside_params(tmp_path: Path) -> None:
    variables = {"params": {"w": jnp.ones(2)}, "of_my_own": {"w": jnp.zeros(3)}}
    convert(variables, tmp_path / "variables", to="linen")
    with ocp.StandardCheckpointer() as checkpointer:
        assert equal(checkpointer.restore(tmp_path / "variables"), variables)


# --- safetensors -----------------------------------------------------------------------------------------------


def test_safetensors_reads_what_was_written(tmp_path: Path) -> None:
    state = state_of()
    sw.save(tmp_path / "first", state)
    convert(tmp_path / "first", tmp_path / "net.safetensors")
    params, stats = state["params"], state["stats"]
    expected = {
        "dense.bias": params["dense"]["bias"],
        "dense.kernel": params["dense"]["kernel"],
        "norm.bias": params["norm"]["bias"],
        "norm.mean": stats["norm"]["mean"],
        "norm.scale": params["norm"]["scale"],
        "norm.var": stats["norm"]["var"],
        "out.bias": params["out"]["bias"],
        "out.kernel": params["out"]["kernel"],
    }
    for package in (safetensors.numpy, safetensors.flax):
        assert equal(package.load_file(tmp_path / "net.safetensors"), expected)


def test_the_file_tells_kinds_types_and_ties(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", odd())
    convert(tmp_path / "first", tmp_path / "odd.safetensors")
    with safetensors.safe_open(tmp_path / "odd.safetensors", framework="np") as file:
        told = json.loads(file.metadata()["statewise"])
        names = set(file.keys())
    assert told["leaves"]["layers.0.kernel"] == {"kind": "params", "type": "flax.nnx:Param", "aliases": ["tied"]}
    assert told["leaves"]["old_key"] == {"kind": "variables", "type": "flax.nnx:Variable", "prng": "rbg"}
    assert names == told["leaves"].keys()
    assert "tied" not in names
    assert {"several.a", "several.b.0", "several.b.1"} <= names


def test_inspect_counts_the_file_by_kind(tmp_path: Path) -> None:
    sw.save(tmp_path / "first", state_of())
    convert(tmp_path / "first", tmp_path / "net.safetensors")
    census = sw.inspect(tmp_path / "net.safetensors")
    assert {kind: census[kind].types for kind in census} == {"params": {"Param": 6}, "stats": {"BatchStat": 2}}


@settings(max_examples=12)
@given(plannable(), st.sampled_from(["orbax", "safetensors"]))
def test_there_and_back_is_the_identity_for_any_model(model: Any, to: str) -> None:
    assume(any(leaf.size for leaf in ALL_SAVED.plan(model).leaves))
    state = ALL_SAVED.plan(model).take(model)
    with tempfile.TemporaryDirectory() as folder:
        sw.save(f"{folder}/first", state)
        convert(f"{folder}/first", f"{folder}/other", to=to)
        assert convert(f"{folder}/other", f"{folder}/back", target=state.plan.abstract()).unexpected == ()
        assert_identical(sw.restore(f"{folder}/back", state)[0], state)


@pytest.mark.parametrize("name", ["odd.safetensors", "odd"])
@pytest.mark.parametrize("layout", ["named", "packed"])
def test_there_and_back_is_the_identity(tmp_path: Path, name: str, layout: str) -> None:
    state = odd(params=ADAM)
    sw.save(tmp_path / "first", state, layout=layout)
    convert(tmp_path / "first", tmp_path / name, to="safetensors" if "." in name else "orbax")
    conversion = convert(tmp_path / name, tmp_path / "back", target=state.plan.abstract())
    assert conversion.unexpected == ()
    assert_identical(sw.restore(tmp_path / "back", odd(1, params=ADAM))[0], state)


def test_a_resumed_run_survives_two_conversions(tmp_path: Path) -> None:
    state, _ = train(trained(), jnp.ones((5, 3)))
    sw.save(tmp_path / "first", state)
    convert(tmp_path / "first", tmp_path / "run.safetensors")
    convert(tmp_path / "run.safetensors", tmp_path / "back", target=trained(1))
    resumed, _ = sw.restore(tmp_path / "back", trained(1))
    assert_identical(train(resumed, jnp.ones((5, 3)))[0], train(state, jnp.ones((5, 3)))[0])


def test_weights_of_others_are_renamed_into_a_model(tmp_path: Path) -> None:
    variables = linen()
    flat = {
        "model.fc1.weight": variables["params"]["dense"]["kernel"],
        "model.fc1.bias": variables["params"]["dense"]["bias"],
        "model.bn.gamma": variables["params"]["norm"]["scale"],
        "model.bn.beta": variables["params"]["norm"]["bias"],
        "model.bn.running_mean": variables["batch_stats"]["norm"]["mean"],
        "model.bn.running_var": variables["batch_stats"]["norm"]["var"],
        "model.fc2.weight": variables["params"]["out"]["kernel"],
        "model.fc2.bias": variables["params"]["out"]["bias"],
        "model.bn.num_batches_tracked": jnp.array(3),
    }
    safetensors.flax.save_file(flat, tmp_path / "other.safetensors")
    words = {"fc1": "dense", "fc2": "out", "bn": "norm", "weight": "kernel", "gamma": "scale", "beta": "bias"}
    words |= {"running_mean": "mean", "running_var": "var"}

    def rename(name: str) -> str | None:
        return "/".join(words.get(word, word) for word in name.split(".")[1:])

    made = convert(tmp_path / "other.safetensors", tmp_path / "imported", target=state_of(), rename=rename)
    assert made.unexpected == ("model.bn.num_batches_tracked",)
    state, _ = sw.restore(tmp_path / "imported", state_of())
    assert np.array_equal(state.plan.build(state)(X), LinenNet().apply(variables, X))


# --- Orbax -----------------------------------------------------------------------------------------------------


def test_standard_checkpointer_reads_what_was_written(tmp_path: Path) -> None:
    state = state_of()
    sw.save(tmp_path / "first", state)
    convert(tmp_path / "first", tmp_path / "plain", to="orbax")
    assert not (tmp_path / "plain" / "statewise.json").exists()
    with ocp.StandardCheckpointer() as checkpointer:
        read = checkpointer.restore(tmp_path / "plain")
    assert equal(read, nnx.to_pure_dict(nnx.state(state.plan.build(state))))
    assert equal(convert(tmp_path / "first", None, to="orbax").tree, read)


@pytest.mark.parametrize("as_state", [True, False])
def test_what_people_save_of_an_nnx_model_is_taken(tmp_path: Path, as_state: bool) -> None:
    model = Odd(nnx.Rngs(0))
    del model.empty, model.old_key  # Orbax stores neither
    split = nnx.state(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", split if as_state else nnx.to_pure_dict(split))
    state = sw.plan(model).take(model)
    conversion = convert(tmp_path / "plain", tmp_path / "back", target=state.plan.abstract())
    assert conversion.unexpected == ()
    assert_identical(sw.restore(tmp_path / "back", state)[0], state)


def test_a_step_of_checkpoints_is_taken_and_metrics_are_not_asked_for(tmp_path: Path) -> None:
    state = state_of()
    with sw.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(4, state, metrics={"loss": 0.5})
        checkpoints.wait()
    made = convert(tmp_path / "run" / "4", tmp_path / "net.safetensors")
    assert (made.source_format, len(made.matched)) == ("statewise", 8)


def test_keys_with_dots_and_slashes_come_back(tmp_path: Path) -> None:
    model = {"a.b": nnx.Param(jnp.ones(2)), "c/d": nnx.Param(jnp.zeros(3)), "%": nnx.Param(jnp.ones(1))}
    state = sw.plan(model).take(model)
    sw.save(tmp_path / "first", state)
    for name, to in (("plain", "orbax"), ("odd.safetensors", "safetensors"), ("linen", "linen")):
        convert(tmp_path / "first", tmp_path / name, to=to)
        convert(tmp_path / name, tmp_path / f"back/{name}/of", target=state.plan.abstract())
        assert_identical(sw.restore(tmp_path / f"back/{name}/of", state)[0], state)
