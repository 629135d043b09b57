"""`statewise.examples.names.qwen3` beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import beside_torch
from statewise.examples.names import qwen3

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": None}
CONFIGS = {
    "heads wider than the model": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    "all share, tied, biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "every head its own": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
}


def config_of(name: str) -> Any:
    return transformers.Qwen3Config(**SIZES, **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    beside_torch.check_there_and_back(qwen3, qwen3.Qwen3, beside_torch.random_model(config_of(name)), tmp_path)


def test_several_files(tmp_path: Path) -> None:
    theirs = beside_torch.random_model(config_of("heads wider than the model"))
    beside_torch.check_shards(qwen3, qwen3.Qwen3, theirs, tmp_path)


def test_bfloat16(tmp_path: Path) -> None:
    theirs = beside_torch.random_model(config_of("all share, tied, biases"))
    beside_torch.check_bfloat16(qwen3, qwen3.Qwen3, theirs, tmp_path)


@pytest.mark.parametrize("name", ["heads wider than the model", "all share, tied, biases"])
def test_training(tmp_path: Path, name: str) -> None:
    beside_torch.check_training(qwen3, qwen3.Qwen3, beside_torch.random_model(config_of(name)), tmp_path)
