"""`statewise.examples.names.vit` beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from families_beside_torch import Pair, check_refused, random_model
from statewise.examples.names import vit

IMAGES = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
SIZES = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"image_size": 12, "patch_size": 4}


def pair(model_class: Any = transformers.ViTModel, **given: Any) -> Pair:
    has_classifier = model_class is transformers.ViTForImageClassification
    config = transformers.ViTConfig(**SIZES | given)
    images = IMAGES[..., : config.num_channels]

    def theirs(model: Any) -> dict[str, Any]:
        # Their images have the channels before height and width.
        given = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).to(model.dtype)
        if has_classifier:
            return {"hidden": model.vit(given).last_hidden_state, "logits": model(given).logits}
        output = model(given)
        return {"hidden": output.last_hidden_state, "pooled": output.pooler_output}

    def ours(model: vit.ViT) -> dict[str, Any]:
        hidden = model(jnp.asarray(images, model.patches.kernel.dtype))
        return {"hidden": hidden} | (
            {"logits": model.classify(hidden)} if has_classifier else {"pooled": model.pool(hidden)}
        )

    return Pair(vit, vit.ViT, random_model(model_class, config), theirs, ours)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"qkv_bias": False, "num_channels": 1, "layer_norm_eps": 1e-2, "patch_size": 3},
        {"hidden_act": "relu", "pooler_output_size": 10},
    ],
    ids=["plain", "no biases, one channel, another eps and patch", "relu, another pooler"],
)
def test_there_and_back(tmp_path: Path, given: dict[str, Any]) -> None:
    pair(**given).check_there_and_back(tmp_path)


def test_a_classifier(tmp_path: Path) -> None:
    pair(transformers.ViTForImageClassification, num_labels=7).check_there_and_back(tmp_path)
    config = vit.Config.read(tmp_path / "theirs")
    assert (config.prefix, config.pooler, config.classifier) == ("vit.", 0, 7)


def test_several_files(tmp_path: Path) -> None:
    pair().check_there_and_back(tmp_path, their_shards="12KB", our_shards=5_000)
    files = [len(list((tmp_path / name).glob("*.safetensors"))) for name in ("theirs", "back")]
    assert min(files) > 2


def test_bfloat16(tmp_path: Path) -> None:
    pair().check_bfloat16(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"hidden_act": "silu"},
        {"pooler_act": "relu"},
        {"image_size": [12, 8]},
        {"patch_size": [4, 2]},
        {"model_type": "deit"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_model_does_not_do_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    check_refused(vit, transformers.ViTConfig(**SIZES), given, tmp_path)
