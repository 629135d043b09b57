"""Conversions that were asked for wrongly: no such source, destination, target or name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from refusals import refused
from statewise._src.checkpoint.interop.convert import convert


def taken(**values: Any) -> sw.State:
    """A state of Variables with these values."""
    model = {name: value if isinstance(value, nnx.Variable) else nnx.Param(value) for name, value in values.items()}
    return sw.plan(model).take(model)


# --- what was asked for wrongly --------------------------------------------------------------------------------

A_STATE = "sw.convert(src, dst, target=plan.take(model)), or plan.abstract()"


def test_a_checkpoint_of_statewise_needs_a_target(tmp_path: Path) -> None:
    with refused(
        sw.StructureError,
        "A checkpoint of Statewise needs a target, which has the kinds and types of the leaves.",
        hint=A_STATE,
    ):
        convert({"w": jnp.ones(1)}, tmp_path / "out")


def test_a_target_is_a_state(tmp_path: Path) -> None:
    model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
    with refused(sw.StructureError, "The target of a conversion is a state, not Linear.", hint=A_STATE):
        convert({"w": jnp.ones(1)}, tmp_path / "out", target=model)


def test_what_is_there_is_never_written_over(tmp_path: Path) -> None:
    for name in ("a.safetensors", "dir"):
        path = tmp_path / name
        path.write_text("precious") if "." in name else path.mkdir()
        message = f"There is already something at {path}, and nothing is overwritten."
        with refused(sw.SaveError, message, hint="another path"):
            convert({"params": {"w": jnp.ones(1)}}, path, to="safetensors", dry_run=True)
    assert (tmp_path / "a.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    ("dst", "options", "message", "hint"),
    [
        ("out", {"to": "zip"}, "to='zip' is not a format.", "one of: 'statewise', 'orbax', 'safetensors', 'linen'"),
        (
            None,
            {},
            "If nothing is written, to= has to name the format.",
            "one of: 'statewise', 'orbax', 'safetensors', 'linen'",
        ),
        (
            None,
            {"to": "safetensors"},
            "to='safetensors' needs a path to write to.",
            "sw.convert(src, 'run/converted', ...)",
        ),
        (3, {"to": "orbax"}, "int is not a path.", "sw.convert(src, 'run/converted')"),
        (
            "gs://bucket/a.safetensors",
            {},
            "gs://bucket/a.safetensors is in an object store, where only checkpoints of Statewise are written.",
            "convert to a local path, and then copy the result",
        ),
    ],
)
def test_a_destination_that_is_none_is_refused(dst: Any, options: dict[str, Any], message: str, hint: str) -> None:
    with refused(sw.SaveError, message, hint=hint):
        convert({"w": jnp.ones(1)}, dst, **options)


@pytest.mark.parametrize(
    ("rename", "message", "hint"),
    [
        (
            {"kernal": "w", "zzz": None},
            "rename names what the source does not have: 'kernal', 'zzz'.",
            "its names are like: 'kernel'",
        ),
        (3, "rename is int, neither a mapping nor a function.", "rename={'name in the source': 'path/of/the/leaf'}"),
        (
            lambda name: 7,
            "rename does not give a path for 'bias', but int.",
            "rename gives a path, 'layers/0/kernel', or None to leave a name out",
        ),
        (
            {"bias": "/"},
            "rename does not give a path for 'bias', but str.",
            "rename gives a path, 'layers/0/kernel', or None to leave a name out",
        ),
        (lambda name: None, "the mapping has no arrays to convert.", "another source, or a rename that keeps some"),
    ],
)
def test_a_rename_that_is_none_is_refused(rename: Any, message: str, hint: str) -> None:
    with refused(sw.RestoreError, message, hint=hint):
        convert({"bias": jnp.ones(1), "kernel": jnp.ones(1)}, None, to="orbax", rename=rename)


def test_orbax_stores_nothing_where_no_array_has_elements(tmp_path: Path) -> None:
    with refused(
        sw.SaveError,
        f"There is nothing to write to {tmp_path / 'plain'}: no array has elements, and Orbax does not store others.",
        hint="sw.convert(src, 'run/converted.safetensors')",
    ):
        convert({"w": jnp.zeros((0, 2))}, tmp_path / "plain", to="orbax")


def test_a_source_that_is_neither_path_nor_mapping_is_refused(tmp_path: Path) -> None:
    with refused(
        sw.RestoreError,
        "State is neither a path nor a mapping.",
        hint="sw.convert('run/checkpoint', dst), or nested dicts of arrays; a state: sw.save(path, state), or names=",
    ):
        convert(taken(w=jnp.ones(1)), tmp_path / "a.safetensors")


def test_several_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        sw.save(tmp_path / "step" / name, taken(w=jnp.ones(1)))
    with refused(
        sw.RestoreError,
        f"{tmp_path / 'step'} holds several items: one, two.",
        hint=f"the path of one of them: {str(tmp_path / 'step' / 'one')!r}",
    ):
        convert(tmp_path / "step", tmp_path / "a.safetensors")
