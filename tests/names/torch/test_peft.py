"""LoRA adapters beside peft: its folders read, ours read by it, and merged models of both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import safetensors.numpy
import torch
import transformers
from flax import nnx
from peft.tuners.lora import LoraLayer

import statewise as sw

# peft asks transformers by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

VOCABULARY, WIDTH, HEADS, GROUPS, LENGTH, HIDDEN, LAYERS = 50, 32, 4, 2, 8, 48, 2
RANK, ALPHA = 4, 8
TOKENS = np.arange(24).reshape(2, 12) * 7 % VOCABULARY


class Norm(nnx.Module):
    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x: Any) -> Any:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * self.scale[None, None]


def rotate(x: Any) -> Any:
    """Rotary embedding in the order of halves, as Llama has it."""
    angles = jnp.outer(jnp.arange(x.shape[1]), 10000 ** -(jnp.arange(0, LENGTH, 2) / LENGTH))
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    one, two = jnp.split(x, 2, -1)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1)


class Block(nnx.Module):
    def __init__(self, lora: bool, rngs: nnx.Rngs) -> None:
        def linear(inputs: int, outputs: int, lora: bool = False) -> nnx.Module:
            options: dict[str, Any] = {"use_bias": False, "rngs": rngs}
            return (
                nnx.LoRALinear(inputs, outputs, lora_rank=RANK, **options)
                if lora
                else nnx.Linear(inputs, outputs, **options)
            )

        self.before, self.between = Norm(), Norm()
        self.q, self.v = linear(WIDTH, HEADS * LENGTH, lora), linear(WIDTH, GROUPS * LENGTH, lora)
        self.k, self.o = linear(WIDTH, GROUPS * LENGTH), linear(HEADS * LENGTH, WIDTH)
        self.gate, self.up, self.down = linear(WIDTH, HIDDEN), linear(WIDTH, HIDDEN), linear(HIDDEN, WIDTH, lora)

    def __call__(self, x: Any) -> Any:
        y = self.before(x)
        q, k, v = (layer(y).reshape(*y.shape[:2], -1, LENGTH) for layer in (self.q, self.k, self.v))
        out = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.o(out.reshape(*y.shape[:2], -1))
        y = self.between(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Llama(nnx.Module):
    def __init__(self, lora: bool, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(lora, rngs) for _ in range(LAYERS)])
        self.norm = Norm()
        self.head = nnx.Linear(WIDTH, VOCABULARY, use_bias=False, rngs=rngs)

    def __call__(self, tokens: Any) -> Any:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


THEIRS = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
THEIRS |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
BASE = sw.Names(
    {
        "embed/embedding": "model.embed_tokens.weight",
        "norm/scale": "model.norm.weight",
        "head/kernel": sw.Name("lm_head.weight", "o i -> i o"),
        "layers/{i}/before/scale": "model.layers.{i}.input_layernorm.weight",
        "layers/{i}/between/scale": "model.layers.{i}.post_attention_layernorm.weight",
        **{
            f"layers/{{i}}/{ours}/kernel": sw.Name(f"model.layers.{{i}}.{theirs}.weight", "o i -> i o")
            for ours, theirs in THEIRS.items()
        },
    }
)
ADAPTER = sw.Names(
    {
        f"layers/{{i}}/{ours}/lora/lora_{which}": sw.Name(
            f"base_model.model.model.layers.{{i}}.{THEIRS[ours]}.lora_{which.upper()}.weight", "o i -> i o"
        )
        for ours in ("q", "v", "down")
        for which in "ab"
    }
)


def base() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            head_dim=LENGTH,
        )
    ).eval()


def with_adapter(model: Any, **options: Any) -> Any:
    """A model of peft, its B not zero."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0, **options
    )
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor(TOKENS)).logits)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    base().save_pretrained(folder)
    return folder


def read(published: Path, adapter: Path | None = None, optimizer: bool = False) -> sw.State:
    model = Llama(True, nnx.Rngs(0))
    plan = sw.plan(model, optimizers={"lora": optax.adam(3e-2)}) if optimizer else sw.plan(model)
    state, report = sw.restore(published, plan.take(model), names=BASE, only="params")
    assert report.ok
    if adapter is not None:
        state, report = sw.restore(adapter, state, names=ADAPTER, only="lora")
        assert report.ok
        assert not [leaf for leaf in report.leaves if leaf.outcome == "dropped"]
    return state


def close(found: Any, expected: Any) -> bool:
    return bool(np.abs(np.asarray(found) - np.asarray(expected)).max() < 1e-4)


def test_the_base_is_the_same(published: Path) -> None:
    model = Llama(False, nnx.Rngs(0))
    state, _ = sw.restore(published, sw.plan(model).abstract(), names=BASE)
    assert close(state.plan.build(state)(TOKENS), logits(base()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3, r"layers\.1\.mlp\.down_proj": 32}},
    ],
)
def test_an_adapter_of_peft_read_and_merged(published: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = with_adapter(base(), **options)
    theirs.save_pretrained(tmp_path / "adapter")
    state = read(published, tmp_path / "adapter")
    expected = logits(theirs)
    assert not close(logits(base()), expected)
    assert close(state.plan.build(state)(TOKENS), expected)

    # Back to the file that peft wrote: to the bit where the scale is a power of two.
    sw.convert(state, tmp_path / "back", names=ADAPTER, extra_files=[tmp_path / "adapter" / "adapter_config.json"])
    files = [safetensors.numpy.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back")]
    assert files[0].keys() == files[1].keys()
    for name, array in files[0].items():
        if options:
            np.testing.assert_allclose(files[1][name], array, rtol=2e-7)
        else:
            assert array.tobytes() == files[1][name].tobytes()

    # Merged by both: the same kernels, and a folder that transformers loads.
    merged = sw.merge_lora(state)
    assert merged.plan is sw.plan(Llama(False, nnx.Rngs(0)))
    assert close(merged.plan.build(merged)(TOKENS), expected)
    whole = theirs.merge_and_unload()
    kernel = np.asarray(whole.model.layers[1].mlp.down_proj.weight.detach())
    np.testing.assert_allclose(merged["params"]["layers"][1]["down"]["kernel"][...], kernel.T, rtol=1e-5, atol=1e-6)
    sw.convert(merged, tmp_path / "merged", names=BASE, extra_files=[published / "config.json"])
    assert close(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)


def test_an_adapter_of_ours_read_by_peft(published: Path, tmp_path: Path) -> None:
    @sw.train_step
    def tune(model: Llama, tokens: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    state = read(published, optimizer=True)
    losses = []
    for _ in range(3):
        state, loss = tune(state, jnp.asarray(TOKENS))
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(published),
        "r": RANK,
        "lora_alpha": RANK,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    sw.convert(state, tmp_path / "adapter", names=ADAPTER, extra_files=[tmp_path / "adapter_config.json"])
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    expected = state.plan.build(state)(TOKENS)
    assert not close(logits(base()), expected)
    assert close(logits(theirs), expected)
    merged = sw.merge_lora(state)
    assert close(merged.plan.build(merged)(TOKENS), logits(theirs.merge_and_unload()))


def test_scales_are_those_of_peft(published: Path, tmp_path: Path) -> None:
    options = {"alpha_pattern": {"layers.0.self_attn.q_proj": 5, "(v|down)_proj": 7}, "rank_pattern": {"v_proj": 2}}
    theirs = with_adapter(base(), **options)
    theirs.save_pretrained(tmp_path / "adapter")
    arrays = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    # The ranks differ, so there is no model of ours with all of them; one leaf of each shape is enough.
    modules = {name: module for name, module in theirs.named_modules() if isinstance(module, LoraLayer)}
    for name, module in modules.items():
        rank = module.r["default"]
        rows = sw.Names({"b": sw.Name(f"{name}.lora_B.weight", "o r -> r o")})
        model = nnx.Dict(b=nnx.LoRAParam(jnp.zeros((rank, module.out_features))))
        state, _ = sw.restore(tmp_path / "adapter", sw.plan(model).abstract(), names=rows)
        scale = module.scaling["default"]
        assert not math.isclose(scale, 1)
        np.testing.assert_allclose(state["lora"]["b"][...], arrays[f"{name}.lora_B.weight"].T * scale, rtol=2e-7)
