"""`statewise.examples.names.gemma` beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

import beside_torch
from statewise.examples.names import gemma

# Without a padding token, whose row of the embedding gets no gradient in torch.
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": None}
CONFIGS = {
    "all share, as the 2B": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "every head its own, as the 7B": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "rms_norm_eps": 1e-2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "two share, untied, biases": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": False,
        "attention_bias": True,
    },
}


def config_of(name: str) -> Any:
    return transformers.GemmaConfig(**SIZES, **CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    beside_torch.check_there_and_back(gemma, gemma.Gemma, beside_torch.random_model(config_of(name)), tmp_path)


def test_several_files(tmp_path: Path) -> None:
    theirs = beside_torch.random_model(config_of("all share, as the 2B"))
    beside_torch.check_shards(gemma, gemma.Gemma, theirs, tmp_path)


def test_bfloat16(tmp_path: Path) -> None:
    theirs = beside_torch.random_model(config_of("all share, as the 2B"))
    beside_torch.check_bfloat16(gemma, gemma.Gemma, theirs, tmp_path)


@pytest.mark.parametrize("name", ["all share, as the 2B", "two share, untied, biases"])
def test_training(tmp_path: Path, name: str) -> None:
    beside_torch.check_training(gemma, gemma.Gemma, beside_torch.random_model(config_of(name)), tmp_path)
