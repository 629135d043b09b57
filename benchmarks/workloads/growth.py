"""Time against the number of leaves, of every verb that takes a model, a plan, a state or a checkpoint.

A verb that is quadratic in something is fast at the sizes of tests, and takes minutes at 100,000 leaves.  So each is
timed at sizes that grow tenfold, and an exponent is fitted: 1 is a cost per leaf, 2 is the square.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import statewise as sw
from benchmarks.compare import table
from benchmarks.measure import Settings, timed

__all__ = ["NAMES", "NNX_SPLIT", "VERBS", "Layer", "Stage", "Stages", "Subject", "exponent", "growth"]

LAYERS = 100  # layers in a stage
# The leaves of a layer.
NAMES = ("query", "key", "value", "out", "gate", "up", "down", "norm", "mean", "cached")
MESH = {"data": 8}
PER_DEVICE = sw.PerDevice("data")
NNX_SPLIT = "`nnx.split(model, ...)`"


class Layer(nnx.Module):
    """Ten leaves of 100 numbers: eight parameters, a statistic and a cache."""

    def __init__(self, values: Iterator[jax.Array]) -> None:
        for name in NAMES[:8]:
            setattr(self, name, nnx.Param(next(values)))
        self.mean = nnx.BatchStat(next(values))
        self.cached = nnx.Cache(next(values))


class Stage(nnx.Module):
    """Layers as attributes: to go through an `nnx.List` takes time by the square of its length."""

    def __init__(self, layers: int, values: Iterator[jax.Array]) -> None:
        for number in range(layers):
            setattr(self, f"layer{number}", Layer(values))


class Stages(nnx.Module):
    """A model of so many leaves: a hundred layers in a stage, ten leaves in a layer."""

    def __init__(self, leaves: int, seed: int = 0) -> None:
        layers = leaves // len(NAMES)
        values = np.random.default_rng(seed).normal(size=(leaves, 100)).astype(np.float32)
        rows = iter(jax.device_put(list(values)))
        for number in range(math.ceil(layers / LAYERS)):
            setattr(self, f"stage{number}", Stage(min(LAYERS, layers - number * LAYERS), rows))


class Adapted(nnx.Module):
    """Four leaves in a layer: kernel, bias, and the two factors of an adapter."""

    def __init__(self, leaves: int) -> None:
        zeros, rngs = nnx.initializers.zeros, nnx.Rngs(0)
        for number in range(leaves // 4):
            layer = nnx.LoRALinear(4, 4, lora_rank=1, kernel_init=zeros, a_initializer=zeros, rngs=rngs)
            setattr(self, f"layer{number}", layer)


@sw.step(writes="cache")
def bump(model: Any) -> jax.Array:
    """One leaf: what a step costs besides its leaves."""
    cached = model.stage0.layer0.cached
    cached.set_raw_value(cached.get_raw_value() + 1)
    return cached.get_raw_value().sum()


def follow(layer: Any, x: jax.Array) -> jax.Array:
    """One leaf of each layer: what a scan costs besides its layers."""
    return x + layer.stage0.layer0.query.get_raw_value()


def loss(model: Any) -> jax.Array:
    """One leaf: what a gradient costs besides its computation."""
    return model.stage0.layer0.query.get_raw_value().sum()


@sw.train_step
def train(model: Any) -> jax.Array:
    """All parameters."""
    params = [leaf for _, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Param)]
    return sum((param.get_raw_value()[0] for param in params), jnp.zeros(()))


class Subject:
    """What verbs are called with, at one size.

    Args:
      leaves: how many leaves the model has.
      folder: an empty folder for checkpoints.
    """

    def __init__(self, leaves: int, folder: Path) -> None:
        self.folder, self.made = folder, 0
        self.model, self.twin = Stages(leaves), Stages(leaves, seed=1)
        self.kinds = sw.Kinds.standard()
        self.filters = [self.kinds[name].of for name in self.kinds]
        self.plan = sw.plan(self.model)
        self.trained = sw.plan(self.model, optimizers={"params": optax.sgd(0.1)}, averages={"params": sw.EMA(0.9)})
        self.abstract = self.plan.abstract()
        self.state, self.other = self.plan.take(self.model), self.plan.take(self.twin)
        self.moving = self.plan.take(self.model)  # what donates the state that it is given
        self.averaged = self.trained.take(self.model)
        self.both = self.plan.stacked(2).stack([self.state, self.other])
        self.adapted = sw.plan(adapted := Adapted(leaves)).take(adapted)
        one_device = jax.make_mesh((1,), ("data",))
        apart = self.kinds.replace(stats=dataclasses.replace(self.kinds["stats"], placement=PER_DEVICE))
        self.per_device = apart.plan(self.model).take(self.model, mesh=one_device)
        self.init = functools.partial(self.plan.init, lambda: Stages(leaves), one_device)
        self.graphdef, self.parts = sw.split(self.model, self.kinds)
        self.pure = nnx.split(self.model)
        self.mesh = jax.sharding.AbstractMesh(tuple(MESH.values()), tuple(MESH))
        names = {sw.format_path(leaf.path): self._name(leaf) for leaf in self.plan.leaves}
        self.names, self.same = sw.Names(names), sw.Names({path: path for path, name in names.items() if name})
        self.kept, self.packed = folder / "kept", folder / "packed"
        sw.save(self.kept, self.state)
        sw.save(self.packed, self.state, layout="packed")
        self.published = folder / "published.safetensors"
        sw.convert(self.state, self.published, names=self.names)

    def _name(self, leaf: sw.results.Leaf) -> str | None:
        return None if leaf.kind == "cache" else ".".join(map(str, leaf.path))

    def fresh(self, end: str = "") -> Path:
        """A path at which there is nothing."""
        self.made += 1
        return self.folder / f"fresh{self.made}{end}"

    def bumped(self) -> None:
        self.moving, _ = bump(self.moving)

    def restarted(self) -> None:
        self.moving = self.moving.restart("cache")

    def watched(self) -> str:
        with sw.watch(self.model) as watch:
            pass
        return str(watch)

    def manager(self) -> None:
        with sw.Checkpoints(self.fresh(), max_to_keep=1) as checkpoints:
            checkpoints.save(1, self.state)
            checkpoints.wait()
            checkpoints.restore(self.abstract)


def _optimized(subject: Subject) -> sw.Plan:
    return sw.plan(subject.model, optimizers={"params": optax.adam(1e-3)}, averages={"params": sw.EMA(0.9)})


# By label: the group that it is drawn in, and the call.
VERBS: dict[str, tuple[str, Callable[[Subject], Any]]] = {
    "`nnx.split(model, ...)`": ("nnx", lambda s: nnx.split(s.model, *s.filters)),
    "`nnx.state(model)`": ("nnx", lambda s: nnx.state(s.model)),
    "`nnx.merge`": ("nnx", lambda s: nnx.merge(*s.pure)),
    "`nnx.update`": ("nnx", lambda s: nnx.update(s.model, s.pure[1])),
    # The subject holds a plan of this model: another is not matched again.
    "`sw.plan(model)`, repeated": ("plans", lambda s: sw.plan(s.model)),
    "`sw.plan(model, optimizers=, averages=)`": ("plans", _optimized),
    "`plan.take(model)`": ("plans", lambda s: s.plan.take(s.model)),
    "`plan.take(model, copy=False)`": ("plans", lambda s: s.plan.take(s.model, copy=False)),
    "`plan.take(model, pack=True)`": ("plans", lambda s: s.plan.take(s.model, pack=True)),
    "`plan.take(model)`, with optimizer and average": ("plans", lambda s: s.trained.take(s.model)),
    "`plan.init(make_model, mesh)`": ("plans", lambda s: s.init()),
    "`plan.put(state, model)`": ("plans", lambda s: s.plan.put(s.other, s.twin)),
    "`plan.build(state)`": ("plans", lambda s: s.plan.build(s.state)),
    "`plan.abstract(mesh)`": ("plans", lambda s: s.plan.abstract(s.mesh)),
    "`plan.shardings(mesh)`": ("plans", lambda s: s.plan.shardings(s.mesh)),
    "`plan.axes()`": ("plans", lambda s: s.plan.axes(params=0)),
    "`plan.stacked(2)`": ("plans", lambda s: s.plan.stacked(2)),
    "`plan.stacked(2).stack(states)`": ("plans", lambda s: s.plan.stacked(2).stack([s.state, s.other])),
    "`plan.table()`": ("plans", lambda s: str(s.plan.table())),
    '`state["params"]`': ("states", lambda s: s.state["params"]),
    "`state.replace(params=)`": ("states", lambda s: s.state.replace(params=s.other["params"])),
    '`state.restart("cache")`': ("states", Subject.restarted),
    '`state.with_averages("ema")`': ("states", lambda s: s.averaged.with_averages("ema")),
    "`state.reduce_devices()`": ("states", lambda s: s.per_device.reduce_devices()),
    "`sw.merge_lora(state)`": ("states", lambda s: sw.merge_lora(s.adapted)),
    "`sw.scan_layers`, of a module": ("states", lambda s: sw.scan_layers(follow, s.twin, jnp.zeros(()))),
    "`state.cast(params=)`": ("states", lambda s: s.state.cast(params=jnp.bfloat16)),
    "`state.member(0)`": ("states", lambda s: s.both.member(0)),
    "a step that touches one leaf": ("states", Subject.bumped),
    "`sw.transfer(state, state)`": ("states", lambda s: sw.transfer(s.state, s.other, kinds="params")),
    "`sw.transfer(state, plan)`": ("states", lambda s: sw.transfer(s.state, s.plan)),
    "`sw.transfer(names=)`": ("states", lambda s: sw.transfer(s.state, s.other, kinds="params", names=s.same)),
    "`sw.testing.assert_same`": ("states", lambda s: sw.testing.assert_same(s.other, s.other)),
    "`sw.select(model, nnx.Param)`": ("looks", lambda s: sw.select(s.model, nnx.Param)),
    "`sw.count(model, nnx.Param)`": ("looks", lambda s: sw.count(s.model, nnx.Param)),
    "`sw.explain(model, nnx.Param)`": ("looks", lambda s: str(sw.explain(s.model, nnx.Param))),
    "`sw.split(model, kinds)`": ("looks", lambda s: sw.split(s.model, s.kinds)),
    "`sw.merge(graphdef, parts)`": ("looks", lambda s: sw.merge(s.graphdef, s.parts)),
    "`sw.update(model, part)`": ("looks", lambda s: sw.update(s.model, s.parts["params"])),
    "`sw.grad(loss)(model)`": ("looks", lambda s: sw.grad(loss)(s.model)),
    "`sw.census(model)`": ("looks", lambda s: sw.census(s.model)),
    "`sw.census(plan)`": ("looks", lambda s: sw.census(s.plan)),
    "`sw.memory(plan, mesh)`": ("looks", lambda s: sw.memory(s.trained, MESH)),
    "`sw.watch(model)`": ("looks", Subject.watched),
    "`sw.lint(model)`": ("looks", lambda s: sw.lint(s.model)),
    "`sw.lint(state)`": ("looks", lambda s: sw.lint(s.state)),
    "`sw.report(plan, mesh=mesh)`, as a page": ("looks", lambda s: sw.report(s.trained, mesh=MESH).to_html()),
    "`sw.diff(state, state)`": ("looks", lambda s: str(sw.diff(s.state, s.other))),
    "`sw.diff(model, model)`": ("looks", lambda s: sw.diff(s.model, s.twin)),
    "`sw.audit`, of a step that touches one leaf": ("looks", lambda s: sw.audit(bump, s.state)),
    "`sw.audit`, of a train step": ("looks", lambda s: sw.audit(train, s.trained.abstract())),
    "`sw.save`": ("files", lambda s: sw.save(s.fresh(), s.state)),
    '`sw.save(layout="packed")`': ("files", lambda s: sw.save(s.fresh(), s.state, layout="packed")),
    "`sw.checkpointable(state)`": ("files", lambda s: sw.checkpointable(s.state)),
    "`sw.inspect(path)`": ("files", lambda s: sw.inspect(s.kept)),
    "`sw.preview(path, plan.abstract())`": ("files", lambda s: sw.preview(s.kept, s.abstract)),
    "`sw.restore(path, plan.abstract())`": ("files", lambda s: sw.restore(s.kept, s.abstract)),
    "`sw.restore` of a packed one": ("files", lambda s: sw.restore(s.packed, s.abstract)),
    "`sw.restore(names=)`": ("files", lambda s: sw.restore(s.published, s.abstract, names=s.names)),
    "`sw.diff(path, state)`": ("files", lambda s: sw.diff(s.kept, s.state)),
    "`sw.report(path)`": ("files", lambda s: sw.report(s.kept).to_html()),
    "`sw.Checkpoints`, save and restore": ("files", Subject.manager),
    "`sw.convert` to names": ("files", lambda s: sw.convert(s.state, s.fresh(".safetensors"), names=s.names)),
    "`sw.convert` to safetensors": (
        "files",
        lambda s: sw.convert(s.kept, s.fresh(".safetensors"), target=s.abstract),
    ),
    "`sw.convert` from safetensors": (
        "files",
        lambda s: sw.convert(s.published, s.fresh(), target=s.abstract, names=s.names),
    ),
    "`names.check(plan, path)`": ("files", lambda s: s.names.check(s.plan, s.published)),
    "`sw.Names.infer(plan, path)`": ("files", lambda s: sw.Names.infer(s.plan, s.published)),
}
# A verb that would take longer than this at the next size is left out there.
LONGEST_S = 200.0
# A call that takes longer than this is not repeated.
LONG_S = 30.0


def growth(settings: Settings, counts: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Every verb at sizes that grow tenfold: the best of three calls, at the largest size of two, or of a long one."""
    counts = counts or ((100, 1000) if settings.quick else (1000, 10_000, 100_000))
    found: dict[str, dict[str, float]] = {label: {} for label in VERBS}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            subject = Subject(count, Path(folder))
            for label, (_, call) in VERBS.items():
                before = [seconds * count / int(size) for size, seconds in found[label].items()]
                if before and before[-1] > LONGEST_S:
                    continue
                found[label][str(count)] = _best(call, subject, 2 if count == max(counts) else 3)
    rows = [
        {
            "key": label,
            "label": label,
            "group": VERBS[label][0],
            "seconds_by_leaves": seconds,
            "exponent": exponent(seconds),
        }
        for label, seconds in found.items()
    ]
    title = "Time against leaves, of every verb that takes a model, a plan, a state or a checkpoint"
    return [table("growth", title, rows, per="call", reference=NNX_SPLIT, counts=list(counts))]


def _best(call: Callable[[Subject], Any], subject: Subject, calls: int) -> float:
    """The shortest of some calls; the first may compile.  None follows one that took long."""
    seconds = [_seconds(call, subject)]
    while len(seconds) < calls and seconds[-1] < LONG_S:
        seconds.append(_seconds(call, subject))
    return min(seconds)


def _seconds(call: Callable[[Subject], Any], subject: Subject) -> float:
    gc.collect()
    return timed(lambda: _silent(call, subject))[0]


def _silent(call: Callable[[Subject], Any], subject: Subject) -> None:
    """What verbs return is no pytree of arrays to wait for, but for states."""
    out = call(subject)
    if isinstance(out, sw.State):
        jax.block_until_ready([array for array in jax.tree.leaves(out) if isinstance(array, jax.Array)])


def exponent(seconds: dict[str, float]) -> float:
    """The slope of a line through the logarithms: 1 for a cost per leaf, 2 for the square; by least squares."""
    sizes, times = np.log([int(size) for size in seconds]), np.log([*seconds.values()])
    return float(np.polyfit(sizes, times, 1)[0])
