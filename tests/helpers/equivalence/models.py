"""Small models of many makes, and the case that trains each.

Biases right before a normalisation and key biases of attention have no gradient but rounding noise, which Adam
would blow up to full steps: these layers go without.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

import statewise as sw
from equivalence.rivals import Case

FEATURES = 6


def rows(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Four rows of features and what to make of them."""
    x = random.normal(size=(4, FEATURES)).astype(np.float32)
    return x, np.tanh(x[:, :2])


def sequences(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two sequences of five steps."""
    x = random.normal(size=(2, 5, FEATURES)).astype(np.float32)
    return x, np.tanh(x)


def tokens(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    x = random.integers(0, 11, size=(2, 6))
    return x[:, :-1], x[:, 1:]


def squares(model: Any, x: Any, y: Any) -> Any:
    return ((model(x) - y) ** 2).mean()


def cross_entropy(model: Any, x: Any, y: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


class BatchNormDropout(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(FEATURES, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.7, rngs=rngs)
        self.dropout = nnx.Dropout(0.4, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(self.dropout(nnx.relu(self.norm(self.inner(x)))))


class Perceptron(nnx.Module):
    """Matrices and vectors, all of them with gradients well away from zero: for the optimizers' sake."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(FEATURES, 8, rngs=rngs)
        self.middle = nnx.Linear(8, 8, rngs=rngs)
        self.outer = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(nnx.tanh(self.middle(nnx.tanh(self.inner(x)))))


class Convolutions(nnx.Module):
    """Every normalisation that has no statistics, and convolutions one way and the other."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(params=1)
        self.layers = nnx.List(
            [
                nnx.Conv(1, 4, (2,), use_bias=False, rngs=rngs),
                nnx.GroupNorm(4, 2, rngs=rngs),
                nnx.ConvTranspose(4, 4, (2,), use_bias=False, rngs=rngs),
                nnx.InstanceNorm(4, rngs=rngs),
                nnx.PReLU(),
                nnx.LayerNorm(4, rngs=rngs),
                nnx.RMSNorm(4, rngs=rngs),
                nnx.Linear(4, 1, rngs=rngs),
            ]
        )

    def __call__(self, x: Any) -> Any:
        x = x[..., None]
        for layer in self.layers:
            x = layer(x)
        return x.mean((1, 2))[:, None]


class Attention(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(params=0, dropout=1)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, FEATURES, decode=False, use_bias=False, dropout_rate=0.3, deterministic=False, rngs=rngs
        )

    def __call__(self, x: Any) -> Any:
        return x + self.attention(self.norm(x), mask=nnx.make_causal_mask(jnp.ones(x.shape[:2])))


class TiedEmbedding(nnx.Module):
    """One table for both ends, once as a module that is shared and once as a Variable that is."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(11, 5, rngs=rngs)
        self.table = self.embed.embedding
        self.mixer = nnx.Linear(5, 5, rngs=rngs)
        self.again = self.mixer

    def __call__(self, x: Any) -> Any:
        x = self.again(nnx.tanh(self.mixer(self.embed(x))))
        return x @ self.table[...].T


class Recurrent(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.forward = nnx.RNN(nnx.OptimizedLSTMCell(FEATURES, 4, rngs=rngs), rngs=rngs)
        self.backward = nnx.RNN(nnx.GRUCell(4, FEATURES, rngs=rngs), reverse=True, keep_order=True, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.backward(self.forward(x))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(FEATURES, FEATURES, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(FEATURES, momentum=0.8, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.calls[...] += 1
        return x + self.dropout(nnx.tanh(self.norm(self.linear(x))))


class Rematerialised(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x: Any) -> Any:
        for block in self.blocks:
            x = nnx.remat(Block.__call__)(block, x)
        return x[:, :2]


class Scanned(nnx.Module):
    """Three blocks, stacked, each rematerialised within the scan."""

    def __init__(self) -> None:
        keys = nnx.Rngs(params=0, dropout=1)

        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(nnx.StateAxes({nnx.RngState: 0, ...: None}),), out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.blocks = make(keys)

    def __call__(self, x: Any) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def through(block: Block, x: Any) -> Any:
            return block(x)

        return through(self.blocks, x)[:, :2]


class Branching(nnx.Module):
    """`nnx.cond` and `nnx.while_loop` over modules: one branch writes its block, the loop runs another."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.often, self.seldom = Block(rngs), Block(rngs)
        self.count = nnx.Variable(jnp.array(0))

    def __call__(self, x: Any) -> Any:
        self.count[...] += 1
        x = nnx.cond(
            self.count[...] % 2 == 0,
            lambda model, x: model.seldom(x),
            lambda model, x: model.often(x),
            self,
            x,
        )
        return nnx.fori_loop(0, 2, lambda i, carry: (carry[0], carry[0].linear(carry[1])), (self.often, x))[1][:, :2]


class Spectral(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.SpectralNorm(nnx.Linear(FEATURES, 4, rngs=rngs), rngs=rngs)
        self.second = nnx.SpectralNorm(nnx.Linear(4, 2, rngs=rngs), n_steps=2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.tanh(self.first(x, update_stats=True)), update_stats=True)


class WeightNormed(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.layer = nnx.WeightNorm(nnx.Linear(FEATURES, 2, rngs=rngs), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


class LowRank(nnx.Module):
    """A base that stays, and adapters that learn."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.LoRALinear(FEATURES, 5, lora_rank=2, rngs=rngs)
        base = nnx.Linear(5, 2, rngs=rngs)
        self.second = nnx.LoRA(5, 2, 2, base_module=base, b_initializer=nnx.initializers.normal(), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.second(nnx.tanh(self.first(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        x = linen.Dropout(0.3, deterministic=False)(nnx.tanh(linen.Dense(5)(x)))
        return linen.Dense(2, name="last")(x)


def linen_model() -> Any:
    return nnx.bridge.ToNNX(LinenNet(), rngs=nnx.Rngs(params=0, dropout=1)).lazy_init(jnp.ones((1, FEATURES)))


class LinenBatchNorm(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.BatchNorm(use_running_average=False, momentum=0.7)(linen.Dense(2, use_bias=False)(x))


def linen_statistics() -> Any:
    return nnx.bridge.ToNNX(LinenBatchNorm(), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, FEATURES)))


def mutable_squares(model: Any, x: Any, y: Any) -> Any:
    return ((model(x, mutable=["batch_stats"]) - y) ** 2).mean()


class BatchStat(nnx.Variable):
    """A type of the user's own, with the name of another."""


class Scale(nnx.Variable):
    """Trained, but no `nnx.Param`."""


class Nested(nnx.Module):
    """Keys of every sort, Variables that hold several arrays, arrays outside Variables."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.by_name = nnx.Dict(a=nnx.Dict(b=nnx.Linear(FEATURES, 4, rngs=rngs)))
        self.by_number = nnx.data({7: nnx.Linear(4, 4, rngs=rngs), 10: {2: nnx.Linear(4, 4, rngs=rngs)}})
        self.listed = nnx.List([nnx.List([nnx.Linear(4, 2, rngs=rngs)])])
        self.scale = Scale(jnp.ones(2))
        self.mean = BatchStat(jnp.zeros(4))
        self.moments = nnx.Variable({"sum": jnp.zeros(4), "squares": (jnp.zeros(4), jnp.array(0))})
        self.total = jnp.zeros(2)
        self.fixed = jnp.arange(2.0)

    def __call__(self, x: Any) -> Any:
        x = nnx.tanh(self.by_name["a"]["b"](x))
        x = nnx.tanh(self.by_number[10][2](self.by_number[7](x)))
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        kept = self.moments.get_value()
        squares, count = kept["squares"]
        self.moments.set_value({"sum": kept["sum"] + x.sum(0), "squares": (squares + (x**2).sum(0), count + 1)})
        x = self.listed[0][0](x) * self.scale[...][None] + self.fixed[None]
        self.total = self.total + jax.lax.stop_gradient(x).sum(0)
        return x


OWN_KINDS = sw.Kinds(
    trained=sw.Kind(nnx.Any(nnx.Param, Scale)),
    stats=sw.Kind(BatchStat),
    counters=sw.Kind(sw.Exactly(nnx.Variable)),
    arrays=sw.Kind(...),
)


class HalfPrecision(nnx.Module):
    """Parameters and activations of bfloat16, statistics of float32."""

    def __init__(self) -> None:
        rngs, half = nnx.Rngs(0), jnp.bfloat16
        self.inner = nnx.Linear(FEATURES, 8, use_bias=False, dtype=half, param_dtype=half, rngs=rngs)
        self.norm = nnx.BatchNorm(8, dtype=half, rngs=rngs)
        self.outer = nnx.Linear(8, 2, dtype=half, param_dtype=half, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.outer(nnx.tanh(self.norm(self.inner(x)))).astype(jnp.float32)


class Complex(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(FEATURES, 2, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return jnp.abs(self.layer(x.astype(jnp.complex64)))


class Constants(nnx.Module):
    """Parameters that were given as no arrays, or hold nothing."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(np.linspace(-1, 1, 2 * FEATURES, dtype=np.float32).reshape(FEATURES, 2))
        self.scale = nnx.Param(2.0)
        self.shift = nnx.Param(jnp.array(0.5))
        self.empty = nnx.Param(jnp.zeros((0, 3)))
        self.nothing = nnx.Param(None)

    def __call__(self, x: Any) -> Any:
        return x @ self.kernel[...] * self.scale[...] + self.shift[...]


@jax.custom_vjp
def clipped(x: Any) -> Any:
    """The identity, with a gradient that is not its own."""
    return x


clipped.defvjp(lambda x: (x, None), lambda _, grad: (3 * jnp.clip(grad, -0.01, 0.01),))


class OwnGradients(nnx.Module):
    def __init__(self) -> None:
        self.layer = nnx.Linear(FEATURES, 2, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return clipped(nnx.relu6(clipped(self.norm(self.layer(x)))))


def with_penalty(model: Any, x: Any, y: Any) -> Any:
    """Gradients within the loss: with respect to the input by JAX, to the parameters by NNX and by us."""
    inputs = jax.grad(lambda x: model.middle(model.inner(x)).sum() ** 2)(x)
    params = nnx.grad(squares)(model, x, y)
    kernels = sw.grad(squares, wrt=sw.Path("*/kernel"))(model, x, y)
    norms = [jnp.sum(leaf**2) for leaf in jax.tree.leaves((inputs, nnx.as_pure(params), nnx.as_pure(kernels)))]
    return squares(model, x, y) + 0.1 * sum(norms)


MODELS: dict[str, Case] = {
    "batchnorm_dropout": Case(BatchNormDropout, rows, squares),
    "convolutions": Case(Convolutions, rows, squares),
    "attention": Case(Attention, sequences, squares),
    "tied_embedding": Case(TiedEmbedding, tokens, cross_entropy),
    "recurrent": Case(Recurrent, sequences, squares),
    "rematerialised": Case(Rematerialised, rows, squares),
    "scanned": Case(Scanned, rows, squares),
    "branching": Case(Branching, rows, squares),
    "spectral_norm": Case(Spectral, rows, squares, writes=("params",)),
    "weight_norm": Case(WeightNormed, rows, squares, writes=("params",)),
    "lora": Case(LowRank, rows, squares, wrt=nnx.LoRAParam, trained="lora"),
    "lora_and_base": Case(LowRank, rows, squares, wrt=nnx.Param, trained=("params", "lora")),
    "linen": Case(linen_model, rows, squares),
    "linen_statistics": Case(linen_statistics, rows, mutable_squares),
    "nested": Case(Nested, rows, squares, wrt=nnx.Any(nnx.Param, Scale), trained="trained", kinds=OWN_KINDS),
    "half_precision": Case(HalfPrecision, rows, squares, rtol=2e-2),
    "complex": Case(Complex, rows, squares),
    # A Python number is weakly typed, and no longer once it was updated: one more trace, as under `nnx.jit`.
    "constants": Case(Constants, rows, squares, traces=2),
    "own_gradients": Case(OwnGradients, rows, squares),
    "penalty": Case(Perceptron, rows, with_penalty),
}

# What has to move in every step, besides the parameters: a comparison of two models that stand still proves nothing.
MOVING: dict[str, tuple[str, ...]] = {
    "batchnorm_dropout": ("mean", "var", "count", "kernel"),
    "attention": ("count", "kernel"),
    "rematerialised": ("mean", "count", "calls", "kernel"),
    "scanned": ("mean", "count", "calls", "kernel"),
    "branching": ("often", "seldom", "calls"),
    "spectral_norm": ("batch_stats", "kernel"),
    "lora": ("lora_a", "lora_b"),
    "nested": ("scale", "mean", "sum", "squares", "total", 7, 10),
    "linen": ("kernel", "count"),
    "linen_statistics": ("kernel", "mean", "var"),
    "half_precision": ("mean", "kernel"),
}
