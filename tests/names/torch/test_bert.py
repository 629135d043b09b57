"""`statewise.examples.names.bert` beside transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

import statewise as sw
from families_beside_torch import Pair, check_refused, random_model
from statewise.examples.names import bert

RANDOM = np.random.default_rng(0)
TOKENS, TYPES = RANDOM.integers(0, 61, (3, 13)), RANDOM.integers(0, 2, (3, 13))
MASK = (np.arange(13)[None] < np.array([[13], [5], [1]])).astype(int)
SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 16}
HEADS = (
    "cls.predictions.bias",
    "cls.predictions.transform.LayerNorm.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.dense.weight",
)


def pair(model_class: Any = transformers.BertModel, dropped: tuple[str, ...] = (), **given: Any) -> Pair:
    """The hidden states with padding, with and without segments, and without either."""
    has_pooler = model_class is transformers.BertModel

    def theirs(model: Any) -> dict[str, Any]:
        model, tokens, mask, types = getattr(model, "bert", model), *map(torch.tensor, (TOKENS, MASK, TYPES))
        found = {"padded": model(tokens, mask, types), "one segment": model(tokens, mask), "plain": model(tokens)}
        outputs = {name: output.last_hidden_state for name, output in found.items()}
        return outputs | ({"pooled": found["padded"].pooler_output} if has_pooler else {})

    def ours(model: bert.Bert) -> dict[str, Any]:
        tokens, mask, types = map(jnp.asarray, (TOKENS, MASK, TYPES))
        outputs = {"padded": model(tokens, mask, types), "one segment": model(tokens, mask), "plain": model(tokens)}
        return outputs | ({"pooled": model.pool(outputs["padded"])} if has_pooler else {})

    config = transformers.BertConfig(**SIZES | given)
    return Pair(bert, bert.Bert, random_model(model_class, config), theirs, ours, dropped)


@pytest.mark.parametrize(
    "given",
    [{}, {"hidden_act": "relu", "layer_norm_eps": 1e-2, "type_vocab_size": 3}, {"hidden_act": "gelu_new"}],
    ids=["plain", "relu, another eps, three segments", "gelu_new"],
)
def test_there_and_back(tmp_path: Path, given: dict[str, Any]) -> None:
    pair(**given).check_there_and_back(tmp_path)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """A text is the same vectors whatever pads it, so that texts of many lengths can be of one shape."""
    models = pair()
    models.theirs.save_pretrained(tmp_path)
    expected = models.expected()["one segment"]
    with torch.no_grad():
        alone = models.theirs(torch.tensor(TOKENS[1:2, :5])).last_hidden_state.numpy()
    np.testing.assert_allclose(expected[1:2, :5], alone, rtol=0, atol=1e-5)


def test_a_prefix_and_no_pooler(tmp_path: Path) -> None:
    """A model with a head of pretraining: what ours does not have is listed, and not written."""
    pair(transformers.BertForMaskedLM, HEADS).check_there_and_back(tmp_path)
    config = bert.Config.read(tmp_path / "theirs")
    assert (config.prefix, config.pooler) == ("bert.", False)
    # transformers reads the folder as a plain encoder.
    loaded, info = transformers.BertModel.from_pretrained(
        tmp_path / "back", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.pooler is None


def test_norms_of_old_folders(tmp_path: Path) -> None:
    """The oldest folders, bert-base-uncased itself, have `gamma` and `beta`; transformers reads them still."""
    models, folder, back = pair(), tmp_path / "theirs", tmp_path / "back"
    models.theirs.save_pretrained(folder)
    file = folder / "model.safetensors"
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in safetensors.torch.load_file(file).items()
    }
    # The number of each position, which is a constant; many folders have it, all-MiniLM-L6-v2 does.
    constant = {"embeddings.position_ids": torch.arange(16)[None]}
    safetensors.torch.save_file(renamed | constant, file, {"format": "pt"})
    names, plan = models.names_and_plan(folder)
    assert bert.Config.read(folder).norm == ("gamma", "beta")
    state, report = sw.restore(folder, plan.abstract(), names=names)
    assert [leaf.leaf.path for leaf in report.leaves if leaf.outcome == "dropped"] == [("embeddings.position_ids",)]
    models.compare(models.found(state), models.expected())
    sw.convert(state, back, names=names, extra_files=[folder / "config.json"])
    written = safetensors.torch.load_file(back / "model.safetensors")
    assert written.keys() == renamed.keys()
    assert all(torch.equal(written[name], array) for name, array in renamed.items())
    again, expected = models.expected(models.load(back)), models.expected()
    assert all(np.array_equal(again[name], array) for name, array in expected.items())


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
        {"position_embedding_type": "relative_key"},
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"model_type": "roberta"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_the_model_does_not_do_is_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    check_refused(bert, transformers.BertConfig(**SIZES), given, tmp_path)
