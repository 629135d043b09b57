"""One of each layer and metric that Flax ships, small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def attention() -> nnx.MultiHeadAttention:
    model = nnx.MultiHeadAttention(
        num_heads=2, in_features=4, qkv_features=4, decode=True, dropout_rate=0.1, rngs=rngs(), normalize_qk=True
    )
    model.init_cache((2, 8, 4))
    return model


def normalized() -> nnx.WeightNorm:
    return nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs()), rngs=rngs())


SHIPPED: dict[str, Callable[[], Any]] = {
    "Linear": lambda: nnx.Linear(2, 3, rngs=rngs()),
    "LinearGeneral": lambda: nnx.LinearGeneral((2,), (3,), rngs=rngs()),
    "Einsum": lambda: nnx.Einsum("ab,bc->ac", (2, 3), (3,), rngs=rngs()),
    "Conv": lambda: nnx.Conv(2, 3, (3, 3), rngs=rngs()),
    "ConvTranspose": lambda: nnx.ConvTranspose(2, 3, (3, 3), rngs=rngs()),
    "Embed": lambda: nnx.Embed(3, 4, rngs=rngs()),
    "BatchNorm": lambda: nnx.BatchNorm(3, rngs=rngs()),
    "LayerNorm": lambda: nnx.LayerNorm(3, rngs=rngs()),
    "RMSNorm": lambda: nnx.RMSNorm(3, rngs=rngs()),
    "GroupNorm": lambda: nnx.GroupNorm(4, num_groups=2, rngs=rngs()),
    "InstanceNorm": lambda: nnx.InstanceNorm(3, rngs=rngs()),
    "SpectralNorm": lambda: nnx.SpectralNorm(nnx.Linear(2, 3, rngs=rngs()), rngs=rngs()),
    "Dropout": lambda: nnx.Dropout(0.5, rngs=rngs()),
    "PReLU": nnx.PReLU,
    "MultiHeadAttention": attention,
    "LoRA": lambda: nnx.LoRA(2, 1, 3, rngs=rngs()),
    "LoRA over a base": lambda: nnx.LoRA(2, 1, 3, base_module=nnx.Linear(2, 3, rngs=rngs()), rngs=rngs()),
    "LoRALinear": lambda: nnx.LoRALinear(2, 3, lora_rank=1, rngs=rngs()),
    "LSTMCell": lambda: nnx.LSTMCell(2, 3, rngs=rngs()),
    "OptimizedLSTMCell": lambda: nnx.OptimizedLSTMCell(2, 3, rngs=rngs()),
    "GRUCell": lambda: nnx.GRUCell(2, 3, rngs=rngs()),
    "SimpleCell": lambda: nnx.SimpleCell(2, 3, rngs=rngs()),
    "RNN": lambda: nnx.RNN(nnx.LSTMCell(2, 3, rngs=rngs())),
    "Bidirectional": lambda: nnx.Bidirectional(
        nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs())), nnx.RNN(nnx.GRUCell(2, 3, rngs=rngs()))
    ),
    "Rngs": lambda: nnx.Rngs(0, params=1),
    "Average": nnx.metrics.Average,
    "Welford": nnx.metrics.Welford,
    "MultiMetric": lambda: nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), var=nnx.metrics.Welford("loss")),
}

# And what is in `nnx` besides: what lint finds something in, and what wraps other models.
MORE: dict[str, Callable[[], Any]] = {
    "WeightNorm": normalized,
    "Sequential": lambda: nnx.Sequential(nnx.Linear(2, 3, rngs=rngs()), nnx.Dropout(0.5, rngs=rngs())),
    "EMA": lambda: nnx.EMA(nnx.Linear(2, 3, rngs=rngs()), decay=0.9, only=nnx.Param),
    "Optimizer": lambda: nnx.Optimizer(nnx.Linear(2, 3, rngs=rngs()), optax.adam(0.1), wrt=nnx.Param),
    "ModelAndOptimizer": lambda: nnx.ModelAndOptimizer(nnx.Linear(2, 3, rngs=rngs()), optax.adam(0.1), wrt=nnx.Param),
    "RngStream": lambda: nnx.RngStream(0, tag="dropout"),
}
if hasattr(nnx, "RoPE"):
    MORE["RoPE"] = lambda: nnx.RoPE(embedding_size=4, max_seq_len=8)
# These hold only what a user gives them.
BASES = ("Dict", "List", "Metric", "Module", "Object", "Pytree", "RNNCellBase")


def _type(leaf: Any) -> str:
    return type(leaf).__name__ if isinstance(leaf, nnx.Variable) else "Array"


def leaf_types() -> dict[str, dict[str, list[Any]]]:
    """For each layer, by path, each leaf's type, shape and dtype: as JSON; the same in every mode of Flax."""
    tables = {}
    for name, make in (SHIPPED | MORE).items():
        with nnx.var_defaults(hijax=False, ref=False):
            state = nnx.state(make())
        leaves = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
        tables[name] = {
            "/".join(str(key.key) for key in keys): [_type(leaf), list(leaf.shape), str(leaf.dtype)]
            for keys, leaf in leaves
        }
    return tables
