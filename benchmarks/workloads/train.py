"""Train steps: many small leaves, few large ones, and two real models made of Flax's layers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import models
from benchmarks.case import Case, EqxCase, training
from benchmarks.compare import compare
from benchmarks.measure import Settings
from benchmarks.styles import STYLES
from benchmarks.twins import twin

__all__ = ["few_large", "few_large_case", "many_small", "many_small_case", "mesh", "resnet", "transformer"]

Tables = list[dict[str, Any]]

# A real model takes seconds to compile for each rival: `--quick` runs some of them.
FEW = ("statewise", "statewise-packed", "by-hand", "nnx.jit_partial", "nnx.jit", "equinox")


def _names(settings: Settings) -> tuple[str, ...] | None:
    return FEW if settings.quick else None


def many_small_case(blocks: int, batch: int = 8) -> Case:
    """Blocks of width 8 under Adam: four parameters a block, and two moments for each."""
    x = jax.random.normal(jax.random.key(1), (batch, 8))
    return training(
        lambda: models.Chain(blocks, rngs=nnx.Rngs(0)),
        models.mse,
        (x, jnp.sin(x)),
        optax.adam(1e-3),
        twin("mse"),
        eqx=EqxCase(twin("chain")),
        tolerance=1e-3,
        tiny=lambda: many_small_case(1, batch),
    )


def many_small(settings: Settings) -> Tables:
    blocks = 30 if settings.quick else 200
    title = f"{blocks} blocks of width 8, Adam"
    return [compare(many_small_case(blocks), settings, key="many_small", title=title, names=tuple(STYLES))]


def few_large_case(widths: tuple[int, ...], batch: int = 16) -> Case:
    """Dense layers without bias under Adam; every way donates, as is advised where memory counts."""
    x = jax.random.normal(jax.random.key(1), (batch, widths[0]))
    y = jnp.zeros((batch, widths[-1]))
    return training(
        lambda: models.Mlp(widths, rngs=nnx.Rngs(0)),
        models.mse,
        (x, y),
        optax.adam(1e-3),
        twin("mse"),
        eqx=EqxCase(twin("dense")),
        donate=True,
        tolerance=1e-3,
        tiny=lambda: few_large_case((16, 16), batch),
    )


def few_large(settings: Settings) -> Tables:
    squares = few_large_case((256,) * (5 if settings.quick else 9))
    growing = few_large_case((256, 512, 512) if settings.quick else (256, 512, 1024, 1024, 512))
    names = _names(settings)
    wide = "Leaves from 256 × 512 to 512 × 512" if settings.quick else "Leaves from 256 × 512 to 1024 × 1024"
    return [
        compare(squares, settings, key="few_large_256", title="Leaves of 256 × 256, Adam", names=names),
        compare(growing, settings, key="few_large_1024", title=f"{wide}, Adam", names=names),
    ]


def resnet_case(stages: tuple[int, ...], repeats: int, size: int, batch: int) -> Case:
    keys = jax.random.split(jax.random.key(1))
    images = jax.random.normal(keys[0], (batch, size, size, 3))
    labels = jax.random.randint(keys[1], (batch,), 0, 10)
    return training(
        lambda: models.ResNet(stages, repeats, rngs=nnx.Rngs(0)),
        models.cross_entropy,
        (images, labels),
        optax.adamw(1e-3),
        twin("resnet_loss"),
        eqx=EqxCase(twin("resnet")),
        tolerance=2e-2,  # BatchNorm's variance is computed in another way, and Adam's first steps look at signs
        tiny=lambda: resnet_case((4,), 1, size, batch),
    )


def resnet(settings: Settings) -> Tables:
    shape = ((4, 8), 1) if settings.quick else ((8, 16), 2)
    case = resnet_case(*shape, size=8, batch=8)
    title = "A small ResNet of Flax's layers, AdamW"
    return [compare(case, settings, key="resnet", title=title, names=_names(settings))]


def transformer_case(width: int, depth: int, dropout: float = 0.1, batch: int = 4, length: int = 16) -> Case:
    tokens = jax.random.randint(jax.random.key(1), (batch, length + 1), 0, 64)
    return training(
        lambda: models.Transformer(width, depth, dropout=dropout, rngs=nnx.Rngs(0)),
        models.cross_entropy,
        (tokens[:, :-1], tokens[:, 1:]),
        optax.adamw(1e-3),
        twin("transformer_loss"),
        eqx=EqxCase(twin("transformer"), comparable=dropout == 0),
        tolerance=2e-3,
        tiny=lambda: transformer_case(width, 1, dropout, batch, length),
        quiet=lambda: transformer_case(width, depth, 0.0, batch, length),
    )


def transformer(settings: Settings) -> Tables:
    case = transformer_case(16, 1) if settings.quick else transformer_case(32, 2)
    title = "A small transformer of Flax's layers, AdamW"
    return [compare(case, settings, key="transformer", title=title, names=_names(settings))]


def mesh(settings: Settings, blocks: int | None = None) -> Tables:
    """The parameters on every device, the batch spread over them."""
    blocks = blocks or (6 if settings.quick else 30)
    case = many_small_case(blocks, batch=16)
    devices = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.NamedSharding(devices, jax.P())
    spread = functools.partial(jax.device_put, device=jax.NamedSharding(devices, jax.P("data")))
    x, y = spread(jax.random.normal(jax.random.key(1), (16, 8))), spread(jnp.zeros((16, 8)))

    def loop(program: Any) -> Any:
        train = program("train")
        return lambda: train(x, y)

    placed = Case(case.build, case.programs, loop, case.tx, eqx=case.eqx, tolerance=case.tolerance)
    title = f"{blocks} blocks of width 8, Adam, on eight fake devices"
    return [compare(placed, settings, key="mesh", title=title, sharding=everywhere, names=_names(settings))]
