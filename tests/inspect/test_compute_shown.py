"""A kind's compute dtype, as census, audit, memory, report, the checkpoint and the command line show it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import statewise as sw
from statewise.cli import main

MESH = {"data": 4, "model": 2}
X = jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)


class Net(nnx.Module):
    def __init__(self) -> None:
        self.up = nnx.Linear(16, 32, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(32, rngs=nnx.Rngs(0))
        self.half = nnx.Param(jnp.ones(4, jnp.bfloat16))
        self.steps = nnx.Param(jnp.array(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.steps[...] += 1
        return self.norm(self.up(x))


KINDS = sw.Kinds(
    params=sw.Kind(
        nnx.Param,
        compute="bfloat16",
        placement=lambda path, shape: sw.Sharded(None, "model") if len(shape) == 2 else sw.Replicated(),
    ),
    stats=sw.Kind(nnx.BatchStat),
)


@sw.step(writes=("params", "stats"))
def fn(model: Any, x: jax.Array) -> jax.Array:
    return model(x)


def plan() -> sw.Plan:
    return KINDS.plan(Net())


def test_an_audit_has_the_dtype_in_which_the_function_sees_each_leaf() -> None:
    audit = sw.audit(fn, plan().abstract(), X)
    seen = {sw.format_path(row.path): row.compute for row in audit.leaves}
    assert {path for path, dtype in seen.items() if dtype == "bfloat16"} == {
        "up/kernel",
        "up/bias",
        "norm/scale",
        "norm/bias",
    }
    assert {seen[path] for path in ("half", "steps", "norm/mean", "norm/var")} == {None}
    assert {name: count.compute for name, count in audit.counts.items()} == {"params": "bfloat16", "stats": None}
    table = audit.table()
    assert table.columns[-1] == "compute"
    assert [row[-1] for row in table.rows] == ["bfloat16", "-"]
    assert [row[-1] for row in audit.by_leaf("params").rows].count("bfloat16") == 4
    data = json.loads(audit.to_json())
    assert [kind["compute"] for kind in data["kinds"]] == ["bfloat16", None]
    assert {leaf["path"]: leaf["compute"] for leaf in data["leaves"]} == seen


def test_an_audit_without_compute_dtypes_has_no_column_for_them() -> None:
    audit = sw.audit(fn, sw.plan(Net()).abstract(), X)
    assert "compute" not in audit.table().columns
    assert "compute" not in audit.by_leaf().columns


def test_memory_counts_the_copies_that_a_step_makes() -> None:
    counted = sw.memory(plan(), MESH)
    # Half of the kernel on each device; biases and scales on all; integers and what is bfloat16 already are not copied.
    copies = 2 * (16 * 32 // 2 + 32 + 32 + 32)
    assert (counted["params"].compute, counted["params"].copies) == ("bfloat16", copies)
    assert (counted["stats"].compute, counted["stats"].copies) == (None, 0)
    assert counted.total == sum(kind.per_device for kind in counted.kinds) + copies
    rows = {row[0]: row for row in counted.table().rows}
    assert rows["params in bfloat16"][3] == sw.memory(plan(), MESH).table().rows[2][3] == f"{copies} B"
    assert counted.to_dict()["kinds"][0]["copies"] == copies
    plain = sw.memory(sw.plan(Net()), MESH)
    assert not any(kind.copies for kind in plain.kinds)
    assert len(plain.table().rows) == 2


def test_the_copies_are_those_of_the_compiled_step() -> None:
    """Judged by JAX: the operands that a step converts, and the dtype that it converts them to."""
    text = fn.lower(plan().abstract(), X).as_text()
    converted = sum(f"tensor<{shape}xf32>) -> tensor<{shape}xbf16>" in text for shape in ("16x32", "32"))
    assert converted == 2
    whole = sw.memory(plan(), {"data": 1, "model": 1})["params"].copies
    dtypes = [leaf for leaf in jax.tree.leaves(plan().abstract()["params"]) if leaf.dtype == jnp.float32]
    assert whole == sum(2 * leaf.size for leaf in dtypes)


def test_census_and_report(tmp_path: Path) -> None:
    assert "compute=bfloat16" in str(sw.census(plan()))
    report = sw.report(plan(), mesh=MESH)
    assert report.to_dict()["memory"] == sw.memory(plan(), MESH).to_dict()
    assert report.census["params"].handling.endswith("compute=bfloat16")
    report.write(tmp_path / "page.html")
    assert "compute=bfloat16" in (tmp_path / "page.html").read_text()


def test_a_checkpoint_says_it_of_its_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sw.save(tmp_path / "a", plan().take(Net()))
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "compute=bfloat16" in capsys.readouterr().out


MODELS = """
import jax.numpy as jnp
from flax import nnx
import statewise as sw

def make(): return nnx.Linear(16, 32, use_bias=False, rngs=nnx.Rngs(0))
def kinds(): return sw.Kinds(params=sw.Kind(nnx.Param, compute="bfloat16"))
"""


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["census"], "compute=bfloat16"),
        (["plan"], "compute=bfloat16"),
        (["memory", "--mesh", "data=4"], "params in bfloat16 1.0 KiB"),
    ],
)
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], shown: str) -> None:
    file = tmp_path / "models_for_compute.py"
    file.write_text(MODELS)
    name, *options = command
    assert main([name, f"{file}:make", "--kinds", f"{file}:kinds", *options]) == 0
    assert shown in " ".join(capsys.readouterr().out.split())
