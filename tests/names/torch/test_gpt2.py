"""`statewise.examples.names.gpt2` beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from beside_torch import arrays_in, check_training
from families_beside_torch import Pair, check_refused, random_model
from statewise.examples.names import gpt2

TOKENS = np.random.default_rng(0).integers(0, 61, (2, 13))
SIZES = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 3, "n_head": 4}
SIZES |= {"bos_token_id": None, "eos_token_id": None}


def pair(model_class: Any = transformers.GPT2LMHeadModel, **given: Any) -> Pair:
    def theirs(model: Any) -> dict[str, Any]:
        output = model(torch.tensor(TOKENS))
        # The plain model has no head: the logits are the product with the embedding, by definition.
        logits = output.logits if "logits" in output else output.last_hidden_state @ model.wte.weight.T
        return {"logits": logits}

    def ours(model: gpt2.GPT2) -> dict[str, Any]:
        return {"logits": model(jnp.asarray(TOKENS))}

    return Pair(gpt2, gpt2.GPT2, random_model(model_class, transformers.GPT2Config(**SIZES | given)), theirs, ours)


@pytest.mark.parametrize(
    "given",
    [{}, {"n_inner": 20, "activation_function": "gelu", "layer_norm_epsilon": 1e-2}, {"activation_function": "relu"}],
    ids=["plain", "another width, gelu and eps", "relu"],
)
def test_there_and_back(tmp_path: Path, given: dict[str, Any]) -> None:
    pair(**given).check_there_and_back(tmp_path)


def test_folders_without_a_prefix(tmp_path: Path) -> None:
    """The published folders are of the plain model, whose names have no prefix."""
    pair(transformers.GPT2Model).check_there_and_back(tmp_path)
    assert gpt2.Config.read(tmp_path / "theirs").prefix == ""
    assert "wte.weight" in arrays_in(tmp_path / "back")
    # transformers reads them into the model with a head, too.
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    plain = transformers.GPT2Model.from_pretrained(tmp_path / "theirs", attn_implementation="eager").eval()
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, plain(tokens).last_hidden_state @ plain.wte.weight.T)


def test_the_masks_in_published_folders_are_dropped(tmp_path: Path) -> None:
    """The folder of gpt2 has `h.0.attn.bias`, the causal mask, besides `h.0.attn.c_attn.bias`."""
    models = pair(transformers.GPT2Model)
    models.theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    mask = torch.tril(torch.ones(1, 1, 16, 16))
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(3)}
    safetensors.torch.save_file(safetensors.torch.load_file(file) | masks, file, {"format": "pt"})
    names, plan = models.names_and_plan(tmp_path)
    report = names.check(plan, tmp_path)
    assert report.ok
    assert [leaf.leaf.path for leaf in report.leaves if leaf.outcome == "dropped"] == [(name,) for name in masks]


def test_several_files(tmp_path: Path) -> None:
    pair().check_there_and_back(tmp_path, their_shards="12KB", our_shards=5_000)
    files = [len(list((tmp_path / name).glob("*.safetensors"))) for name in ("theirs", "back")]
    assert min(files) > 2


def test_bfloat16(tmp_path: Path) -> None:
    pair().check_bfloat16(tmp_path)


def test_training(tmp_path: Path) -> None:
    """A step of gradient descent through the scan over stacked layers is torch's, layer by layer."""
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    models = pair(vocab_size=96, n_positions=24, **no_dropout)
    check_training(gpt2, gpt2.GPT2, models.theirs, tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"activation_function": "silu"},
        {"scale_attn_by_inverse_layer_idx": True},
        {"scale_attn_weights": False},
        {"add_cross_attention": True},
        {"tie_word_embeddings": False},
        {"model_type": "bert"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_model_does_not_do_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    check_refused(gpt2, transformers.GPT2Config(**SIZES), given, tmp_path)
