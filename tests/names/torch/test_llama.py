"""`statewise.examples.names.llama` beside transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

import beside_torch
from statewise.examples.names import llama

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS = {
    "every head its own": {"num_attention_heads": 4},
    "two share": {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "all share, tied, biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "another head size, eps and theta": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


def config_of(name: str) -> Any:
    return transformers.LlamaConfig(**SIZES, **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    beside_torch.check_there_and_back(llama, llama.Llama, beside_torch.random_model(config_of(name)), tmp_path)


def test_several_files(tmp_path: Path) -> None:
    beside_torch.check_shards(llama, llama.Llama, beside_torch.random_model(config_of("two share")), tmp_path)


def test_bfloat16(tmp_path: Path) -> None:
    beside_torch.check_bfloat16(llama, llama.Llama, beside_torch.random_model(config_of("two share")), tmp_path)


@pytest.mark.parametrize("name", ["two share", "all share, tied, biases"])
def test_training(tmp_path: Path, name: str) -> None:
    beside_torch.check_training(llama, llama.Llama, beside_torch.random_model(config_of(name)), tmp_path)


def test_configurations_of_older_versions(tmp_path: Path) -> None:
    """Published folders have `rope_theta` and `rope_scaling`: they mean what transformers makes of them."""
    config_of("two share").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    read, given = llama.Config.read(tmp_path), json.loads(file.read_text())
    rope = given.pop("rope_parameters")
    given |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    file.write_text(json.dumps(given))
    assert llama.Config.read(tmp_path) == read
    assert transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters == LLAMA3
