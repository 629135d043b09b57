"""A transformer of a billion parameters that is nowhere: what is asked about it makes no array of it.

Each verb runs in a process of its own, which reports the seconds and how much its largest resident size grew.  Only
the checkpoint is real: two gigabytes of bfloat16, written once.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import statewise as sw
from benchmarks import models
from benchmarks.compare import WrongResultError, table
from benchmarks.machine import in_own_process, peak_bytes
from benchmarks.measure import Settings, timed

__all__ = ["VERBS", "child", "large", "plan_of", "write_checkpoint"]

MESH = {"data": 8}


def plan_of(width: int, depth: int) -> tuple[Any, sw.Plan]:
    """The abstract model in bfloat16, and its plan: sharded over the mesh, with Adam."""
    vocabulary = 64 if width < 256 else 32768

    def build() -> nnx.Module:
        model = models.Transformer(width, depth, max(width // 128, 8), vocabulary, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        nnx.update(model, jax.tree.map(lambda array: array.astype(jnp.bfloat16), nnx.state(model, nnx.Param)))
        return model

    model = nnx.eval_shape(build)
    return model, _kinds().plan(model, optimizers={"params": optax.adamw(1e-4)})


def _kinds() -> sw.Kinds:
    return sw.Kinds.standard().replace(params=sw.Kind(nnx.Param, placement=sw.Sharded("data")))


def write_checkpoint(path: Path, width: int, depth: int) -> int:
    """Writes the parameters, all zeros; returns how many there are."""
    model = plan_of(width, depth)[0]
    arrays = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda array: jnp.zeros(array.shape, array.dtype), arrays))
    nnx.update(model, jax.tree.map(_zeros, nnx.state(model, nnx.Not(nnx.Param))))
    sw.save(path, _kinds().plan(model).take(model, copy=False), only="params")
    return sum(array.size for array in jax.tree.leaves(arrays))


def _zeros(array: Any) -> jax.Array:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    return jax.random.key(0) if is_key else jnp.zeros(array.shape, array.dtype)


def _shardings(model: Any, plan: sw.Plan, path: Path) -> Any:
    shardings = jax.tree.leaves(plan.shardings(_mesh()))
    return sum("data" in sharding.spec for sharding in shardings)


def _preview(model: Any, plan: sw.Plan, path: Path) -> Any:
    report = sw.preview(path, plan.abstract(_mesh()), only="params")
    return {leaf.outcome for leaf in report.leaves if leaf.leaf.kind == "params"} == {"restored"}


def _report(model: Any, plan: sw.Plan, path: Path) -> Any:
    return len(sw.report(plan, mesh=MESH).to_html())


def _mesh() -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh(tuple(MESH.values()), tuple(MESH))


# By label: what is asked of (the abstract model, its plan, the path of a checkpoint); the answer has to be true.
VERBS: dict[str, Callable[[Any, sw.Plan, Path], Any]] = {
    "`sw.plan`, with its optimizer": lambda model, plan, path: sw.plan(model, optimizers={"params": optax.adamw(1e-3)}),
    "`plan.shardings(mesh)`": _shardings,
    "`sw.memory(plan, mesh)`": lambda model, plan, path: sw.memory(plan, MESH).total,
    "`sw.census(plan)`": lambda model, plan, path: sw.census(plan).total.size,
    "`sw.inspect(path)`": lambda model, plan, path: sw.inspect(path).total.size,
    "`sw.preview(path, plan.abstract(mesh))`": _preview,
    "`sw.diff(plan, path)`": lambda model, plan, path: str(sw.diff(plan, path)),
    "`sw.lint(model)`": lambda model, plan, path: isinstance(sw.lint(model), list),
    "`sw.lint(plan)`": lambda model, plan, path: isinstance(sw.lint(plan), list),
    "`sw.report(plan, mesh=mesh)`, as a page": _report,
}


def large(settings: Settings) -> list[dict[str, Any]]:
    """Each verb once in a fresh process: seconds, and by how much the process grew."""
    width, depth = (64, 2) if settings.quick else (2048, 18)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        count = write_checkpoint(path, width, depth)
        rows = [
            {"key": verb, "label": verb, **in_own_process("large", verb, str(path), width, depth)} for verb in VERBS
        ]
    title = f"A transformer of {count / 1e9:.2f} billion parameters in bfloat16, abstract, on a mesh of eight devices"
    return [table("large", title, rows, per="call", reference=rows[0]["key"], parameters=count)]


def child(verb: str, path: str, width: int, depth: int) -> dict[str, Any]:
    """What one process finds out about one verb, called for the first time; the model is planned before the clock.

    Raises:
      WrongResultError: the verb has no answer.
    """
    model, plan = plan_of(width, depth)
    ask = VERBS[verb]
    before = peak_bytes()
    seconds, answer = timed(lambda: ask(model, plan, Path(path)))
    if not answer:
        raise WrongResultError(f"{verb}: {answer!r}")
    return {"median_s": seconds, "peak_bytes": peak_bytes() - before}
