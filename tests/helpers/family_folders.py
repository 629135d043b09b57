"""Folders as GPT-2, BERT and ViT are published, written by hand: what their arrays are called, and their shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from statewise.examples.names import bert, gpt2, vit

Shapes = dict[str, tuple[int, ...]]


def norm(name: str, weight: str = "weight", bias: str = "bias") -> Shapes:
    return {f"{name}.{weight}": (8,), f"{name}.{bias}": (8,)}


def linear(name: str, *weight: int, bias: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": (bias,)}


def gpt2_shapes(prefix: str) -> Shapes:
    shapes: Shapes = {f"{prefix}wte.weight": (11, 8), f"{prefix}wpe.weight": (5, 8)} | norm(f"{prefix}ln_f")
    for number in range(11):  # so that 10 comes before 2 in the order of the alphabet
        layer = f"{prefix}h.{number}"
        shapes |= norm(f"{layer}.ln_1") | norm(f"{layer}.ln_2")
        shapes |= linear(f"{layer}.attn.c_attn", 8, 24, bias=24) | linear(f"{layer}.attn.c_proj", 8, 8, bias=8)
        shapes |= linear(f"{layer}.mlp.c_fc", 8, 32, bias=32) | linear(f"{layer}.mlp.c_proj", 32, 8, bias=8)
    return shapes


def bert_shapes(prefix: str, pooler: bool, *affine: str, layers: int = 2) -> Shapes:
    embed = f"{prefix}embeddings"
    shapes: Shapes = {
        f"{embed}.{name}_embeddings.weight": (count, 8)
        for name, count in (("word", 11), ("position", 5), ("token_type", 2))
    }
    shapes |= norm(f"{embed}.LayerNorm", *affine)
    for number in range(layers):
        layer = f"{prefix}encoder.layer.{number}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{name}", 8, 8, bias=8)
        shapes |= norm(f"{layer}.attention.output.LayerNorm", *affine) | norm(f"{layer}.output.LayerNorm", *affine)
        shapes |= linear(f"{layer}.intermediate.dense", 12, 8, bias=12) | linear(f"{layer}.output.dense", 8, 12, bias=8)
    return shapes | (linear(f"{prefix}pooler.dense", 8, 8, bias=8) if pooler else {})


def vit_shapes(prefix: str, pooler: bool, classes: int) -> Shapes:
    embed = f"{prefix}embeddings"
    shapes: Shapes = {f"{embed}.cls_token": (1, 1, 8), f"{embed}.position_embeddings": (1, 10, 8)}
    shapes |= linear(f"{embed}.patch_embeddings.projection", 8, 3, 2, 2, bias=8) | norm(f"{prefix}layernorm")
    for number in range(2):
        layer = f"{prefix}encoder.layer.{number}"
        for name in ("attention.query", "attention.key", "attention.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{name}", 8, 8, bias=8)
        shapes |= norm(f"{layer}.layernorm_before") | norm(f"{layer}.layernorm_after")
        shapes |= linear(f"{layer}.intermediate.dense", 12, 8, bias=12) | linear(f"{layer}.output.dense", 8, 12, bias=8)
    shapes |= linear(f"{prefix}pooler.dense", 6, 8, bias=6) if pooler else {}
    return shapes | (linear("classifier", classes, 8, bias=classes) if classes else {})


GPT2_CONFIG = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 5, "n_embd": 8, "n_layer": 11, "n_head": 2}
ENCODER = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT_CONFIG = ENCODER | {"model_type": "bert", "vocab_size": 11, "max_position_embeddings": 5}
VIT_CONFIG = ENCODER | {"model_type": "vit", "image_size": 6, "patch_size": 2}

FOLDERS: dict[str, tuple[Any, Any, dict[str, Any], Shapes]] = {
    "gpt2": (gpt2, gpt2.GPT2, GPT2_CONFIG, gpt2_shapes("")),
    "gpt2, prefix": (gpt2, gpt2.GPT2, GPT2_CONFIG, gpt2_shapes("transformer.")),
    "bert": (bert, bert.Bert, BERT_CONFIG, bert_shapes("", True)),
    "bert, prefix, no pooler": (bert, bert.Bert, BERT_CONFIG, bert_shapes("bert.", False)),
    "bert, gamma and beta": (bert, bert.Bert, BERT_CONFIG, bert_shapes("bert.", True, "gamma", "beta")),
    "vit": (vit, vit.ViT, VIT_CONFIG, vit_shapes("", True, 0)),
    "vit, classifier": (vit, vit.ViT, VIT_CONFIG, vit_shapes("vit.", False, 3)),
}


def written(place: Path, config: dict[str, Any], shapes: Shapes) -> dict[str, np.ndarray]:
    """Writes a folder; returns its arrays."""
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, place / "model.safetensors", {"format": "pt"})
    return arrays
